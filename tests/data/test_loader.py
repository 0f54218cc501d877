"""Decoding processes: batches come in order and once, whoever is late, dies or kills."""

import os
import re
import signal
import time

import numpy as np
import psutil
import pytest
import torch

from mmoe.data.load import loader
from mmoe.data.load.loader import RemoteTraceback, batches
from mmoe.data.load.workers import Activity, WorkerError, WorkerWatchdog
from mmoe.errors import DataError
from tests.data.streams import equal, stream, take, write_folders


class Dataset:
    """A plan is a list of words, each a sample: "late" takes a second, "segv" and "oom" end their worker, "once" only
    the first one (`mark` tells), "collate" ends it when no sample is in hand, "bug" raises. Others become tensors."""

    def __init__(self, activity, mark):
        self.activity, self.mark, self.known_bad = activity, mark, {}

    def __getitem__(self, plan):
        good = []
        for word in plan:
            place = (0, 0, hash_of(word))
            self.activity.say(f"decoding {word}", place)
            if place in self.known_bad:
                continue
            if word == "late":
                time.sleep(1.0)
            if word == "segv":
                os.kill(os.getpid(), signal.SIGSEGV)
            if word == "oom" or (word == "once" and not self.mark.exists()):
                self.mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if word == "exit":
                os._exit(3)
            if word == "bug":
                raise DataError("a bug in a sample")
            good.append(word)
        self.activity.say("collating")
        if plan == ["collate"]:
            os.kill(os.getpid(), signal.SIGKILL)
        return good, torch.tensor([hash_of(word) for word in good])


def hash_of(word):
    return int.from_bytes(word.encode()[:6], "little")


def loaded(plans, tmp_path, workers=1, seconds=60.0, bad=None):
    activity = Activity(workers)
    dataset = Dataset(activity, tmp_path / "mark")
    condemned = {} if bad is None else bad

    def condemn(place, how):
        dataset.known_bad[place] = how
        condemned[place] = how

    options = {"workers": workers, "prefetch": 2, "activity": activity, "watchdog_seconds": seconds}
    for words, tensor in batches(dataset, plans, condemn=condemn, **options):
        assert tensor.tolist() == [hash_of(word) for word in words]
        yield words


def test_the_watchdog_says_what_every_worker_is_doing(caplog, tmp_path):
    assert list(loaded([["a"], ["late"], ["b"]], tmp_path, seconds=0.3)) == [["a"], ["late"], ["b"]]
    assert re.search(r"no batch for \d+ s; worker 0 \(pid \d+, for \d+ s: decoding late\)", caplog.text)
    caplog.clear()
    plans = [["a"], ["b"]]
    assert list(loaded(plans, tmp_path, seconds=20.0)) == plans  # a worker alone may take a second to begin
    assert "no batch for" not in caplog.text


def test_a_watchdog_speaks_again_and_ends_with_its_loader(caplog):
    dog = WorkerWatchdog(0.1, Activity(1))
    with dog.waiting():
        time.sleep(0.5)
    dog.close()
    assert caplog.text.count("worker 0 (has not begun)") >= 2
    assert not dog._thread.is_alive()


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("word, how", [("segv", "SIGSEGV"), ("exit", "exit code 3"), ("oom", "SIGKILL")])
def test_a_sample_that_ends_its_worker_is_left_out_and_nothing_else_changes(tmp_path, workers, word, how, caplog):
    plans = [[f"{i}a", f"{i}b"] for i in range(12)]
    plans[3] = ["3a", word, "3b"]
    plans[7] = [word, "7b"]
    bad = {}
    found = list(loaded(plans, tmp_path, workers, bad=bad))
    assert found == [[w for w in plan if w != word] for plan in plans]
    assert list(bad) == [(0, 0, hash_of(word))] and how in bad[0, 0, hash_of(word)]
    said = caplog.text
    assert said.count(f"decoding {word}") >= (2 if word == "oom" else 1)  # what came from outside is tried once more


