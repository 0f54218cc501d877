"""Modules from outside the package: what they register is there for the config that names them, and for its process."""

import importlib
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, ValidationInfo

from mmoe.errors import ConfigError, brief


def import_extensions(names: Iterable[str], folders: Iterable[Path] = ()) -> tuple[str, ...]:
    """Import modules of these names and give names by which any process finds them again.

    A name is a module's, with its folder before it where that is not on the Python path: ``package.losses``,
    ``../shared/losses``. A name alone is first looked for in `folders` and in the current one. Relative folders are
    those of `folders`, in their order, or else of the current one. Raises ConfigError for a module that cannot be
    imported.
    """
    return tuple(_imported(name, [*folders, Path.cwd()]) for name in names)


def _imported(name: str, folders: list[Path]) -> str:
    folder, slash, module = name.rpartition("/")
    if not all(part.isidentifier() for part in module.split(".")) or module.endswith(".py"):
        raise ConfigError(f"extensions: {brief(name)} names no module; give one as import does, without .py")
    place = _place(folder + slash, module, folders)
    if place is None and slash:
        raise ConfigError(f"extensions: {brief(name)} is no module: {folder}/ has no {module}")
    if place is not None and str(place) not in sys.path:
        sys.path.append(str(place))  # last: nothing in it may stand in for an installed module
        importlib.invalidate_caches()
    try:
        found = importlib.import_module(module)
    except ConfigError:
        raise
    except Exception as error:  # a module may raise anything while it is imported
        raise ConfigError(
            f"extensions: {brief(name)} cannot be imported ({type(error).__name__}: {error}); give a module that lies "
            "beside the config, in the current folder or on the Python path, and mend or install what it lacks"
        ) from error
    if place is None:
        return name
    origin = Path(found.__file__ or next(iter(found.__path__)))
    if place.resolve() not in origin.resolve().parents:
        raise ConfigError(f"extensions: {brief(name)} is hidden by {origin}, a module of that name; rename it")
    return f"{place}/{module}"


def _place(folder: str, module: str, folders: list[Path]) -> Path | None:
    """The folder in which a module lies; None where it must be on the Python path."""
    path = module.replace(".", "/")
    for each in folders:
        place = Path(each, folder).absolute()
        if (place / f"{path}.py").is_file() or (place / path / "__init__.py").is_file():
            return place
    return None


def _validate(names: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
    folder = (info.context or {}).get("folder")
    return import_extensions(names, [] if folder is None else [folder])


Extensions = Annotated[tuple[str, ...], AfterValidator(_validate)]
"""Names of modules that are imported when a config is validated: before the fields after it."""
