"""The report of a small run: self-contained, complete, and safe against what captions may hold."""

import base64
import io
import json
import re

import numpy as np
import pytest
from markupsafe import Markup
from PIL import Image

from mmoe.data.index.shard_index import ShardIndex
from mmoe.data.index.shards import read_member
from mmoe.data.load.media import load_image
from mmoe.evaluation.evaluate import evaluate
from mmoe.models.moe.statistics import CAPACITY_FACTORS
from mmoe.monitoring.reader import RunReader
from mmoe.monitoring.record import StepRecord
from mmoe.monitoring.summary import RunRecords, summarize
from mmoe.monitoring.tables import TableChunk
from mmoe.reporting import figures
from mmoe.reporting.images import SliceImages, data_uri, read_slice, slice_card
from mmoe.reporting.page import page, parts
from mmoe.reporting.report import render_report, write_report
from mmoe.schema.modality import Modality
from mmoe.schema.rig import Rig
from mmoe.schema.sample import Camera
from tests.monitoring.test_summary import line
from tests.monitoring.written import write_records

TERMS = {
    "loss_ce": 2.0,
    "loss_contrastive": 1.0,
    "loss_action": 0.5,
    "loss_router_z": 0.1,
    "loss_balance_sequence": 1.0,
}
LOAD, GRADIENTS = [[1, 2, 3], [4, 4, 4]], [[0.1, 0.1, 0.4], [0.0, 0.0, 0.0]]


def metrics(step: int, **tables) -> StepRecord:
    """A record of two layers of three experts, one modality and one source."""
    scalars = {name: value for name, value in line(step, lr=1e-3).items() if name not in ("step", "session")}
    experts = {"slots_routed": 18 * step, "slots_dropped": 0, "lost/clip/cut at a slice": 3}
    held = {
        "expert_load": np.array(LOAD)[:, None, None],
        "router_grad_norm": np.array(GRADIENTS, np.float32),
        "capacity_factors": np.array(CAPACITY_FACTORS),
        "would_drop": np.array([[3, 1, *[0] * 19], [6, *[0] * 20]]),
    }
    return StepRecord(step, 0, scalars | TERMS | experts, held | tables, {"stage": "main"})


def write(folder, *records: StepRecord) -> RunRecords:
    write_records(folder, *records)
    return RunRecords.read(folder)


@pytest.fixture(scope="module")
def reported(build_run):
    run = build_run(names=("audio", "clip"), model__moe={"n_experts": 3, "top_k": 2, "intermediate_size": 16})
    write(run.folder, *map(metrics, (10, 20, 30)))
    evaluate(run)
    evaluate(run, shuffle=Modality.VISION)
    evaluate(run, blank=Modality.AUDIO)
    write_report(run)
    return run, (run.folder / "report.html").read_text()


def test_the_page_needs_nothing_but_itself(reported):
    _, html = reported
    assert html.count("plotly.js v") == 1
    own = re.sub(r"<script>.*?</script>", "", html, count=1, flags=re.S)  # plotly's own code names its servers
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", own)


def test_every_part_is_there(reported):
    _, html = reported
    for title in ("Training", "Expert load", "Actions", "Retrieval", "Cross-entropy and ranking", "Held-out slices"):
        assert f"<h2>{title}</h2>" in html
    for said in (
        "shuffle vision",
        "blank audio",
        "predicted against logged steer",
        "cut at a slice",
        "Router gradients",
        "steps 20 to 30; tools/capacity_advisor.py",
        "sequence_length",
    ):
        assert said in html
    assert html.count('class="plotly-graph-div"') >= 8


def test_the_summary_stands_beside_it(reported):
    run, _ = reported
    summary = json.loads((run.folder / "summary.json").read_text())
    assert summary["action_mse_shuffle_vision"] is not None and summary["action_mse_blank_audio"] is not None
    assert summary["drop_rate"] == 0.0


def test_a_run_that_was_not_evaluated_yet_has_a_page_too(reported, tmp_path):
    run, _ = reported
    html = render_report(run, write(tmp_path / "dense", StepRecord(1, 0, metrics(1).scalars)))
    assert "<h2>Training</h2>" in html and "<h2>Actions</h2>" not in html and "<h2>Expert load</h2>" not in html


def test_images_are_those_of_the_slice(reported):
    run, _ = reported
    index = ShardIndex.read(run.sources.files("heldout")[1].tars[0])
    for row in range(3):
        segments = index.row_segments(row)
        actions = segments[segments["modality"] == Modality.ACTION]
        for chunk, action in enumerate(actions):
            found = read_slice(run, "clip", 0, row, chunk)
            mine = segments[(segments["slice"] == action["slice"]) & (segments["modality"] == Modality.VISION)]
            assert set(found.images) == set(mine["camera"].tolist())
            for segment in mine:
                name, offset, size = index.row_member(row, int(segment["member"]))
                expected = load_image(read_member(index.tar, offset, size), name)
                np.testing.assert_array_equal(found.images[int(segment["camera"])], expected)


