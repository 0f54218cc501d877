"""Prints the machine-readable ending of every script that measures something (benchmarks, experiments, tools)."""

import json
from typing import Any


def target(value: float, limit: float, *, at_most: bool = False) -> dict[str, Any]:
    """Compare a measured `value` with the `limit` it must reach (or stay under)."""
    return {"value": value, "target": limit, "ok": bool(value <= limit if at_most else value >= limit)}


def print_result(name: str, figures: dict[str, Any], targets: dict[str, dict[str, Any]]) -> None:
    """Print the last line of the script's output: ``RESULT {json}``."""
    print("RESULT " + json.dumps({"name": name, "figures": figures, "targets": targets}), flush=True)
