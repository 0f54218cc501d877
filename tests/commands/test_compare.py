"""Runs beside each other: what differs, at the steps that all recorded, whatever one of them lacks."""

import io
import json
import re

import pytest
from typer.testing import CliRunner

from mmoe.commands.compare import show_comparison
from mmoe.commands.console import Console
from mmoe.commands.main import app
from mmoe.errors import ConfigError
from mmoe.monitoring.comparison import Comparison, compare_runs

CONFIG = "data: {{sequence_length: 128}}\noptim: {{lr: {{peak: {peak}}}}}\ntraining: {{run: {run}, {steps}}}\n"
STEPS = "global_batch_positions: 256, budget_positions: 2560"


def write_run(folder, steps, peak=0.001, evaluation=True, **terms):
    folder.mkdir()
    (folder / "config.yaml").write_text(CONFIG.format(peak=peak, run=folder, steps=STEPS))
    records = [
        {"step": step, "loss": 8 / step, "loss_ce": 7 / step, "lr": peak, "grad_norm": 1.0, "tokens": 200 * step}
        | {"wall_seconds": step / 2, "peak_memory_bytes": 2**30}
        | {f"loss_{name}": value / step for name, value in terms.items()}
        for step in steps
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if evaluation:
        measured = {"ce_by_source": {"poem": {"text": {"ce": 1.5, "unigram": 2.5, "labels": 9}}}}
        (folder / "evaluation.json").write_text(json.dumps(measured))
    return folder


def mmoe(*arguments) -> str:
    done = CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "80"})
    if done.exception:
        raise done.exception
    return done.output


@pytest.fixture
def runs(tmp_path):
    """Two of equal length that differ in the rate, and one with other steps, another term and no evaluation."""
    return [
        write_run(tmp_path / "a", range(1, 11)),
        write_run(tmp_path / "b", range(1, 11), peak=0.002),
        write_run(tmp_path / "c", (3, 6, 7), evaluation=False, contrastive=4.0),
    ]


def test_only_keys_that_differ_and_every_figure_at_steps_of_all(runs):
    found = compare_runs(runs)
    assert found.config == {"optim.lr.peak": [0.001, 0.002, 0.001]}
    assert list(found.steps) == [3, 6, 7]
    assert found.steps[6] == {
        "loss": [8 / 6] * 3,
        "loss_ce": [7 / 6] * 3,
        "grad_norm": [1.0] * 3,
        "lr": [0.001, 0.002, 0.001],
        "loss_contrastive": [None, None, 4 / 6],
    }
    assert found.end["step"] == [10, 10, 7] and found.end["of_steps"] == [10] * 3
    assert found.end["tokens_per_second"] == [400.0] * 3 and found.end["seconds_per_step"] == [0.5] * 3
    assert found.evaluation["CE of text, poem"] == [1.5, 1.5, None]
    assert found.lacking == {str(runs[2]): [f"{runs[2]} has no evaluation; mmoe evaluate {runs[2]} makes one"]}
    assert list(compare_runs(runs[:2]).steps) == [1, 3, 5, 8, 10]


def test_the_table_fits_a_terminal_and_json_is_alone(runs):
    said = mmoe("compare", *runs)
    assert max(len(line) for line in said.splitlines() if line[0] in "┃│├└┏┡") <= 80
    line = next(line for line in said.splitlines() if "optim.lr.peak" in line)
    assert [cell.strip() for cell in line.strip("│").split("│")] == ["optim.lr.peak", "0.001", "0.002", "0.001"]
    assert f"3: {runs[2]}" in said and f"{runs[2]} has no evaluation" in said
    found = json.loads(mmoe("compare", *runs, "--json"))
    assert set(found) == {"runs", "config", "steps", "end", "evaluation", "lacking"}
    assert found["steps"]["6"]["loss_contrastive"] == [None, None, 4 / 6]


@pytest.mark.parametrize("number", [2, 4, 9])
def test_long_keys_and_values_fit_80_columns(number):
    columns = list(range(1, number + 1))
    long = {"data.sources.poem.options.prepare.heldout_share": [f"/a/long/path/to/shards/{n}" for n in columns]}
    rows = {"loss": [1 / n for n in columns]}
    console = Console(width=80, record=True, file=io.StringIO())
    show_comparison(Comparison([f"run{n}" for n in columns], long, {1: rows}, rows, rows, {}), console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert [cell.strip() for cell in re.findall("┃([^┃]*)", text.splitlines()[number + 1])][1:-1] == list(
        map(str, columns)
    )


def test_what_a_run_lacks_is_said_and_the_rest_is_compared(runs, tmp_path):
    (bare := tmp_path / "bare").mkdir()
    (bare / "checkpoints").mkdir()
    said = mmoe("compare", runs[0], bare)
    assert "bare/config.yaml does not exist" in said and "bare has no step to report" in said
    assert "no step was recorded by all" in said and "CE of text, poem" in said
    (runs[1] / "evaluation.json").write_text("[1")
    (runs[1] / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n{"step": 2, "lo')
    said = mmoe("compare", *runs[:2])
    assert "evaluation.json is not JSON" in said and "nan" in said
    assert json.loads(mmoe("compare", *runs[:2], "--json"))["steps"]["1"]["loss"] == [8.0, None]
    (runs[1] / "metrics.jsonl").write_text('nothing\n{"step": 2, "loss": 1}\n')
    assert "metrics.jsonl: line 1 is not JSON" in mmoe("compare", *runs[:2])


def test_an_evaluation_of_another_shape_is_named_and_the_others_are_compared(runs):
    (runs[1] / "evaluation.json").write_text('{"ce_by_source": {"poem": {"text": {"ce": 1.0}}}}')
    found = compare_runs(runs[:2])
    assert found.evaluation == {"CE of text, poem": [1.5, 1.0], "unigram CE of text, poem": [2.5, None]}
    (runs[1] / "evaluation-blank-audio.json").write_text('{"ce_by_source": {"poem": [1.0]}}')
    again = compare_runs(runs[:2])
    assert again.evaluation == found.evaluation
    assert f"{runs[1] / 'evaluation-blank-audio.json'} is no evaluation of this" in again.lacking[str(runs[1])][0]


@pytest.mark.parametrize(
    "bounds, said", [((10, 4), [10, 4, None]), ((None, 4), ["unbounded", 4, None]), ((4, 4), None)]
)
def test_how_much_was_measured_stands_beside_the_figures(runs, bounds, said):
    for run, bound, count in zip(runs, bounds, (7, 4), strict=False):
        measured = {"samples": {"poem": {"held_out": 7, "evaluated": count}}, "max_documents": bound}
        (run / "evaluation.json").write_text(json.dumps(measured))
    found = compare_runs(runs)
    assert found.evaluation["samples of poem"] == [7, 4, None]
    assert found.evaluation.get("max_documents") == said


def test_one_run_and_what_is_none_are_refused(runs, tmp_path):
    with pytest.raises(ConfigError, match="alone has nothing to be compared with"):
        mmoe("compare", runs[0])
    with pytest.raises(ConfigError, match="is not a run: it holds no config.yaml"):
        mmoe("compare", runs[0], tmp_path)
