"""The whole evaluation on a small run: what it writes, and that what is taken away is what changes."""

import copy
import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from mmoe.commands.console import Console
from mmoe.commands.evaluate import show
from mmoe.data.plan.prepared import PreparedSources
from mmoe.errors import ConfigError, DataError
from mmoe.evaluation.actions import read_chunks
from mmoe.evaluation.baselines import Baselines
from mmoe.evaluation.evaluate import evaluate, file_name
from mmoe.evaluation.examples import examples
from mmoe.schema.modality import Modality
from mmoe.tokenizers.actions import ActionConfig, ActionTokenizer
from mmoe.training.run import rearrange
from tests.data.synthetic import MAKERS, clip_sample, text_sample, write_source


@pytest.fixture(scope="module")
def trained(build_run):
    """A run whose action head, which begins at zero, has some weights."""
    run = build_run(names=("text", "audio", "clip"))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return run


@pytest.fixture(scope="module")
def plain(trained):
    return evaluate(trained)


def test_it_writes_what_it_returns_with_the_keys_of_the_summary(trained, plain):
    assert json.loads((trained.folder / "evaluation.json").read_text()) == json.loads(json.dumps(plain))
    assert set(plain["action_mse_baselines"]) == {"mean", "hold_last", "ridge"}
    assert {"r1", "r1_low", "r5", "pool"} <= set(plain["retrieval"])
    assert set(plain["val_ce"]) == set(plain["unigram_ce"]) == {"text", "audio", "structure"}
    assert plain["samples"]["clip"] == {"held_out": 10, "evaluated": 10}
    assert plain["retrieval"]["r1"] is None and "no source has 64" in plain["retrieval"]["reason"]
    assert set(plain["retrieval"]["by"]) == {"audio/audio-text", "clip/vision-text"}
    assert plain["ablation"] is None and plain["not_evaluated"] == {}


def test_the_overall_error_is_the_mean_over_elements(plain):
    actions = plain["actions"]
    for table in (actions["by_dimension"].values(), actions["by_source"].values(), actions["by_step"]):
        total = sum(entry["model"] * entry["elements"] for entry in table)
        count = sum(entry["elements"] for entry in table)
        assert total / count == pytest.approx(plain["action_mse"])
    assert plain["action_mse"] == actions["all"]["model"]


@pytest.mark.parametrize("modality", [Modality.VISION, Modality.AUDIO])
def test_only_what_is_taken_away_changes(trained, plain, modality):
    shuffled, blank = evaluate(trained, shuffle=modality), evaluate(trained, blank=modality)
    for result in (shuffled, blank):
        assert result["action_mse"] != plain["action_mse"]
        assert result["action_mse_baselines"] == pytest.approx(plain["action_mse_baselines"])
        assert result["ce_by_source"]["text"] == plain["ce_by_source"]["text"]
        same_audio = result["unigram_ce"]["audio"] == plain["unigram_ce"]["audio"]
        assert same_audio == (modality is Modality.VISION)
    name = modality.name.lower()
    assert (trained.folder / f"evaluation-shuffle-{name}.json").is_file()
    assert (trained.folder / f"evaluation-blank-{name}.json").is_file()
    assert shuffled["ablation"]["rows"]["clip"] == (10 if modality is Modality.VISION else 8)
    assert blank["ablation"]["mode"] == "blank"


def test_examples_are_traces_in_time_and_slices_of_different_samples(plain):
    found = plain["examples"]["clip"]
    assert found["names"] == ["steer", "gas"]
    trace = found["traces"][0]
    assert len(trace["x"]) == len(trace["true"]) == len(trace["predicted"])
    assert np.all(np.diff(trace["x"]) > 0) and trace["axis"] == "clip time, s"
    assert len({(item["shard"], item["row"]) for item in found["slices"]}) == len(found["slices"])


def test_a_recording_of_several_samples_is_one_trace_in_their_order(trained):
    chunks = read_chunks(trained.sources, trained.tokenizers, "heldout")
    chunks = replace(chunks, recording=["one"] * len(chunks))
    found = examples(trained, chunks, chunks.target)["clip"]
    (trace,) = found["traces"]
    assert trace["axis"] == "chunk" and trace["x"] == list(range(len(chunks)))
    assert trace["true"] == trace["predicted"]
    assert len(found["slices"]) == 4


def test_examples_are_in_logged_units(trained):
    stats = trained.sources.manifests["clip"].vectors["ACTION"]
    wide = stats.model_copy(update={"q01": (-30.0, 0.0), "q99": (10.0, 8.0), "std": (9.0, 2.0)})
    tokenizers = copy.copy(trained.tokenizers)
    tokenizers.actions = {"clip": ActionTokenizer(ActionConfig(), wide)}
    chunks = read_chunks(trained.sources, trained.tokenizers, "heldout")
    found = examples(replace(trained, tokenizers=tokenizers), chunks, chunks.target)["clip"]
    for item in found["slices"]:
        at = next(n for n, key in enumerate(chunks.keys) if key[1:] == (item["shard"], item["row"], item["chunk"]))
        np.testing.assert_allclose(item["true"], chunks.target[at] * [20, 4] + [-10, 4], rtol=1e-5)


def test_other_shards_are_read_as_the_run_reads_its_own(trained, plain, prepared):
    other = evaluate(trained, shards=str(prepared / "clip"))
    assert other["action_mse"] == pytest.approx(plain["action_mse"], rel=1e-4)
    assert other["action_mse_baselines"] == pytest.approx(plain["action_mse_baselines"])
    assert list(other["ce_by_source"]) == ["clip"]
    assert json.loads((trained.folder / "evaluation.json").read_text())["shards"] is None
    assert (trained.folder / "evaluation-on-clip.json").is_file()


