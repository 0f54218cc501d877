"""What each field is to a run that goes on: every one on purpose, and what two configs differ in."""

from pathlib import Path
from typing import Annotated, ClassVar

import pytest
from pydantic import SerializeAsAny

from mmoe.config.base import Config
from mmoe.config.load import flatten, load
from mmoe.config.nature import Nature, differences, natures
from mmoe.config.registry import KindConfig
from tests.conftest import REPOSITORY
from tests.training.test_trainer import config

# Every key of a run, by what a change of it is. A new field stands in none of these: think of what it decides.
KEYS = {
    Nature.IDENTITY: {
        "data.sources.text": "kind options positions",
        "data.stages.all": "until temperature sources weights",
        "data": "sequence_length patches_per_sequence window_documents isolated_pair_share video_backend",
        "data.bounds": (
            "file_bytes row_bytes json_depth json_digits image_pixels video_pixels video_seconds video_frames "
            "audio_seconds audio_channels audio_rate array_bytes"
        ),
        "tokenizers.text": "vocabulary_size",
        "tokenizers.vision": "patch max_patches tubelet",
        "tokenizers.audio": "kind codebooks layout",
        "tokenizers.audio.mel": "sample_rate window hop mels stack codebook_size normalize_level",
        "tokenizers.action": "mode chunk bins binning",
        "model": (
            "d_model n_layers n_heads n_kv_heads head_dim intermediate_size rope_theta qk_norm norm_eps "
            "bidirectional_slices attention tie_embeddings init_std contrast_dim"
        ),
        "model.moe": (
            "n_experts top_k intermediate_size n_shared_experts shared_gate dispatcher capacity_factor drop_policy "
            "token_group_alignment expert_backend score_func norm_topk_prob routed_scaling_factor n_group topk_group "
            "group_score router_noise bias_update_rate layer_freq first_k_dense"
        ),
        "losses.ce": "text audio action structure",
        "losses.contrastive": "weight tau group_sequences",
        "losses.action": "weight",
        "losses.load_balance": "sequence micro_batch global_batch",
        "losses": "z_loss terms",
        "optim.optimizer": "kind name betas eps implementation",
        "optim.matrices": "kind name momentum",
        "precision": "compute",
        "training": "seed global_batch_positions",
        "training.start_from": "weights step noise",
    },
    Nature.ADJUSTABLE: {
        "optim.lr": "peak reference_batch_positions scaling_rule power",
        "optim.schedule": "kind start minimum decay",
        "optim.schedule.warmup": "steps positions fraction",
        "optim.schedule.hold": "steps positions fraction",
        "optim.optimizer": "weight_decay",
        "optim.matrices": "weight_decay",
        "optim.clip": "max_norm",
    },
    Nature.EXTENDABLE: {"training": "budget_positions", "data.sources.text": "max_epochs"},
    Nature.LAYOUT: {
        "losses.ce": "chunk",
        "parallel": (
            "pp dp_replicate dp_shard cp tp ep zero offload activation_checkpointing compile schedule stages_per_rank "
            "threads"
        ),
        "training": "micro_batch_sequences",
    },
    Nature.OPERATIONAL: {
        "": "extensions",
        "data.sources.text": "shards input",
        "data": "workers prefetch error_budget watchdog_seconds",
        "data.storage": "cache_folder cache_bytes attempts timeout_s backoff_s concurrency",
        "tokenizers.text": "path",
        "tokenizers.audio": "path",
        "parallel": "timeout_seconds",
        "training": "run callbacks",
        "checkpoint": "every_steps every_minutes keep",
        "monitoring": "log_every_steps tables_every_steps digest_steps peak_flops",
        "monitoring.sinks.jsonl": "kind name",
        "monitoring.sinks.arrays": "kind name records_per_part flush_seconds",
        "evaluation": "every_steps at_end max_documents batches",
    },
}


