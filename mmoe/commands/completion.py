"""Proposes kinds and configs to the shell, which asks for them while a command is typed."""

from pathlib import Path

from mmoe.commands.arguments import AUTO


def complete_kind(incomplete: str) -> list[str]:
    """Name the kinds of sources that begin so."""
    from mmoe.preparation.sources import SOURCES

    return [kind for kind in SOURCES.kinds() if kind.startswith(incomplete)]


def complete_kind_or_auto(incomplete: str) -> list[str]:
    """Name the kinds of sources that begin so, and the word for the one that fits."""
    return [*([AUTO] if AUTO.startswith(incomplete) else []), *complete_kind(incomplete)]


def complete_config(incomplete: str) -> list[str]:
    """Name the YAML files and the folders that begin so; hidden ones where a dot is typed."""
    folder, slash, name = incomplete.rpartition("/")
    try:
        found = sorted(Path(f"{folder}{slash}" or ".").iterdir())
    except OSError:  # there is no such folder
        return []
    shown = [path for path in found if path.name.startswith(name) and (name or not path.name.startswith("."))]
    chosen = [path for path in shown if path.is_dir() or path.suffix in (".yaml", ".yml")]
    return [f"{folder}{slash}{path.name}{'/' if path.is_dir() else ''}" for path in chosen]
