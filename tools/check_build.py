"""What is published works: the wheel and the sdist install into empty environments and train a text model there.

Nothing but the core dependencies is installed; that none of the extras' packages came along is checked, too. The text
is that of `configs/text_moe.yaml`, trained whole. Takes two or three minutes, most of them pip's.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from mmoe.result import print_result

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs/text_moe.yaml"
INSTALLED = """
import json
from importlib import metadata
from pathlib import Path
import mmoe
files = sorted(str(file) for file in metadata.files("mmoe") if str(file).startswith("mmoe/") and file.suffix != ".pyc")
names = [each.metadata["Name"].lower().replace("_", "-") for each in metadata.distributions()]
others = [line for each in metadata.distributions() if each.metadata["Name"] != "mmoe" for line in each.requires or []]
found = {"at": str(Path(mmoe.__file__).parent), "files": files, "names": names, "others": others}
found["requires"] = metadata.requires("mmoe")
print(json.dumps(found))
"""


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """Run a command and return what it printed; its output is shown where it fails, which ends the script."""
    print("$", *(str(part) for part in command), flush=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # none but the installed
    done = subprocess.run(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        sys.exit(f"{done.stdout}\nexit status {done.returncode}")
    return done.stdout


def warned(output: str) -> list[str]:
    """List what a build has warned of, each once: warnings of Python, as setuptools and `build` write them down.

    What it says of the machine (`warning: byte-compiling is disabled`) is none.
    """
    return list(dict.fromkeys(re.findall(r"^WARNING .*|\b\w+Warning: .*", output, re.MULTILINE)))


def required(requirements: list[str], extra: bool) -> set[str]:
    """Name the packages that are required: by an extra, or always."""
    return {re.split(r"[^\w-]", line)[0].lower() for line in requirements if ("extra ==" in line) is extra} - {"mmoe"}


def train(mmoe: Path, folder: Path) -> list[float]:
    """Train the text model of `CONFIG` with the installed command; returns the loss of each record."""
    for source in yaml.safe_load(CONFIG.read_text())["data"]["sources"].values():
        (folder / source["input"]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / source["input"], folder / source["input"])
    run(mmoe, "train", CONFIG, "training.run=run", cwd=folder)
    records = (folder / "run/metrics.jsonl").read_text().splitlines()
    return [json.loads(record)["loss"] for record in records]


def main() -> int:
    """Build, install and train; returns the exit status."""
    (ROOT / "build").mkdir(exist_ok=True)  # on this disk: torch takes gigabytes
    with tempfile.TemporaryDirectory(dir=ROOT / "build", prefix="check-") as name:
        folder = Path(name)
        warnings = warned(run(sys.executable, "-m", "build", "--outdir", folder / "dist", ROOT))
        (wheel,), (sdist,) = (folder / "dist").glob("*.whl"), (folder / "dist").glob("*.tar.gz")
        run(sys.executable, "-m", "venv", folder / "venv")
        python, mmoe = folder / "venv/bin/python", folder / "venv/bin/mmoe"
        run(python, "-m", "pip", "install", "--quiet", wheel)
        from_wheel = json.loads(run(python, "-c", INSTALLED, cwd=folder))
        losses = train(mmoe, folder)
        run(python, "-m", "pip", "install", "--quiet", "--force-reinstall", "--no-deps", sdist)
        from_sdist = json.loads(run(python, "-c", INSTALLED, cwd=folder))
        run(mmoe, "--help", cwd=folder)
        brought = required(from_wheel["others"], extra=False)  # torch itself requires Jinja2
        extras = sorted(required(from_wheel["requires"], extra=True) & set(from_wheel["names"]) - brought)
        checks = {
            "warnings of the build": (warnings, not warnings),
            "imported from the environment": (from_wheel["at"], from_wheel["at"].startswith(str(folder / "venv"))),
            "packages of extras": (extras, not extras),
            "py.typed": ("mmoe/py.typed" in from_wheel["files"],) * 2,
            "files of the sdist beyond the wheel's": (
                sorted(set(from_sdist["files"]) ^ set(from_wheel["files"])),
                from_sdist["files"] == from_wheel["files"],
            ),
            "loss falls": (f"{losses[0]:.2f} -> {losses[-1]:.2f}", losses[-1] < 0.95 * losses[0]),
            "evaluation": ((folder / "run/evaluation.json").is_file(),) * 2,
        }
    values = {what: value for what, (value, _) in checks.items()}
    targets = {what: {"value": value, "ok": ok} for what, (value, ok) in checks.items()}
    print_result("build", values, targets)
    return 0 if all(target["ok"] for target in targets.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
