"""Named values of actions, from the log to the figures: ids of their own, labels at their places, accuracy."""

import numpy as np
import pytest
import torch

from mmoe.config.load import validate
from mmoe.data.index.shard_index import ShardIndex
from mmoe.data.load.decode import SampleLoader
from mmoe.data.plan.measure import measure_index
from mmoe.data.plan.planner import DocumentRef
from mmoe.errors import ConfigError, DataError
from mmoe.evaluation.evaluate import evaluate
from mmoe.evaluation.generate import document_batch
from mmoe.evaluation.inference import inference
from mmoe.evaluation.predict import predict_clip
from mmoe.losses.cross_entropy import CrossEntropyConfig
from mmoe.preparation.sources import SOURCES
from mmoe.preparation.sources.rlds import RldsConfig
from mmoe.schema.batch import IGNORE
from mmoe.schema.counts import Counts
from mmoe.schema.modality import Modality
from mmoe.tokenizers.bundle import TokenizersConfig
from mmoe.tokenizers.vocabulary import Vocabulary
from tests.data.recordings_rlds import episode, step_features, tensor, write_rlds
from tests.preparation import test_prepare

CLICKS = ("none", "A", "B")
OPTIONS = {"rate_hz": 5, "last_action": True, "action_names": ("x", "click", "y"), "slices": 2}


def clicks(number, steps):
    """Which button is pressed at each step: mostly A, and B once in a while."""
    return [(2 if (number + i) % 4 == 3 else 0 if (number + i) % 5 == 4 else 1) for i in range(steps)]


def recording(number, steps, pressed=None):
    lists = episode(number, steps)
    pressed = pressed or clicks(number, steps)
    lists["steps/action"] = [v for i in range(steps) for v in (0.1 * i, float(pressed[i]), 0.5 - 0.2 * i)]
    return lists


@pytest.fixture(scope="module")
def pressed_buttons(tmp_path_factory):
    root = tmp_path_factory.mktemp("clicks")
    lengths = [4 + n % 3 for n in range(12)]
    write_rlds(root / "in", {"train": [[recording(n, length) for n, length in enumerate(lengths)]]})
    manifest, _ = test_prepare.run("rlds", root / "in", root / "arm", **OPTIONS, categories={"click": CLICKS})
    test_prepare.run("rlds", root / "in", root / "plain", **OPTIONS)
    return root, manifest


@pytest.fixture(scope="module", params=["continuous", "discrete"])
def acting(request, build_run, pressed_buttons):
    root, _ = pressed_buttons
    run = build_run(
        data__sources={"arm": {"kind": "rlds", "shards": str(root / "arm")}},
        tokenizers__audio=None,
        tokenizers__action={"chunk": 4, "mode": request.param, "bins": 16},
    )
    torch.manual_seed(0)
    for weight in run.model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return run


def test_a_source_says_what_its_numbers_mean_and_how_often_each_occurs(pressed_buttons):
    root, manifest = pressed_buttons
    index = [ShardIndex.read(root / "arm" / shard.path) for shard in manifest.splits["train"].shards]
    trained = {int(name.rsplit("-", 1)[1]) for each in index for name in each.recordings}
    assert list(manifest.categories["click"]) == list(CLICKS) and 0 < len(trained) < 12
    # Tables of clips overlap (a row before, rows after), so only what occurs and what occurs most is theirs to say.
    counts = manifest.categories["click"]
    assert max(counts, key=counts.get) == "A" and min(counts.values()) > 0
    stats = manifest.vectors["ACTION"]
    at = stats.names.index("click")
    assert (stats.low[at], stats.high[at]) == (0, 2) and stats.clipped["train"][at] == 0


def test_numbers_that_are_no_category_are_refused_and_options_that_do_not_fit_are_said(tmp_path):
    good, bad = recording(0, 4), recording(1, 4)
    bad["steps/action"][1 + 3 * 2] = 1.5
    write_rlds(tmp_path / "in", {"train": [[good, recording(2, 4), bad]]})
    manifest, _ = test_prepare.run(
        "rlds", tmp_path / "in", tmp_path / "out", **OPTIONS | {"slices": 4}, categories={"click": CLICKS}
    )
    assert sum(split.samples for split in manifest.splits.values()) == 2
    said = (tmp_path / "out/quarantine.jsonl").read_text()
    assert "click is 1.5 in row 2, but its categories have the numbers 0 to 2 (none, A, B)" in said
    source = SOURCES.find("rlds")
    with pytest.raises(ConfigError, match="categories.clock: the actions have no dimension clock; did you mean click"):
        source.described(tmp_path / "in", source.config(**OPTIONS, categories={"clock": CLICKS}))
    for values in (["A"], ["A", "A"]):
        with pytest.raises(ConfigError, match="categories.click: give two or more names, all different"):
            validate(RldsConfig, {"categories": {"click": values}}, "test")