def test_names_are_text_wherever_they_stand_in_a_page():
    name = """<b>'"&</b>"""
    shown = [parts.table([name], [[name]]), parts.note(name), parts.heading(name), parts.details(name, name)]
    html = page(name, name, [parts.card(name, name, name)], [(name, Markup().join(shown))])
    own = re.sub(r"<script>.*?</script>", "", html, count=1, flags=re.S)
    assert "<b>'" not in own and own.count("&lt;b&gt;&#39;&#34;&amp;&lt;/b&gt;") == 13


def test_captions_are_text_and_missing_cameras_are_said():
    picture = np.zeros((8, 8, 3), np.uint8)
    item = {"recording": "a<b", "true": [[0.25, 1.0]], "predicted": [[0.5, 2.0]]}
    some = {int(Camera.FRONT): picture, int(Camera.BACK): picture}
    card = slice_card(item, ["steer", "gas"], SliceImages(some, "<script>x</script>"))
    assert "<script>" not in card and "&lt;script&gt;x" in card and "a&lt;b" in card
    assert card.count("absent</figcaption>") == 4 and card.count("<img") == 2
    assert '<td class="logged">0.250</td>' in card and '<td class="predicted">2.000</td>' in card
    rig = Rig(cameras=("wrist_left", "top", "head"))
    card = slice_card(item, ["steer", "gas"], SliceImages({0: picture, 1: picture}, "", rig))
    assert re.findall(r"<figcaption>(.*?)</figcaption>", card) == ["wrist left", "top", "head: absent"]
    alone = slice_card(item, ["steer", "gas"], SliceImages({-1: picture}, ""))
    assert 'class="single"' in alone and "absent" not in alone


@pytest.mark.parametrize(("size", "kind"), [((24, 32), "png"), ((300, 400), "jpeg"), ((500, 2000), "jpeg")])
def test_images_in_the_page_open_again(size, kind):
    picture = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    head, _, body = data_uri(picture).partition(",")
    assert head == f"data:image/{kind};base64"
    image = Image.open(io.BytesIO(base64.b64decode(body)))
    assert image.width == min(size[1], 480)
    if kind == "png":
        np.testing.assert_array_equal(np.asarray(image), picture)


def test_load_is_shown_over_an_even_share_and_gradients_over_the_mean_of_their_layer(reported):
    reader = RunReader(reported[0].folder)
    load = figures.over_even(reader.tables("expert_load"))
    assert load.data[0].x == (10, 20, 30)
    np.testing.assert_allclose(np.array(load.data[0].z)[:, 0], [0.5, 1.0, 1.5])
    np.testing.assert_allclose(np.array(load.data[1].z)[:, 0], [1.0, 1.0, 1.0])
    gradients = figures.over_even(reader.tables("router_grad_norm"))
    np.testing.assert_allclose(np.array(gradients.data[0].z)[:, 0], [0.5, 0.5, 2.0], atol=1e-3)
    np.testing.assert_allclose(np.array(gradients.data[1].z)[:, 0], [0.0, 0.0, 0.0])
    assert figures.over_even(reader.tables("nothing")) is None


@pytest.mark.parametrize("records", [1, figures.BINS, figures.BINS + 1, 5 * figures.BINS + 3])
def test_a_long_run_is_drawn_as_sums_of_neighboring_records_of_which_none_is_left_out(records):
    values = np.random.default_rng(0).integers(0, 9, (records, 2, 3, 4))
    chunks = [TableChunk(np.arange(n, min(n + 7, records)), values[n : n + 7]) for n in range(0, records, 7)]
    steps, bins = figures._binned(chunks)
    assert len(steps) == len(bins) <= figures.BINS and steps[-1] == records - 1
    np.testing.assert_array_equal(bins.sum(0), values.sum((0, 2)))
    edges = [0, *(step + 1 for step in steps)]
    for begin, end, found in zip(edges, edges[1:], bins):
        np.testing.assert_array_equal(found, values[begin:end].sum((0, 2)))


def test_long_curves_are_thinned():
    steps = np.arange(5 * figures.POINTS)
    figure = figures.curves(
        {"step": steps, "loss": steps / 2, "mfu": np.full(len(steps), np.nan)}, {"loss": "l", "mfu": "m"}, 2
    )
    (drawn,) = figure.data
    assert len(drawn.x) <= figures.POINTS and list(drawn.y[:2]) == [x / 2 for x in drawn.x[:2]]


def test_bars_are_the_figures_of_the_evaluations(reported):
    run, _ = reported
    records = RunRecords.read(run.folder)
    bars = {bar.name: bar.y for bar in figures.action_errors(records.evaluations).data}
    assert bars["model"][0] == summarize(records)["action_mse"]
    assert bars["model, shuffle vision"][0] == summarize(records)["action_mse_shuffle_vision"]
    assert bars["ridge, non-visual"][0] == summarize(records)["action_mse_baselines"]["ridge"]
    trace = records.plain["examples"]["clip"]["traces"][0]
    shown = {item.name: item.y for item in figures.trace(records.plain["examples"]["clip"], {}, 1).data[:2]}
    assert list(shown["logged"]) == [row[1] for row in trace["true"]]
    assert list(shown["predicted"]) == [row[1] for row in trace["predicted"]]