def test_a_worker_that_was_killed_once_costs_no_sample(tmp_path):
    bad = {}
    plans = [["a"], ["once"], ["b"], ["c"]]
    assert list(loaded(plans, tmp_path, 2, bad=bad)) == plans and not bad


def test_a_death_that_no_sample_explains_ends_the_run_with_what_was_done(tmp_path):
    with pytest.raises(WorkerError, match="ended by itself.*SIGKILL.*data.prefetch.*collating"):
        list(loaded([["a"], ["collate"], ["b"]], tmp_path))


def test_a_worker_that_hangs_in_its_start_is_started_again_and_costs_nothing(tmp_path, monkeypatch, caplog):
    """A fork may take along a lock that a thread held: Python's list of threads, an allocator's, a library's."""
    work = loader._work

    def hang_once(dataset, number, *rest):
        mark = tmp_path / f"hung-{number}"
        if not mark.exists():
            mark.touch()
            time.sleep(600)
        work(dataset, number, *rest)

    monkeypatch.setattr(loader, "_work", hang_once)
    monkeypatch.setattr(loader, "_BEGIN_S", 3.0)
    monkeypatch.setattr(loader, "_LOOK_S", 0.1)
    # plans that no connection holds: to send them to one that does not read would never end
    plans = [[f"{number} {'-' * 300_000}"] for number in range(6)]
    assert list(loaded(plans, tmp_path, workers=2)) == plans
    assert caplog.text.count("did not begin within 3 s") == 2

    monkeypatch.setattr(loader, "_work", lambda *_: time.sleep(600))
    monkeypatch.setattr(loader, "_BEGIN_S", 0.1)
    with pytest.raises(WorkerError, match=r"worker \d did not begin within 0.1 s of any of 4 starts.* data.workers=0"):
        list(loaded(plans, tmp_path, workers=2))


def test_what_a_worker_raises_is_raised_here_as_it_is(tmp_path):
    arriving = loaded([["a"], ["bug"]], tmp_path)
    assert next(arriving) == ["a"]
    with pytest.raises(DataError) as caught:
        next(arriving)
    assert str(caught.value) == "a bug in a sample" and isinstance(caught.value.__cause__, RemoteTraceback)
    assert "__getitem__" in str(caught.value.__cause__)


def test_plans_are_taken_no_further_ahead_than_asked(tmp_path):
    asked = []

    def plans():
        for number in range(40):
            asked.append(number)
            yield [str(number)]

    arriving = loaded(plans(), tmp_path, workers=2)
    for number in range(20):
        assert next(arriving) == [str(number)]
        assert len(asked) <= number + 4


def test_workers_end_with_their_loader_and_outlive_a_signal_to_all(tmp_path):
    before = {child.pid for child in psutil.Process().children()}
    arriving = loaded([[str(i)] for i in range(20)], tmp_path, workers=2)
    next(arriving)
    mine = [child for child in psutil.Process().children() if child.pid not in before]
    assert len(mine) == 2
    for child in mine:
        child.send_signal(signal.SIGTERM)  # as a scheduler ends a job: the step in progress is finished first
        child.send_signal(signal.SIGINT)
    assert [next(arriving) for _ in range(10)][-1] == ["10"]
    assert all(child.is_running() for child in mine)
    arriving.close()
    assert not any(child.is_running() for child in mine)


# with the stream


class Deadly:
    """A decoder that ends its process on some rows, as a crash in a video library does."""

    def __init__(self, decoder, rows, number=signal.SIGSEGV):
        self.decoder, self.rows, self.number = decoder, rows, number

    def __call__(self, ref, *rest):
        if (int(ref.source), int(ref.shard), int(ref.row)) in self.rows:
            os.kill(os.getpid(), self.number)
        return self.decoder(ref, *rest)

    def __getattr__(self, name):
        return getattr(self.__dict__["decoder"], name)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_folders(tmp_path_factory.mktemp("sources"))


def deadly(folders, rows, run, number=signal.SIGSEGV, **choices):
    data = stream(folders, workers=2, error_budget=1.0, quarantine=run / "quarantine.jsonl", **choices)
    data.dataset.decoder = Deadly(data.dataset.decoder, rows, number)
    return data


