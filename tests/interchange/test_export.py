"""Runs on text: exported, started from exported weights, and upcycled, as a user does it."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mmoe.commands import session
from mmoe.commands.console import Console
from mmoe.config.load import load, validate
from mmoe.errors import ConfigError, DataError
from mmoe.interchange.export import export
from mmoe.interchange.families import family_of
from mmoe.interchange.start import start
from mmoe.interchange.tokenizer import save_tokenizer
from mmoe.interchange.upcycle import upcycle
from mmoe.recipe.config import RunConfig
from mmoe.recipe.training import StartConfig
from mmoe.tokenizers.text import TextTokenizer
from mmoe.tokenizers.vocabulary import Structure, Vocabulary
from mmoe.training.loop import Trainer
from mmoe.training.run import Run
from tests.conftest import REPOSITORY
from tests.models.random_batch import text_batch
from tests.models.test_parity import random_model

QUIET = Console(quiet=True)
EXPERTS = {"n_experts": 4, "top_k": 2, "intermediate_size": 32}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    lines = [f"Line {i} of a poem about the number {i * i}, and about lines.\n\n" for i in range(400)]
    (folder / "poem.txt").write_text("".join(lines))
    return folder


def config(root, run, *, moe=None, **model) -> RunConfig:
    tree = {
        "data": {
            "sources": {"poem": {"kind": "text", "input": f"{root}/poem.txt", "shards": f"{root}/poem"}},
            "sequence_length": 128,
            "window_documents": 16,
        },
        "tokenizers": {"text": {"path": f"{root}/text.json", "vocabulary_size": 300}},
        "model": {
            "d_model": 16,
            "n_layers": 2,
            "n_heads": 2,
            "n_kv_heads": 1,
            "intermediate_size": 32,
            "moe": moe,
            **model,
        },
        "losses": {"contrastive": {"weight": 0.0}},
        "optim": {"lr": {"peak": 3e-3}, "matrices": {"kind": "muon"}},
        "training": {
            "run": f"{root}/{run}",
            "micro_batch_sequences": 2,
            "global_batch_positions": 256,
            "budget_positions": 512,
        },
        "evaluation": {"at_end": False},
        "monitoring": {"sinks": [{"kind": "jsonl"}, {"kind": "arrays"}]},
    }
    return validate(RunConfig, tree, "test")


def train(configuration) -> Run:
    session.train(configuration, QUIET, fresh=False, stop_after=None, from_step=None)
    return Run.load(configuration.training.run)


@pytest.mark.parametrize("moe, qk_norm", [(None, False), (EXPERTS, True)], ids=["llama", "qwen3-moe"])
def test_a_trained_run_gives_the_same_logits_and_ids_in_transformers(moe, qk_norm, root, tmp_path):
    run = train(config(root, f"run-{qk_norm}", moe=moe, qk_norm=qk_norm))
    export(run, tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    text = "Line 7 of a poem: größer, 東京.\n"
    ids = tokenizer(text)["input_ids"]
    ours = run.tokenizers.text.encode(text) + run.tokenizers.vocabulary.ranges["text"].start
    assert ids == [Structure.BOS, *ours.tolist()] and tokenizer.decode(ids, skip_special_tokens=True) == text
    spelled = "What <|eos|> means, <|image|>, <|bos|><|pad|>"
    ours = run.tokenizers.text.encode(spelled) + run.tokenizers.vocabulary.ranges["text"].start
    assert tokenizer(spelled)["input_ids"] == [Structure.BOS, *ours.tolist()]
    meant = tokenizer("<|eos|>", add_special_tokens=False, split_special_tokens=False)["input_ids"]
    assert meant == [Structure.EOS] == [tokenizer.convert_tokens_to_ids("<|eos|>")]
    assert sorted(tokenizer(text)) == ["attention_mask", "input_ids"]
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())  # transformers 4 reads it from there
    assert settings["model_input_names"] == ["input_ids", "attention_mask"] and settings["split_special_tokens"]
    inputs = tokenizer(text, return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] > len(ids)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    batch = text_batch([[ids]], length=len(ids))
    run.model.eval()
    with torch.no_grad():
        expected = model.eval()(torch.tensor([ids])).logits[0]
        assert (run.model.logits(run.model(batch).hidden)[0] - expected).abs().max() <= 1e-4


def test_a_run_starts_from_exported_weights(root, tmp_path):
    first = train(config(root, "first", qk_norm=True))
    export(first, tmp_path)
    second = config(root, "second", qk_norm=True)
    second = second.model_copy(
        update={"training": second.training.model_copy(update={"start_from": StartConfig(weights=str(tmp_path))})}
    )
    run = Run.build(second)
    start(run, second.training.start_from)
    for name, value in first.model.state_dict().items():
        if name.startswith(("decoder", "embeddings.token")):
            assert torch.equal(run.model.state_dict()[name], value), name
    other = first.model.state_dict()["decoder.norm.weight"]
    trained = train(second)  # and a session does that before its first step: it ends elsewhere than from seed 0
    assert not torch.equal(trained.model.state_dict()["decoder.norm.weight"], other)
    assert load(RunConfig, trained.folder / "config.yaml").training.start_from.weights == str(tmp_path)


GROUPS = {"n_group": 2, "topk_group": 1}


def test_a_run_with_limited_groups_starts_from_another_and_a_difference_is_named(root):
    moe = {**EXPERTS, **GROUPS}
    first = train(config(root, "grouped", moe=moe))
    origin = StartConfig(weights=str(first.folder))
    run = Run.build(config(root, "grouped-again", moe={**moe, "score_func": "softmax_topk"}))
    start(run, origin)
    router = "decoder.blocks.0.feed_forward.router.weight"
    assert torch.equal(run.model.state_dict()[router], first.model.state_dict()[router])
    for key, value in (("n_group", 1), ("topk_group", 2)):
        other = Run.build(config(root, "grouped-otherwise", moe={**moe, key: value}))
        with pytest.raises(ConfigError, match=f"model.moe.{key} is {value}, but the weights of .* are of .*; set it"):
            start(other, origin)


def test_foreign_weights_take_the_text_ids(root, tmp_path):
    """A Llama with a vocabulary of its own: id t of its text is id t + offset here, and the logits are the same."""
    theirs = random_model("llama")
    theirs.resize_token_embeddings(300)
    theirs.save_pretrained(tmp_path)
    shape = {"d_model": 48, "n_layers": 3, "n_heads": 6, "n_kv_heads": 2, "intermediate_size": 64, "rope_theta": 5e5}
    run = Run.build(config(root, "foreign", **shape, tie_embeddings=False))
    start(run, StartConfig(weights=str(tmp_path)))
    text = run.tokenizers.vocabulary.ranges["text"]
    ids = torch.randint(len(text), (20,))
    batch = text_batch([[(ids + text.start).tolist()]], length=20)
    with torch.no_grad():
        ours = run.model.eval().logits(run.model(batch).hidden)[0, :, text.start : text.stop]
        assert (ours - theirs(ids[None]).logits[0, :, : len(text)]).abs().max() <= 1e-4


@pytest.mark.parametrize(
    "moe",
    [
        EXPERTS,
        {**EXPERTS, "n_shared_experts": 1},
        {**EXPERTS, "capacity_factor": 2.0, "layer_freq": 2},  # 2.0 * L * 2 / 4: room for every token at one expert
        {**EXPERTS, "score_func": "sigmoid"},
    ],
    ids=["dropless", "shared", "capacity", "sigmoid"],
)
def test_upcycling_without_noise_keeps_the_loss_and_trains_on(moe, root):
    dense = train(config(root, "dense"))
    name = "-".join(["moe", *map(str, moe.values())])
    losses = upcycle(config(root, name, moe=moe), StartConfig(weights=str(dense.folder)))
    assert losses.copies == pytest.approx(losses.dense, abs=1e-5) and losses.noisy == losses.copies
    with torch.no_grad():  # the loss would tell if the experts were anything else
        run = Run.load(root / name)
        copies, original = (model.decoder.blocks[1].feed_forward for model in (run.model, dense.model))
        assert torch.equal(copies.experts.up[3], original.up.weight.T)
    trainer = Trainer(run, [])
    trainer.resume()
    assert trainer.state.step == 0
    trainer.train()
    assert trainer.state.step == 2


def test_noise_makes_experts_differ_and_its_cost_is_reported(root, caplog):
    dense = train(config(root, "dense"))
    losses = upcycle(config(root, "noisy", moe=EXPERTS), StartConfig(weights=str(dense.folder), noise=0.5))
    assert losses.copies == pytest.approx(losses.dense, abs=1e-5) and abs(losses.noisy - losses.dense) > 1e-5
    assert "with noise 0.5" in caplog.text
    up, copy = Run.load(root / "noisy").model.decoder.blocks[0].feed_forward.experts.up, dense.model.decoder.blocks[0]
    up, dense_up = up.detach(), copy.feed_forward.up.weight.detach()
    assert float((up - dense_up.T).std() / dense_up.std()) == pytest.approx(0.5, rel=0.05)
    assert not torch.equal(up[0], up[1])


@pytest.mark.parametrize(
    "moe, model, sentence",
    [
        (
            {**EXPERTS, "intermediate_size": 16},
            {},
            "model.moe.intermediate_size is 16, but an expert begins as a copy .* 32 wide",
        ),
        ({**EXPERTS, "norm_topk_prob": False}, {}, "weights add up to 1"),
        (EXPERTS, {"rope_theta": 5.0}, "model.rope_theta is 5.0, but the weights .* 10000.0; set it"),
        (EXPERTS, {"n_kv_heads": 2}, "model.n_kv_heads is 2"),
    ],
)
def test_what_cannot_be_copied_is_refused(moe, model, sentence, root):
    dense = train(config(root, "dense"))
    with pytest.raises(ConfigError, match=sentence):
        upcycle(config(root, "refused", moe=moe, **model), StartConfig(weights=str(dense.folder)))
    assert not (root / "refused").exists()


def test_the_config_of_text_can_be_exported_and_needs_nothing_beside_the_repository():
    text = load(RunConfig, REPOSITORY / "configs" / "text_moe.yaml")
    assert family_of(text.model).model_type == "qwen3_moe"
    assert all((REPOSITORY / source.input).is_file() for source in text.data.sources.values())


def test_further_structure_tokens_are_special_tokens_of_the_exported_file(tmp_path):
    vocabulary = Vocabulary(256, audio_codebooks=1, audio_codebook_size=8, further=("cam_top",))
    save_tokenizer(TextTokenizer.bytes(), vocabulary, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.convert_tokens_to_ids("<|cam_top|>") == vocabulary.further_ids["cam_top"] == vocabulary.size - 1
    ids = [vocabulary.ranges["text"].start + ord("a"), vocabulary.further_ids["cam_top"]]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a"


def test_a_tokenizer_that_would_read_a_name_as_its_token_is_not_exported(tmp_path):
    path = tmp_path / "whole.json"
    TextTokenizer.bytes().save(path)
    content = json.loads(path.read_text())
    content["model"]["ignore_merges"] = True  # a piece that is in the vocabulary is taken whole
    content["pre_tokenizer"]["use_regex"] = False
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"would read the text <\|\w+\|> as a structure token .*train another"):
        save_tokenizer(TextTokenizer.load(path), Vocabulary(256), tmp_path)
