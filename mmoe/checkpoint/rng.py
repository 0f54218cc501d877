"""Saves and restores the random states of this process, as JSON: python, numpy, torch, and its current CUDA device."""

import base64
import random
from typing import Any

import numpy as np
import torch


def capture_rng() -> dict[str, Any]:
    """Return a snapshot of all random states, which `restore_rng` takes back bit for bit."""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "python": [version, list(words), gauss],
        "numpy": [_pack(np.asarray(keys)), int(position), int(has_gauss), float(cached)],
        "torch": _pack(torch.get_rng_state().numpy()),
    }
    if torch.cuda.is_available():
        state["cuda"] = _pack(torch.cuda.get_rng_state().numpy())
    return state


def restore_rng(state: dict[str, Any]) -> None:
    """Restore every random generator from `state`, which `capture_rng` gave.

    A CUDA state is taken back where there is a CUDA device; a run that moves between devices is not bit-exact
    for other reasons than its random numbers.
    """
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", _unpack(keys, np.uint32), position, has_gauss, cached))
    torch.set_rng_state(torch.from_numpy(_unpack(state["torch"], np.uint8)))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.from_numpy(_unpack(state["cuda"], np.uint8)))


def _pack(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode("ascii")


def _unpack(text: str, dtype: type) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype).copy()
