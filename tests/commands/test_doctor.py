import io
import json
import os
from importlib import metadata

import psutil
import torch
from typer.testing import CliRunner

from mmoe.commands.console import Console
from mmoe.commands.doctor import machine, show_diagnosis, usable_cores
from mmoe.commands.main import app
from mmoe.optional import OPTIONAL_PACKAGES, status
from mmoe.preparation.prepare import PrepareConfig
from mmoe.recipe.config import RunConfig
from mmoe.runtime.memory import total_memory
from tests.conftest import REPOSITORY, load_script


def found() -> dict:
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert done.exit_code == 0
    return json.loads(done.stdout)


def test_every_package_that_a_config_can_ask_for_is_there_with_its_whole_reason() -> None:
    console, data = Console(width=300, record=True, file=io.StringIO()), found()
    show_diagnosis(data, console)
    text = console.export_text()
    assert metadata.version("torch") in text and metadata.version("torchaudio") in text
    assert {each["name"] for each in data["packages"]} == {n for n, p in OPTIONAL_PACKAGES.items() if p.key}
    for each in data["packages"]:
        line = next(line for line in text.splitlines() if f"│ {each['name']} " in line and each["key"] in line)
        said = status(each["name"])
        assert (said.reason or said.version) in line and each["available"] == said.available


def test_the_report_fits_80_columns_and_loses_nothing() -> None:
    console, data = Console(width=80, record=True, file=io.StringIO()), found()
    data["machine"]["interpreter"] = "/a/long/folder" * 9
    data["packages"][0] |= {"available": False, "reason": "not available because " + "x" * 90}
    show_diagnosis(data, console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    assert text.count("x") >= 90


def test_a_key_of_the_report_is_one_of_a_config_or_a_command() -> None:
    docs = load_script(REPOSITORY / "tools" / "check_docs.py")
    commands = docs.commands()
    for name, package in OPTIONAL_PACKAGES.items():
        if package.key.startswith("mmoe "):
            _, command, option, _ = package.key.split()
            assert option in commands[command], name
        elif package.key:
            key, _, value = package.key.partition(": ")
            first, *names = key.split(".")
            root, names = (PrepareConfig, names) if first == "prepare" else (RunConfig, [first, *names])
            assert docs.has_key(root, names) and value, name


def test_the_machine_is_this_one() -> None:
    facts = machine()
    assert 1 <= usable_cores() <= os.cpu_count()
    assert 0 < total_memory() <= psutil.virtual_memory().total
    assert ("GPU 0" in facts) == torch.cuda.is_available()
    assert f"{usable_cores()} usable" in facts["cores"] and "GiB" in facts["memory"]
