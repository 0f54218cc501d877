"""The run's tree: the recipes load, derive what they say, and refuse what cannot run."""

import json

import pytest

from mmoe.config.load import absolute, flatten, load
from mmoe.errors import ConfigError
from mmoe.recipe.config import RunConfig
from tests.conftest import REPOSITORY

LENGTH = 1056  # of the demo
CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_recipe_loads_and_derives_its_steps(path):
    config = load(RunConfig, path)
    assert config.batch.iterations == config.training.budget_positions // config.training.global_batch_positions


def test_a_changed_batch_must_say_what_the_rate_does():
    path = REPOSITORY / "configs" / "demo.yaml"
    with pytest.raises(ConfigError, match="changes from 2112 to 4224, .* set optim.lr.reference_batch_positions=2112"):
        load(RunConfig, path, ["training.global_batch_positions=4224"])
    rule = ["optim.lr.reference_batch_positions=2112", "optim.lr.scaling_rule=sqrt"]
    wider = ["training.global_batch_positions=8448", "training.micro_batch_sequences=4"]
    config = load(RunConfig, path, [*wider, *rule])
    assert config.optim.lr.scaled_peak(8448) == pytest.approx(2 * config.optim.lr.peak)
    assert load(RunConfig, path, [*wider, "optim.lr.peak=1e-3"]).optim.lr.scaled_peak(8448) == 1e-3


@pytest.mark.parametrize(
    "override, sentence",
    [
        ("model.n_kv_heads=3", "model: n_heads is 4, not a multiple of n_kv_heads 3"),
        ("model.moe.top_k=9", "model.moe: top_k is 9, but there are 8 experts"),
        ("data.sequence_length=1000", "not a multiple of 1000"),
        ("training.budget_positions=10", "less than one step"),
        ("data.video_backend=opencv", "data.video_backend"),
    ],
)
def test_impossible_shapes_name_the_key_and_the_remedy(override, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load(RunConfig, REPOSITORY / "configs" / "demo.yaml", [override])


def test_the_batch_of_several_replicas_is_the_same_batch():
    """Only the cut into micro-batches changes; without one, a held-out batch is one sequence."""
    path = REPOSITORY / "configs" / "demo.yaml"
    whole = ["training.micro_batch_sequences=null"]
    config = load(RunConfig, path, ["optim.lr.peak=1e-3", *whole, f"training.global_batch_positions={4 * LENGTH}"])
    one, two = config.batch, config.batch_of(2)
    assert (one.sequences, one.iterations) == (two.sequences, two.iterations)
    assert (one.micro_batch_sequences, two.micro_batch_sequences, two.accumulation) == (4, 2, 1)
    assert config.contrastive_group == 4 and config.training.heldout_sequences == 1


def test_no_address_in_the_tree_is_declared_as_plain_text():
    """What a key is called like does not make it an address; its type does, and every such key here has it."""
    path = REPOSITORY / "configs" / "real_small.yaml"
    here = {"training.start_from": {"weights": "a"}, "data.storage.cache_folder": "b", "tokenizers.text.path": "c"}
    config = load(RunConfig, path, [f"{key}={json.dumps(value)}" for key, value in here.items()])
    before, after = (flatten(each.model_dump(mode="json")) for each in (config, absolute(config, "/root")))
    changed = {key for key in before if before[key] != after[key]}
    places = ("shards", "input", "path", "cache_folder", "weights", "run")
    assert changed == {key for key, value in before.items() if key.rpartition(".")[2] in places and value is not None}
    assert after["data.sources.text.input"] == "/shared/data/text" and after["training.run"] == "/root/runs/real_small"
    loose = [key for key, value in after.items() if isinstance(value, str) and "/" in value and key not in changed]
    assert not loose
