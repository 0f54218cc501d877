"""The report on clocks: the measured figures of a real segment, and made clocks whose faults are known."""

import re
from collections import Counter

import numpy as np
import pytest
from typer.testing import CliRunner

from mmoe.commands.main import app
from mmoe.errors import DataError
from mmoe.preparation import clock_report
from mmoe.preparation.clock_report import COLUMNS, measure_clocks, report_rows
from mmoe.preparation.prepare import prepare
from mmoe.preparation.slices import Clocks
from mmoe.reporting.clock_page import render_clock_page
from mmoe.tokenizers.text import TextConfig
from tests.data.recordings import drive_records, write_tub
from tests.data.recordings_driving import write_nuscenes
from tests.preparation.sources.test_comma2k19 import REAL

MS = 1_000_000


def prepared(kind, source, folder, **options):
    prepare(kind, source, folder, text_tokenizer=TextConfig().build(), options=options)
    return folder


def measured(streams, reference="front", kind="captured", **more):
    logs = [Clocks("log", kind, reference, {name: np.asarray(t, np.int64) for name, t in streams.items()}, **more)]
    report = clock_report.measure_clocks(logs, "made", Counter())
    return {stream.name: stream for stream in report.streams}


FRAMES = np.arange(100) * 50 * MS


def test_a_drifting_clock_has_its_slope_also_beyond_half_a_period():
    streams = measured({"front": FRAMES, "back": (FRAMES * (1 + 300e-6)).astype(np.int64) + 7 * MS})
    assert streams["back"].drift == pytest.approx(300, rel=1e-3)
    assert streams["back"].drift_ms == pytest.approx(300e-6 * (FRAMES[-1]) / MS, rel=0.05)
    long = np.arange(4000) * 50 * MS
    fast = measured({"front": long, "imu": (np.arange(20001) * 10 * MS * (1 + 2e-4)).astype(np.int64)})["imu"]
    assert fast.drift == pytest.approx(200, rel=0.01) and fast.drift_ms == pytest.approx(40, rel=0.01)
    assert measured({"front": FRAMES, "can": np.arange(400) * 12 * MS})["can"].drift is None  # 83 to 20 Hz: a beat


def test_gaps_repeats_and_runs_backwards_are_counted():
    times = np.delete(np.arange(100) * 10 * MS, slice(40, 50))
    stream = measured({"front": FRAMES, "imu": times})["imu"]
    assert (stream.gaps, stream.longest_gap, stream.repeats, stream.backwards) == (1, 110.0, 0, 0)
    assert (stream.start, stream.end) == (0, 990 - 4950)
    bad = times.copy()
    bad[5], bad[70] = bad[4], bad[60]
    stream = measured({"front": FRAMES, "imu": bad})["imu"]
    assert (stream.repeats, stream.backwards) == (1, 1)


def test_offsets_are_of_the_nearest_reading_by_brute_force():
    rng = np.random.default_rng(0)
    frames, other = np.sort(rng.integers(0, 10**9, (2, 60)))
    stream = measured({"front": np.unique(frames), "radar": np.repeat(other, 2)})["radar"]
    inside = [t for t in frames.tolist() if other[0] <= t <= other[-1]]
    distance = [min(abs(o - t) for o in other.tolist()) / MS for t in inside]
    np.testing.assert_allclose(np.abs(stream.offsets), distance)
    everywhere = [min(abs(o - t) for o in other.tolist()) <= MS for t in frames.tolist()]
    assert stream.within_1ms == pytest.approx(np.mean(everywhere)) and stream.bursts


def test_a_stream_that_a_log_lacks_is_named():
    logs = [
        Clocks("a", "captured", "front", {"front": FRAMES, "imu": FRAMES}),
        Clocks("b", "captured", "front", {"front": FRAMES}),
    ]
    report = clock_report.measure_clocks(logs, "made", Counter())
    assert "absent in 1 of 2 logs" in clock_report.report_rows(report)[1][-1]
    assert report.streams[1].within_1ms == 0.5 and report.streams[1].readings == 100


def cells(output):
    """The blocks of the printed table: column -> value, by stream."""
    blocks, name = {}, ""
    for line in output.splitlines():
        if match := re.fullmatch(r"│ (.*?) +│ (.*?) +│", line.rstrip()):
            if match[1] == "stream":
                name = match[2]
            blocks.setdefault(name, {})[match[1]] = match[2]
    return blocks