def test_ids_of_named_values_come_after_all_others():
    plain = Vocabulary(10, 2, 4, 5, ("cam_left",))
    named = Vocabulary(10, 2, 4, 5, ("cam_left",), ("click=A", "click=B"))
    assert {k: v for k, v in named.ranges.items() if k != "category"} == {
        k: v for k, v in plain.ranges.items() if k != "category"
    }
    assert named.size == plain.size + 2 and named.name(plain.size) == "click=A"
    kinds = named.modality_of(np.arange(named.size))
    np.testing.assert_array_equal(kinds[: plain.size], plain.modality_of(np.arange(plain.size)))
    assert set(kinds[plain.size :].tolist()) == {Modality.ACTION} and kinds[plain.size - 1] == Modality.STRUCTURE


def test_labels_are_the_ids_of_what_was_logged_and_as_many_as_planned(acting):
    tokenizers, discrete = acting.tokenizers, acting.tokenizers.discrete_actions
    loader = SampleLoader(acting.sources.files("train"), tokenizers, "pyav")
    first = tokenizers.vocabulary.ranges["category"].start
    seen = 0
    for shard in range(len(acting.sources.files("train")[0].tars)):
        index = loader.index(0, shard)
        measures = measure_index(index, tokenizers, "arm")
        for row in range(len(index)):
            (document,) = loader(DocumentRef(0, shard, row, 0, 0, int(measures.slices[row]), False, True))
            labels = document.labels[document.labels != IGNORE]
            kinds = tokenizers.vocabulary.modality_of(labels)
            assert len(document) == measures.length[row]
            assert np.bincount(kinds, minlength=len(Modality)).tolist() == measures.labels[row].tolist()
            assert document.action_mask.sum() == measures.count("action_elements")[row]
            assert (document.token_ids < first).all()  # a target never enters the input
            _, _, number, begin = index.keys[row].split("-")
            pressed, begin = clicks(int(number), 4 + int(number) % 3), int(begin)
            starts = np.flatnonzero(np.diff(np.r_[0, document.modality == Modality.ACTION]) == 1)
            for step, start in enumerate(starts.tolist(), start=begin):
                at = start + (4 * 2 if discrete else 1)
                expected = [first + CLICKS.index(CLICKS[click]) for click in pressed[step : step + 4]]
                expected += [IGNORE] * (4 - len(expected))
                assert document.labels[at : at + 4].tolist() == expected
                seen += 1
            if not discrete:
                assert document.action_target.shape[2] == 2 and tokenizers.dims[Modality.ACTION].names == ("x", "y")
    assert seen > 20


def test_named_values_count_in_the_denominator_of_the_cross_entropy_alone(acting):
    batch = next(iter(acting.heldout(isolated=False, only=["arm"])))
    ids = acting.tokenizers.vocabulary.ranges["category"]
    named = int(((batch.labels >= ids.start) & (batch.labels < ids.stop)).sum())
    bins = acting.tokenizers.vocabulary.ranges["action"]
    others = int(((batch.labels >= bins.start) & (batch.labels < bins.stop)).sum())
    plan = acting.heldout(isolated=False, only=["arm"]).plans[0]
    counts = Counts.total(sequence.counts for sequence in plan)
    assert named and counts.labels[Modality.ACTION] == named + others
    term = CrossEntropyConfig(text=0, audio=0, structure=0, action=2.0).build()
    assert term.denominator(counts, len(plan)) == 2.0 * (named + others)
    assert counts.action_elements == int(batch.action_mask.sum())


def test_accuracy_is_that_of_the_likeliest_value_beside_the_most_frequent_one(acting):
    found = evaluate(acting)["categories"]["arm"]["click"]
    ids = acting.tokenizers.category_ids("click", CLICKS)
    right = labels = frequent = 0
    with inference(acting):
        for batch in acting.heldout(isolated=False, only=["arm"]):
            logits = acting.model.logits(acting.model(batch).hidden.flatten(0, 1))[:, torch.from_numpy(ids)]
            label = batch.labels.flatten()
            for at in torch.isin(label, torch.from_numpy(ids)).nonzero().flatten().tolist():
                right += int(ids[int(logits[at].argmax())] == int(label[at]))
                frequent += int(label[at]) == ids[1]
                labels += 1
    assert found["labels"] == labels > 10 and found["frequent"] == "A"
    assert found["accuracy"] == pytest.approx(right / labels) and 0 < right < labels
    assert found["most_frequent"] == pytest.approx(frequent / labels)