@pytest.fixture
def full():
    """A run with every part that may be null."""
    return config(
        Path("/data"),
        "/run",
        data__sources={"text": {"kind": "text", "shards": "/data/text"}},
        tokenizers__text={"path": "/text.json"},
        model__moe__n_group=2,
        optim__schedule={"hold": {"steps": 1}},
        training__start_from={"weights": "/weights"},
    )


def test_every_field_of_a_run_has_a_nature_on_purpose(full):
    expected = {
        f"{place}.{name}".removeprefix("."): nature
        for nature, places in KEYS.items()
        for place, names in places.items()
        for name in names.split()
    }
    assert natures(full) == expected


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_keys_are_those_of_the_flat_config(path):
    from mmoe.recipe.config import RunConfig

    recipe = load(RunConfig, path)
    assert list(natures(recipe)) == list(flatten(recipe.model_dump(mode="json")))


class Part(KindConfig):
    size: int = 1
    every: Annotated[int, Nature.OPERATIONAL] = 1


class Quiet(Config):
    nature: ClassVar[Nature] = Nature.OPERATIONAL

    often: int = 1
    degree: Annotated[int, Nature.LAYOUT] = 1


class Tree(Config):
    plain: int = 1
    quiet: Quiet = Quiet()
    maybe: Quiet | None = None
    held: Annotated[Part | None, Nature.LAYOUT] = None
    parts: tuple[SerializeAsAny[Part], ...] = ()
    numbers: Annotated[tuple[int, ...], Nature.OPERATIONAL] = ()
    named: dict[str, Quiet] = {}
    options: dict[str, int] = {}


def test_the_nearest_declaration_holds_in_nested_optional_listed_and_named_configs():
    tree = Tree(
        maybe=Quiet(),
        held=Part(kind="a"),
        parts=(Part(kind="a"), Part(kind="a", name="second")),
        named={"x": Quiet()},
        options={"k": 1},
    )
    of = natures(tree)
    assert of["quiet.often"] is of["maybe.often"] is of["named.x.often"] is Nature.OPERATIONAL
    assert of["quiet.degree"] is of["maybe.degree"] is of["named.x.degree"] is Nature.LAYOUT
    assert of["held.size"] is Nature.LAYOUT and of["held.every"] is Nature.OPERATIONAL
    assert of["parts.a.size"] is of["parts.second.size"] is Nature.IDENTITY
    assert of["parts.second.every"] is of["numbers"] is Nature.OPERATIONAL
    assert of["plain"] is of["options.k"] is Nature.IDENTITY
    empty = natures(Tree())
    assert empty["maybe"] is Nature.OPERATIONAL and empty["held"] is Nature.LAYOUT
    assert empty["parts"] is Nature.IDENTITY


def test_a_difference_is_named_by_its_key_and_what_one_side_lacks_by_the_whole_part():
    def only(**changes):
        (found,) = differences(Tree(), Tree(**changes))
        return found

    assert str(only(plain=2)) == "plain (1 -> 2)"
    assert only(quiet=Quiet(degree=2)).key == "quiet.degree"
    assert (only(maybe=Quiet()).key, only(maybe=Quiet()).nature) == ("maybe", Nature.LAYOUT)  # a degree is in it
    assert only(parts=(Part(kind="a"),)).nature is Nature.IDENTITY
    assert only(options={"k": 1}).key == "options"
    assert differences(Tree(options={"k": 1, "l": 2}), Tree(options={"l": 2, "k": 1})) == []
    one, other = (Tree(parts=(Part(kind="a"), Part(kind="a", name="b", every=n))) for n in (1, 2))
    assert [str(each) for each in differences(one, other)] == ["parts.b.every (1 -> 2)"]


def test_the_order_of_parts_with_names_is_a_difference(full):
    pair = {"x": Quiet(), "y": Quiet()}
    (found,) = differences(Tree(named=pair), Tree(named=dict(reversed(pair.items()))))
    assert str(found) == "named (x, y -> y, x)"