@pytest.mark.real_data
def test_the_figures_of_the_real_segment_whole_although_it_was_cut_and_split(shared_data, tmp_path):
    """As measured by others of this segment: shared/data-formats.md."""
    raw = shared_data / "driving_log"
    folder = prepared("comma2k19", raw, tmp_path / "comma")
    pages = []
    for arguments in ([str(folder)], [str(raw), "--kind", "comma2k19"]):
        result = CliRunner().invoke(app, ["clock-report", *arguments, "--html", str(tmp_path / "page.html")])
        assert result.exit_code == 0, result.output
        pages.append(cells(result.output))
        html = (tmp_path / "page.html").read_text()
        assert "<script>" in html and "104.264" in html and not re.search(r"<(script|link)[^>]+(src|href)=", html)
    assert pages[0] == pages[1]
    page = pages[0]
    assert page["front"]["rate Hz"] == "20.000" and page["front"]["readings"] == "1,200"
    for name in ("accelerometer", "gyro"):
        assert page[name]["rate Hz"] == "104.264" and page[name]["readings"] == "6,256"
        assert page[name]["within 1 ms"] == "20.8%" and page[name]["jitter sd ms"] == "0.014"
        assert page[name]["start ms"] == "+32.5"
    assert page["steering_angle"]["rate Hz"] == "82.901" and page["steering_angle"]["readings"] == "4,974"
    assert page["steering_angle"]["within 1 ms"] == "14.1%"
    low, high = re.search(r"\((.*)\.\.(.*)\)", page["steering_angle"]["interval ms median (p1..p99)"]).groups()
    assert 3.5 < float(low) < 4.5 and 22.5 < float(high) < 23.5
    assert page["speed"]["start ms"] == "+42.0" and page["steering_angle"]["start ms"] == "+37.5"
    assert page["radar"]["within 1 ms"] == "0.0%" and page["radar"]["remarks"] == "in bursts, 3,937 repeated times"
    assert REAL not in page


def test_made_times_are_said_to_be_made(tmp_path):
    write_tub(tmp_path / "tub", drive_records(60))
    folder = prepared("donkeycar", tmp_path / "tub", tmp_path / "out")
    result = CliRunner().invoke(app, ["clock-report", str(folder), "--html", str(tmp_path / "p.html")])
    words = " ".join(result.output.split())
    assert result.exit_code == 0 and clock_report.SYNTHETIC in words
    assert cells(result.output)["front"]["rate Hz"] == "20.000"
    assert cells(result.output)["front"]["readings"] == "60"  # one run, put together from its clips
    assert clock_report.SYNTHETIC in (tmp_path / "p.html").read_text()


def test_captured_times_are_not_said_to_be_made(tmp_path):
    write_nuscenes(tmp_path / "raw", scenes=3)
    report = clock_report.report_prepared(
        prepared("nuscenes", tmp_path / "raw", tmp_path / "out", prepare={"heldout_share": 0.4})
    )
    assert report.kind == "captured" and report.logs == 3 and clock_report.SYNTHETIC not in render_clock_page(report)
    streams = {stream.name: stream for stream in report.streams}
    assert streams["CAM_FRONT_LEFT"].start == pytest.approx(-42.6) and streams["CAM_FRONT"].readings == 18
    assert streams["ms_imu"].rate_hz == pytest.approx(100)


def test_what_has_no_clock_or_cannot_be_read_is_said_so(tmp_path):
    (tmp_path / "texts").mkdir()
    for name in "abcdefgh":
        (tmp_path / "texts" / f"{name}.txt").write_text(f"text {name} " * 40)
    folder = prepared("text", tmp_path / "texts", tmp_path / "out")
    with pytest.raises(DataError, match="holds no sample with clocks.npz.*kind text"):
        clock_report.report_prepared(folder)
    with pytest.raises(DataError, match="gives no sample with a clock as text"):
        clock_report.report_raw("text", tmp_path / "texts")
    write_nuscenes(tmp_path / "raw", scenes=2)
    for file in (tmp_path / "raw" / "can_bus").glob("scene-0001_pose*"):
        file.write_text("[{}]")
    report = clock_report.report_raw("nuscenes", tmp_path / "raw")
    assert report.logs == 1 and report.unreadable == {"unreadable log": 2}
    assert "unreadable log: 2" in render_clock_page(report)


def test_what_a_stream_has_not_is_a_dash_and_not_zero():
    """One reading has no rate and no interval; one beyond all references has no offset; none has nothing."""
    reference = np.arange(5, dtype=np.int64) * 100 * MS
    times = {"front": reference, "once": reference[:1], "never": reference[:0]}
    report = measure_clocks([Clocks("a", "captured", "front", times)], "x", Counter())
    lines = {line[0]: dict(zip(COLUMNS, line)) for line in report_rows(report)}
    absent = ("rate Hz", "interval ms median (p1..p99)", "jitter sd ms", "gaps (longest ms)")
    assert {lines["once"][name] for name in absent} == {"-"} and lines["once"]["start ms"] == "+0.0"
    kept = ("stream", "readings", "within 1 ms", "remarks")
    assert {value for name, value in lines["never"].items() if name not in kept} == {"-"}
    assert lines["front"]["rate Hz"] == "10.000"
    assert "- Hz" in render_clock_page(report)


def test_damaged_clocks_are_an_error_that_names_the_member():
    data = Clocks("a", "captured", "front", {"front": np.arange(5, dtype=np.int64)}).to_bytes()
    assert Clocks.from_bytes(data).times_ns["front"].tolist() == [0, 1, 2, 3, 4]
    for damaged in (b"", data[:100], data[:60] + b"\xff" * 9 + data[69:]):
        with pytest.raises(DataError, match="k.clocks.npz cannot be read as a set of"):
            Clocks.from_bytes(damaged, "k.clocks.npz")
