"""Whatever a run saves, leaves and keeps: its newest checkpoints are there, and the one just saved is never deleted."""

from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import given, settings
from hypothesis import strategies as st

from mmoe.checkpoint.commit import LEFT, committed, go_back, path_of, set_aside
from mmoe.checkpoint.retention import retire
from tests.checkpoint.states import loaded, manager, state_of

STEPS = st.integers(0, 12)
ACTIONS = st.tuples(st.sampled_from(["save", "save", "save", "go_back"]), STEPS, st.integers(1, 4))


@given(st.lists(ACTIONS, max_size=12))
@settings(max_examples=25, deadline=None)
def test_the_newest_that_are_kept_are_always_whole_and_what_was_just_saved_stays(
    actions: list[tuple[str, int, int]],
) -> None:
    """Steps in any order, as after going back or beside another run; `keep` may change from save to save."""
    values: dict[int, int] = {}  # of the step that was last saved there
    with TemporaryDirectory() as folder:
        for number, (action, step, keep) in enumerate(actions):
            checkpoints = manager(Path(folder), keep)
            before, left = set(checkpoints.steps()), len(set_aside(checkpoints.folder))
            if action == "go_back":
                checkpoints.go_back(step)
                assert set(checkpoints.steps()) == {other for other in before if other <= step}
                continue
            values[step] = number
            checkpoints.save(step, state_of(number, size=1))
            after = set(checkpoints.steps())
            assert {step, *sorted(before | {step})[-keep:]} <= after <= before | {step}
            assert all(loaded(checkpoints, each, size=1) == values[each] for each in after)
            remaining = len(set_aside(checkpoints.folder))
            assert len(after) + remaining == min(len(before | {step}) + left, keep) + (
                step not in sorted(after)[-keep:]
            )
            assert after == before | {step} or remaining == 0  # what was set aside is deleted first
            assert {path.name for path in checkpoints.folder.iterdir()} == {
                path.name for path in [*committed(checkpoints.folder).values(), *set_aside(checkpoints.folder)]
            }


def test_of_what_was_set_aside_the_oldest_goes_first(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        path_of(tmp_path, step).mkdir()
    go_back(tmp_path, 10)
    path_of(tmp_path, 15).mkdir()
    retire(tmp_path, keep=4, saved=15)
    assert set_aside(tmp_path) == [path_of(tmp_path, 30, LEFT), path_of(tmp_path, 40, LEFT)]
    retire(tmp_path, keep=1, saved=15)
    assert committed(tmp_path) == {15: path_of(tmp_path, 15)} and set_aside(tmp_path) == []