@pytest.mark.parametrize("name", ["audio", "clip"])
def test_a_source_that_is_all_held_out_is_measured_with_the_tokenizers_of_the_run(trained, plain, tmp_path, name):
    """The same recordings as the run's own held-out ones: the same figures."""
    rng = np.random.default_rng(list(MAKERS).index(name))
    made = [MAKERS[name](rng, f"{name}-{i}") for i in range(24)]
    made = [MAKERS[name](rng, f"{name}-h{i}") for i in range(10)]
    write_source(tmp_path / "official", {"train": [], "heldout": made})
    other = evaluate(trained, shards=str(tmp_path / "official"))
    assert other["samples"] == {name: plain["samples"][name]}
    for kind, entry in plain["ce_by_source"][name].items():
        assert other["ce_by_source"][name][kind] == pytest.approx(entry, rel=1e-4)
    config = trained.config.data
    source = config.sources[name].model_copy(update={"shards": str(tmp_path / "official")})
    alone = PreparedSources(config.model_copy(update={"sources": {name: source}}))
    with pytest.raises(DataError, match="official is held out as a whole .* leave data.sources"):
        alone.mixture(trained.tokenizers, 1000)


def test_a_source_that_cannot_be_shuffled_is_left_out_with_the_reason(build_run, tmp_path):
    rng = np.random.default_rng(0)
    heldout = [clip_sample(rng, f"h{i}", 2) for i in range(3)]
    for sample in heldout:
        sample.recording = "one"
    train = [clip_sample(rng, f"t{i}", 2) for i in range(6)]
    write_source(tmp_path / "single", {"train": train, "heldout": heldout})
    write_source(tmp_path / "text", {"train": [text_sample(rng, "t")], "heldout": [text_sample(rng, "h")]})
    sources = {name: {"kind": "text", "shards": str(tmp_path / name)} for name in ("single", "text")}
    run = build_run(names=("text", "clip"), data__sources=sources)
    result = evaluate(run, shuffle=Modality.VISION)
    assert list(result["ce_by_source"]) == ["text"]
    assert "3 rows of 1 recordings" in result["not_evaluated"]["single"]
    assert result["action_mse"] is None


def test_discrete_actions_are_measured_in_the_same_units(build_run):
    action = {"mode": "discrete", "chunk": 4, "bins": 64}
    result = evaluate(build_run(names=("clip",), tokenizers__action=action))
    assert 0 < result["action_mse"] < 10
    assert "action" in result["val_ce"]


def test_choices_that_make_no_sense_are_refused(trained, prepared):
    with pytest.raises(ConfigError, match="exclude each other"):
        evaluate(trained, blank=Modality.VISION, shuffle=Modality.AUDIO)
    with pytest.raises(DataError, match="source.json does not exist"):
        evaluate(trained, shards=str(prepared / "nothing"))
    with pytest.raises(DataError, match="no source of .* is of kind synthetic with the same modalities"):
        evaluate(trained, shards=str(prepared / "image"))


def test_names_of_the_files():
    assert file_name() == "evaluation.json"
    assert file_name(blank=Modality.VISION) == "evaluation-blank-vision.json"
    assert file_name(shuffle=Modality.AUDIO) == "evaluation-shuffle-audio.json"
    assert file_name("out/other", shuffle=Modality.AUDIO) == "evaluation-on-other-shuffle-audio.json"


def test_the_table_names_every_figure(plain):
    console = Console(record=True, width=200)
    show(plain, console)
    text = console.export_text()
    for said in ("CE of text, text", "action error, clip", "hold_last", "recall@1 of 19, clip/vision-text", "by pmi"):
        assert said in text


def test_no_more_than_the_bound_of_each_source_is_measured_the_same_choice_each_time_and_that_is_said(trained, plain):
    """The few that are chosen are measured as they are in a run whose held-out data is these few alone."""
    evaluation = trained.config.evaluation.model_copy(update={"max_documents": 4})
    bounded = replace(trained, config=trained.config.model_copy(update={"evaluation": evaluation}))
    first, again = evaluate(bounded), evaluate(bounded)
    assert {name: entry["evaluated"] for name, entry in first["samples"].items()} == dict.fromkeys(plain["samples"], 4)
    assert {name: entry["held_out"] for name, entry in first["samples"].items()} == {
        name: entry["held_out"] for name, entry in plain["samples"].items()
    }
    assert Baselines.fit(bounded).record == Baselines.fit(trained).record  # fitted to all that is trained on
    assert first["val_ce"] == again["val_ce"] and first["val_ce"] != plain["val_ce"]
    assert first["actions"]["chunks"] < plain["actions"]["chunks"] and first["action_mse_baselines"]["ridge"] > 0
    console = Console(record=True, file=open(os.devnull, "w"), width=200)
    show(first, console)
    assert "clip: 4 of 10 held-out samples were measured; evaluation.max_documents is 4" in console.export_text()
    show(plain, console)
    assert "were measured" not in console.export_text()


def test_how_much_is_measured_may_be_said_to_the_command(trained):
    config = rearrange(trained.config, ["evaluation.max_documents=7"])
    assert config.evaluation.max_documents == 7
    with pytest.raises(ConfigError, match="evaluation.batches cannot be changed .* and evaluation.max_documents"):
        rearrange(trained.config, ["evaluation.batches=7"])
