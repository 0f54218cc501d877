"""Writes what a person in the vehicle would say of one instant: the light, the land, landmarks and cars nearby.

Captions name what the images show and nothing that decides the next command: neither bends nor signals.
"""

import numpy as np

from mmoe.preparation.simulation.driver import Trajectory
from mmoe.preparation.simulation.world import World

# Metres ahead of the vehicle between which a thing is large enough to be named.
LANDMARK_RANGE = (-8.0, 24.0)
CAR_RANGE = (4.0, 32.0)
CAR_BEHIND_RANGE = (-20.0, -3.0)


def captions(world: World, trajectory: Trajectory, times_ns: np.ndarray) -> list[str]:
    """Write one caption of 10 to 16 words for each of the times, in ns of clip time.

    For example "grey sky, white snow, teal house left, blue tower right, white car ahead, black car behind"."""
    cars_x = trajectory.cars_at(times_ns)
    (own_x,) = trajectory.at(times_ns, "x")
    return [_caption(world, x, row - x) for x, row in zip(own_x, cars_x)]


def _caption(world: World, own_x: float, cars_ahead: np.ndarray) -> str:
    phrases = [f"{world.sky} sky", world.ground]
    for side in ("left", "right"):
        near = [item for item in world.landmarks if item.side == side and _within(item.x - own_x, LANDMARK_RANGE)]
        if near:
            item = min(near, key=lambda item: abs(item.x - own_x))
            phrases.append(f"{item.color} {item.kind} {side}")
    for limits, own_lane, other_lane in ((CAR_RANGE, "ahead", "oncoming"), (CAR_BEHIND_RANGE, "behind", "passed")):
        cars = [(abs(dx), car) for dx, car in zip(cars_ahead, world.cars) if _within(dx, limits)]
        if cars:
            car = min(cars, key=lambda pair: pair[0])[1]
            phrases.append(f"{car.color} car {own_lane if car.direction > 0 else other_lane}")
    return ", ".join(phrases)


def _within(value: float, limits: tuple[float, float]) -> bool:
    return limits[0] <= value <= limits[1]
