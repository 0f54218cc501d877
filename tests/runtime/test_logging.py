"""What the rooms say through `logging` reaches the terminal as text, and of rank 0 only."""

import io
import logging
import subprocess
import sys

import pytest

from mmoe.commands import console
from mmoe.runtime.logging import append, rank_log, set_up_logging
from tests.conftest import REPOSITORY


@pytest.fixture
def shown(monkeypatch):
    """(what stdout and stderr show, a logger of a room); the set-up of before is restored afterwards."""
    logger = logging.getLogger("mmoe")
    before, level = list(logger.handlers), logger.level
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(console, "console", console.Console(file=out, width=20))
    monkeypatch.setattr(console, "errors", console.Console(file=err, width=20))
    set_up_logging(console.show_record)
    yield out, err, logging.getLogger("mmoe.room")
    logger.handlers[:] = before
    logger.setLevel(level)


def test_warnings_go_to_stderr_and_the_rest_to_stdout_in_one_line_each(shown):
    out, err, logger = shown
    set_up_logging(console.show_record)  # a second time: nothing is said twice
    logger.debug("unasked")
    logger.info("a sentence that is longer than the terminal is wide")
    logger.warning("another one that is longer than the terminal")
    assert out.getvalue() == "a sentence that is longer than the terminal is wide\n"
    assert err.getvalue() == "another one that is longer than the terminal\n"


@pytest.mark.parametrize("name", ["\x1b[2J", "[bold]", ":car:", "\u202egnp.exe", "100% %s"], ids=ascii)
def test_a_name_that_is_logged_is_shown_as_it_is_and_not_obeyed(shown, name):
    out, err, logger = shown
    logger.info(f"source {name} is here")
    logger.warning(f"source {name} is there")
    assert out.getvalue() == f"source {console.printable(name)} is here\n"
    assert err.getvalue() == f"source {console.printable(name)} is there\n"


def test_half_a_surrogate_pair_in_a_name_is_shown_escaped():
    work = (  # a process of its own: pytest keeps what is logged, and cannot send such a string to another process
        "import logging; from mmoe.runtime.logging import set_up_logging; "
        "from mmoe.commands.console import show_record; set_up_logging(show_record); "
        "logging.getLogger('mmoe.room').info('source ' + chr(0xDCFF) + ' is here')"
    )
    done = subprocess.run([sys.executable, "-c", work], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "source \\udcff is here\n", done


def test_a_rank_that_is_not_the_first_is_silent_and_its_warnings_are_in_its_file(shown, tmp_path):
    out, err, logger = shown
    with rank_log(tmp_path, 3):
        logger.info("a thing")
        logger.warning("a worry")
    log = (tmp_path / "logs" / "rank-00003.log").read_text()
    assert not out.getvalue() and not err.getvalue()
    assert "WARNING mmoe.room a worry" in log and "a thing" not in log
    logger.info("again")
    assert out.getvalue() == "again\n"


def test_what_a_terminal_refuses_ends_the_command():
    work = (
        "import logging; from mmoe.commands import main as cli; from mmoe.commands.console import show_record; "
        "cli.set_up_logging(show_record); room = logging.getLogger('mmoe.room'); "
        "cli.app = lambda: [room.info('x' * 70) for _ in range(1000)]; cli.main()"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", work], cwd=REPOSITORY, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1 and done.stderr == "error No space left on device; make room, or name another folder\n"


def test_a_line_that_a_kill_has_cut_off_spoils_no_line_after_it(tmp_path):
    path = tmp_path / "logs" / "errors.jsonl"
    append(path, "one\n")
    with path.open("a") as file:
        file.write('{"tor')
    append(path, "two\nthree\n")
    append(path, "four\n")
    assert path.read_text().splitlines() == ["one", '{"tor', "two", "three", "four"]