def test_a_crash_in_a_decoder_becomes_padding_and_every_other_batch_stays_bit_for_bit(folders, tmp_path):
    clean = take(stream(folders), 8)
    documents = [d[:3] for batches, _, _ in clean[2:5] for batch in batches for s in batch.documents for d in s]
    rows = {tuple(map(int, d)) for d in documents[:: len(documents) // 2]}
    assert len(rows) >= 2
    data = deadly(folders, rows, tmp_path)
    lost, untouched = [], 0
    for (left, a, before), (right, b, after) in zip(clean, take(data, 8), strict=True):
        assert (a.columns == b.columns).all() and before["plan"] == after["plan"]
        for x, y in zip(left, right, strict=True):
            lost += [item for item in y.quarantined if "SIGSEGV" in item.reason]
            untouched += not y.quarantined
            if not y.quarantined:
                assert equal(x, y)
            held = y.valid
            assert torch.equal(x.token_ids[held], y.token_ids[held]) and torch.equal(x.labels[held], y.labels[held])
            gone = {tuple(map(int, d[:3])) for s in x.documents for d in s} & rows
            assert len(gone) == len({(item.source, item.row) for item in y.quarantined})
    assert untouched and {(item.source, item.row) for item in lost} == {(source, row) for source, _, row in rows}
    assert sum(data.quarantine.lost.values()) == len(lost)

    # A restart reads which samples those were: no worker dies again, and the batches are the same.
    again = deadly(folders, rows, tmp_path)
    assert set(again.dataset.known_bad) == rows
    again.restore(take(stream(folders), 2)[1][2])
    resumed = take(again, 3)
    whole = take(deadly(folders, rows, tmp_path / "other"), 5)
    for (left, _, a), (right, _, b) in zip(whole[2:], resumed, strict=True):
        assert a["plan"] == b["plan"] and all(equal(x, y) for x, y in zip(left, right, strict=True))


def test_a_file_of_lost_samples_that_a_kill_cut_off_is_read_as_far_as_it_goes(folders, tmp_path):
    rows = {(0, 0, number) for number in range(3)}
    take(deadly(folders, rows, tmp_path), 8)
    path = tmp_path / "quarantine.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) > 1
    path.write_bytes(b"".join(lines)[:-20] + b"\xff")
    assert 0 < len(stream(folders, quarantine=path).dataset.known_bad) <= len(lines)


def test_crashes_count_against_the_budget(folders, tmp_path):
    data = deadly(folders, {(0, shard, row) for shard in range(9) for row in range(40)}, tmp_path)
    data.quarantine.budget = 0.01
    with pytest.raises(DataError, match="source text: .*error_budget.*ended its process .*SIGSEGV"):
        take(data, 60)


class Raises(Deadly):
    def __call__(self, ref, *rest):
        if (int(ref.source), int(ref.shard), int(ref.row)) in self.rows:
            raise self.number
        return self.decoder(ref, *rest)


@pytest.mark.parametrize("error", [ValueError("odd"), MemoryError("no room"), np.exceptions.AxisError("x")], ids=repr)
def test_whatever_a_decoder_raises_is_counted_with_its_kind_and_place(folders, error):
    rows = {(0, shard, row) for shard in range(9) for row in range(40)}
    data = stream(folders, error_budget=1.0)
    data.dataset.decoder = Raises(data.dataset.decoder, rows, error)
    items = [item for batches, _, _ in take(data, 4) for batch in batches for item in batch.quarantined]
    assert items and all(
        re.match(rf"{type(error).__name__}: .*\(test_loader.py, line \d+, in", i.reason) for i in items
    )
    data = stream(folders, error_budget=1.0)
    data.dataset.decoder, data.dataset.strict = Raises(data.dataset.decoder, rows, error), True
    with pytest.raises(DataError, match=f"text/train/shard-.*cannot be decoded: {type(error).__name__}"):
        take(data, 4)
