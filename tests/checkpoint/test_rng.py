import json
import random

import numpy as np
import torch

from mmoe.checkpoint.rng import capture_rng, restore_rng


def draw() -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),
        *np.random.rand(3).tolist(),
        float(np.random.standard_normal()),
        *torch.rand(3).tolist(),
        *torch.randn(17).tolist(),
    ]


def test_restored_generators_repeat_every_draw_through_json() -> None:
    draw()  # leaves a second Gaussian waiting in python's and numpy's generators
    state = json.loads(json.dumps(capture_rng()))
    first, second = draw(), draw()
    restore_rng(state)
    assert draw() == first and draw() == second and first != second
