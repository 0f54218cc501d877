"""What `summary.json` says of a run, from its lines alone."""

import errno
import json
import math
import os

import pytest

from mmoe.errors import DataError, OutputError
from mmoe.monitoring.reader import RunReader
from mmoe.monitoring.summary import RunRecords, resume_exact, summarize, write_summary


def line(step: int, session: int = 0, **changes) -> dict:
    return {
        "step": step,
        "session": session,
        "positions": 100 * step,
        "tokens": 95 * step,
        "loss": 1.0 / step,
        "grad_norm": 0.5,
        "wall_seconds": 2.0 * step,
        "peak_memory_bytes": 10**9 + step,
    } | changes


def evaluation(mse: float, mode: str | None = None, shards: str | None = None) -> dict:
    return {
        "shards": shards,
        "ablation": {"mode": mode, "modality": "vision", "rows": {}, "left_out": {}} if mode else None,
        "samples": {"drive": {"held_out": 9, "evaluated": 9}},
        "not_evaluated": {},
        "action_mse": mse,
        "action_mse_baselines": {"mean": 0.5, "hold_last": 0.2, "ridge": 0.4},
        "actions": {},
        "examples": {},
        "retrieval": {"of": "drive/vision-text", "r1": 0.3, "r1_low": 0.2, "r5": 0.7, "pool": 64, "by": {}},
        "ranking": {},
        "val_ce": {"text": 1.0, "structure": 0.1},
        "unigram_ce": {"text": 2.0, "structure": 0.7},
        "ce_by_source": {},
    }


def write(folder, lines, **evaluations) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(item) + "\n" for item in lines))
    for name, content in evaluations.items():
        (folder / f"evaluation{name.replace('_', '-')}.json").write_text(json.dumps(content))


def test_it_holds_every_figure_and_is_what_is_written(tmp_path):
    plain, shuffled = evaluation(0.1), evaluation(0.6, "shuffle")
    write(
        tmp_path, [line(10), line(20)], **{"": plain, "_shuffle_vision": shuffled, "_on_x": evaluation(9.0, shards="x")}
    )
    summary = write_summary(tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert summary["packing_efficiency"] == pytest.approx(0.95)
    assert summary["action_mse"] == 0.1 and summary["action_mse_shuffle_vision"] == 0.6
    assert summary["action_mse_baselines"] == {"mean": 0.5, "hold_last": 0.2, "ridge": 0.4}
    assert {summary["retrieval"][key] for key in ("r1", "r1_low", "r5", "pool")} == {0.3, 0.2, 0.7, 64}
    assert summary["val_ce"]["text"] == 1.0 and summary["unigram_ce"]["text"] == 2.0
    assert summary["drop_rate"] is None and summary["resume_exact"] is None
    assert summary["tokens_per_second"] == pytest.approx(1900 / 40)
    assert summary["positions_per_second"] == pytest.approx(50)
    assert summary["mfu"] is None
    assert summary["peak_memory_bytes"] == 10**9 + 20
    assert summary["wall_seconds"] == 40.0
    assert not any("on_x" in key for key in summary)


def test_what_was_not_measured_is_null(tmp_path):
    write(tmp_path, [line(1)])
    summary = summarize(RunRecords.read(tmp_path))
    assert summary["action_mse"] is None and summary["val_ce"] is None
    assert summary["retrieval"] == {"r1": None, "r1_low": None, "r5": None, "pool": None}


def test_drops_are_a_share_of_all_choices_and_mfu_is_that_of_all_the_time_beside_its_peak(tmp_path):
    slow = line(1, mfu=0.4, mfu_peak_flops=1e12, positions_per_second=50)  # two seconds, then one
    fast = line(2, mfu=0.1, mfu_peak_flops=1e12, positions_per_second=100)
    write(tmp_path, [slow, fast | {"slots_routed": 100, "slots_dropped": 2}])
    summary = summarize(RunRecords.read(tmp_path))
    assert summary["drop_rate"] == 0.02
    assert (summary["mfu"], summary["mfu_peak_flops"]) == (pytest.approx(0.3), 1e12)


@pytest.mark.parametrize(
    ("undone", "exact"),
    [
        ([], None),
        ([line(20)], None),  # equal, but nothing says that the weights are
        ([line(20, digest="a")], True),
        ([line(20, digest="b")], False),
        ([line(20, digest="a", loss=math.nextafter(0.05, 1))], False),
        ([line(20, digest="a", grad_norm=0.6)], False),
        ([line(20, digest="a", grad_norm=math.nextafter(0.5, 1))], False),
        ([line(20, digest="a"), line(10, loss=0.2)], False),
        ([line(20, digest="a", loss=0.06, steps_averaged=7)], True),  # a mean over other steps
        ([line(20, digest="a", loss=0.06, grad_norm=0.6, steps_averaged=7)], False),
        ([line(20, digest="a", loss=0.06, steps_averaged=1)], False),  # as records of before were
        ([line(20, loss=0.06, steps_averaged=7), line(20, digest="a", loss=0.07)], False),  # one of them is comparable
        ([line(20, digest="a"), line(30, digest="c"), line(30, digest="d")], False),
        ([line(30, digest="c")], None),
        ([{"step": 20, "eval/ce": 1.0}, line(20, digest="a")], True),  # a record without a loss
    ],
)
def test_a_resume_is_exact_when_steps_done_twice_are_the_same_to_the_bit(tmp_path, undone, exact):
    write(tmp_path, [line(10), line(20, 1, digest="a")])
    (tmp_path / "metrics-undone.jsonl").write_text("".join(json.dumps(item) + "\n" for item in undone))
    assert resume_exact(RunReader(tmp_path)) is exact


def test_steps_after_a_change_on_record_are_no_repeat_of_those_before_it(tmp_path):
    write(tmp_path, [line(10), line(20, 1, digest="b")])
    (tmp_path / "metrics-undone.jsonl").write_text(json.dumps(line(20, digest="a")) + "\n")
    assert resume_exact(RunReader(tmp_path)) is False
    (tmp_path / "changes.jsonl").write_text(json.dumps({"step": 10, "key": "optim.lr.peak"}) + "\n")
    assert resume_exact(RunReader(tmp_path)) is None


def test_a_folder_without_steps_says_so(tmp_path):
    with pytest.raises(DataError, match="train it first"):
        write_summary(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(DataError, match="is empty"):
        write_summary(tmp_path)


def test_a_summary_that_the_disk_refuses_leaves_the_old_one(tmp_path, monkeypatch):
    write(tmp_path, [line(1)])
    before = write_summary(tmp_path)
    write(tmp_path, [line(1), line(2)])

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match="summary.json cannot be written .No space left on device"):
            write_summary(tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text()) == before
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "summary.json"}


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 20_000])
def test_an_evaluation_that_is_none_is_named(tmp_path, content):
    write(tmp_path, [line(1)])
    (tmp_path / "evaluation.json").write_text(content)
    with pytest.raises(DataError, match="evaluation.json .*delete it, or evaluate again"):
        write_summary(tmp_path)
