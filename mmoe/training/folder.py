"""Names the files of a run's folder, and deletes them where a run starts over."""

import re
import shutil
from contextlib import suppress
from pathlib import Path

import yaml

from mmoe.errors import ConfigError
from mmoe.files import writes

# All that this program writes into a run's folder; `start_over` deletes nothing else.
FILES = (
    r"config\.yaml",
    r"changes\.jsonl",
    r"provenance\.jsonl",
    r"metrics\.jsonl",
    r"metrics-undone\.jsonl",
    r"tracked-[\w.-]+\.json",
    r"quarantine\.jsonl",
    r"errors\.jsonl",
    r"hang-report[\w-]*\.(txt|partial)",
    r"evaluation.*\.json",
    r"baselines\.npz",
    r"summary\.json",
    r"report\.html",
    r"lock",
)
FOLDERS = {
    "checkpoints": r"step-\d+(\.partial|\.replaced|\.left)*|latest(\.partial)?",
    "tensorboard": r"events\.out\.tfevents\..*",
    "tables": r"\.?step-\d+\.parquet(\.[0-9a-f]{32})?",
    "wandb": r"(offline-)?run-.*|settings|debug.*\.log",
    "logs": r"rank-\d+\.log",
}
DELETED = "checkpoints.deleted"  # being deleted, in one step no longer the run's
_FILE = re.compile(rf"\.?({'|'.join(FILES)})(\.[0-9a-f]{{32}})?")  # as `write_atomically` names it meanwhile, too


def check_start_over(folder: Path) -> None:
    """Check that `folder` is missing, empty, or a run and nothing but a run; raises ConfigError where it is not."""
    if not folder.exists():
        return
    place, refusal = folder.resolve(), f"--fresh deletes nothing of training.run={folder}"
    here, home = Path.cwd().resolve(), Path.home().resolve()
    for what, other in (("the working folder", here), ("the home folder", home)):
        if place == other or place in other.parents:
            above = "" if place == other else "above "
            raise ConfigError(f"{refusal}, which is {place}, {above}{what}; set training.run to the folder of a run")
    if not place.is_dir():
        raise ConfigError(f"{refusal}, which is a file; set training.run to the folder of a run")
    runs = [path.name for path in sorted(place.iterdir()) if (path / "config.yaml").is_file()]
    if runs:
        raise ConfigError(f"{refusal}, which holds other runs ({_some(runs)}); set training.run to one of them")
    if strays := _strays(place):
        raise ConfigError(
            f"{refusal}, which holds what no run writes ({_some(strays)}); move it away, or set another training.run"
        )
    if any(place.iterdir()) and not _is_run(place):
        raise ConfigError(
            f"{refusal}, which is not a run (no metrics, no checkpoint, no config of one); delete it yourself"
        )


def start_over(folder: Path) -> None:
    """Delete the run in `folder`, all but its lock; raises ConfigError as `check_start_over`, and OutputError."""
    check_start_over(folder)
    if not folder.exists():
        return
    with writes(folder, "a part of the run may be deleted"):
        checkpoints, deleted = folder / "checkpoints", folder / DELETED
        if deleted.exists():
            shutil.rmtree(deleted)
        if checkpoints.exists():
            checkpoints.rename(deleted)  # one step: killed here, the run begins anew as it was told to
            shutil.rmtree(deleted)
        for path in folder.iterdir():
            if path.is_dir():
                for child in path.iterdir():
                    shutil.rmtree(child) if child.is_dir() else child.unlink()
                with suppress(OSError):  # another rank has just written to its log
                    path.rmdir()
            elif path.name != "lock":
                path.unlink()


def _strays(folder: Path) -> list[str]:
    """What is in `folder` and not of a run; links are not, wherever they lead."""
    found = []
    for path in sorted(folder.iterdir()):
        if path.is_symlink():
            found.append(f"{path.name}, a link to {path.readlink()}")
        elif path.is_dir():
            inside = FOLDERS.get("checkpoints" if path.name == DELETED else path.name)
            if inside is None:
                found.append(f"{path.name}/")
                continue
            children = sorted(path.iterdir())
            found += [f"{path.name}/{c.name}" for c in children if c.is_symlink() or not re.fullmatch(inside, c.name)]
        elif not _FILE.fullmatch(path.name):
            found.append(path.name)
    return found


def _is_run(folder: Path) -> bool:
    """Whether something in `folder` says that it is a run, be it one that failed before its first step."""
    names = {path.name for path in folder.iterdir()}
    if names & {"metrics.jsonl", "checkpoints", DELETED, "lock", "errors.jsonl"}:
        return True
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return names <= {"logs", "tensorboard", "tables"}
    except (yaml.YAMLError, ValueError, RecursionError):
        return True  # cut off by a crash
    return config is None or (isinstance(config, dict) and {"model", "training"} <= config.keys())


def _some(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