def test_an_official_side_is_held_beside_the_value_that_was_frequent_in_training(acting, tmp_path):
    """All of it is held out and mostly B, so that the most frequent value of its own would be right nearly always."""
    lists = [recording(n, 6, [1 if i == 4 else 2 for i in range(6)]) for n in range(3)]
    write_rlds(tmp_path / "in", {"train": [lists]})
    folders = {}
    for name, values in {"official": CLICKS, "turned": ("none", "B", "A")}.items():
        options = OPTIONS | {"categories": {"click": values}, "prepare": {"heldout_share": 1}}
        folders[name] = tmp_path / name
        test_prepare.run("rlds", tmp_path / "in", folders[name], **options)
    found = evaluate(acting, shards=str(folders["official"]))["categories"]["arm"]["click"]
    assert found["frequent"] == "A" and 0 < found["most_frequent"] < 0.5
    message = r"its named values are .*'none', 'B', 'A'.*, those of arm in .*'none', 'A', 'B'"
    with pytest.raises(DataError, match=message):
        evaluate(acting, shards=str(folders["turned"]))


def test_a_clip_is_answered_with_names(acting):
    index = ShardIndex.read(acting.sources.files("heldout")[0].tars[0])
    ids, numbers = acting.tokenizers.category_ids("click", CLICKS), acting.tokenizers.actions["arm"].number_tokens
    loader = SampleLoader(acting.sources.files("heldout"), acting.tokenizers, "pyav")
    for row, key in enumerate(index.keys):
        _, _, number, begin = key.split("-")
        (document,) = loader(DocumentRef(0, 0, row, 0, 0, 2, False, True))
        batch = document_batch(acting, document)
        with inference(acting):
            likeliest = acting.model.logits(acting.model(batch).hidden[0])[:, torch.from_numpy(ids)].argmax(1).tolist()
        starts = np.flatnonzero(np.diff(np.r_[0, document.modality == Modality.ACTION]) == 1) + numbers
        said = [[CLICKS[likeliest[at + h]] for h in range(4)] for at in starts.tolist()]
        assert [chunk.named["click"] for chunk in predict_clip(acting, "arm", key)] == said
        for step, chunk in enumerate(predict_clip(acting, "arm", key), start=int(begin)):
            was = [CLICKS[click] for click in clicks(int(number), 4 + int(number) % 3)[step : step + 4]]
            assert chunk.logged_named == {"click": was + ["-"] * (4 - len(was))}
            assert chunk.names == ("x", "y")
            np.testing.assert_allclose(chunk.logged[0], [0.1 * step, 0.5 - 0.2 * step], atol=1e-6)


def test_sources_must_agree_on_what_a_dimension_is_and_some_number_must_be_left_for_the_head(
    pressed_buttons, build_run, tmp_path
):
    root, _ = pressed_buttons
    sources = {name: {"kind": "rlds", "shards": str(root / name)} for name in ("arm", "plain")}
    with pytest.raises(ConfigError, match="click is a number in the actions of source plain, and a named value in"):
        build_run(data__sources=sources, tokenizers__audio=None)
    lists = [episode(n, 4) | {"steps/action": [float(c) for c in clicks(n, 4)]} for n in range(4)]

    write_rlds(tmp_path / "in", {"train": [lists]}, steps={**step_features(), "action": tensor(1)})
    options = {"rate_hz": 5, "last_action": True, "action_names": ("click",), "slices": 2}
    manifest, _ = test_prepare.run("rlds", tmp_path / "in", tmp_path / "out", **options, categories={"click": CLICKS})
    with pytest.raises(ConfigError, match="set tokenizers.action.mode=discrete"):
        TokenizersConfig().build({"out": manifest})
    run = build_run(
        data__sources={"out": {"kind": "rlds", "shards": str(tmp_path / "out")}},
        tokenizers__audio=None,
        tokenizers__action={"chunk": 4, "mode": "discrete", "binning": "quantile"},
    )
    found = evaluate(run)
    assert found["action_mse"] is None and found["categories"]["out"]["click"]["labels"] > 0
