"""Generates the seeded world of a drive: a winding road, signal gantries, landmarks and other cars.

Frame: x along the road's general course, y to its left, z up, in meters; angles in radians, counterclockwise.
The road's center line is y = f(x), a sum of sinusoids of small slope, so that the lateral distance of any ground
point is one table look-up. Cars drive in the right lane, toward growing x; oncoming ones in the left.
"""

from dataclasses import dataclass
from math import cos, sin

import numpy as np

# Colors by the words captions use for them. Red and green belong to the signals alone.
RGB = {
    "yellow": (236, 214, 40),
    "blue": (38, 70, 214),
    "white": (240, 240, 240),
    "purple": (150, 40, 176),
    "teal": (0, 150, 150),
    "black": (20, 20, 24),
}
SKY_RGB = {
    "blue": (122, 178, 240),
    "grey": (168, 170, 174),
    "orange": (244, 156, 74),
    "pink": (240, 160, 190),
    "dark": (36, 38, 62),
}
GROUND_RGB = {
    "green grass": (96, 168, 70),
    "yellow corn": (214, 190, 96),
    "red earth": (180, 104, 76),
    "white snow": (222, 226, 232),
}
SOIL_RGB = (80, 54, 44)
LANDMARKS = ("house", "tower", "tree")
LANDMARK_COLORS = ("yellow", "blue", "white", "purple", "teal")
CAR_COLORS = ("yellow", "blue", "white", "purple", "black")

SIGNAL_RGB = {"red": (255, 20, 20), "amber": (255, 190, 0), "green": (20, 255, 40)}
SIGNALS = tuple(SIGNAL_RGB)

LANE = 3.5
TABLE_BEFORE, TABLE_AFTER, TABLE_STEP = 80.0, 120.0, 0.25  # metres the tables reach past both ends, and spacing


@dataclass(frozen=True)
class Road:
    """Holds the center line f(x) of a road, and tables of it at x = -TABLE_BEFORE + i * TABLE_STEP."""

    waves: tuple[tuple[float, float, float], ...]  # amplitude, wave number, phase
    center: np.ndarray  # f(x)
    heading: np.ndarray  # of the tangent
    curvature: np.ndarray  # signed, 1/m, left positive

    @classmethod
    def generate(cls, rng: np.random.Generator, length: float) -> "Road":
        """Draw a road that reaches from before x = 0 to beyond `length` meters."""
        wavenumber = 2 * np.pi / rng.uniform((24.0, 32.0, 46.0), (30.0, 42.0, 70.0))
        # Waves are drawn by the curvature they add, not by their height: short ones steer as much as long ones.
        curvature = rng.uniform((0.045, 0.02, 0.0), (0.06, 0.04, 0.01))
        amplitude = curvature / wavenumber**2
        phase = rng.uniform(0, 2 * np.pi, 3)
        x = np.arange(-TABLE_BEFORE, length + TABLE_AFTER, TABLE_STEP)
        angle = x[:, None] * wavenumber + phase
        slope = (amplitude * wavenumber * np.cos(angle)).sum(1)
        bend = -(curvature * np.sin(angle)).sum(1) / (1 + slope**2) ** 1.5
        waves = tuple(zip(amplitude.tolist(), wavenumber.tolist(), phase.tolist()))
        return cls(waves, (amplitude * np.sin(angle)).sum(1), np.arctan(slope), bend)

    def y(self, x: float) -> float:
        """Compute f(x), the y of the center line in meters, at one point, exactly."""
        return sum(a * sin(k * x + p) for a, k, p in self.waves)

    def slope(self, x: float) -> float:
        """Compute the slope f'(x) of the center line at one point."""
        return sum(a * k * cos(k * x + p) for a, k, p in self.waves)

    def row(self, x: np.ndarray) -> np.ndarray:
        """Return the row of the tables nearest to each x, clipped to their ends."""
        return np.clip(((x + TABLE_BEFORE) / TABLE_STEP + 0.5).astype(np.int32), 0, len(self.center) - 1)

    def place(self, x: np.ndarray, lateral: np.ndarray | float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Compute world x, y and road heading of points `lateral` meters left of the center line at x."""
        row = self.row(x)
        heading = self.heading[row]
        return x - lateral * np.sin(heading), self.center[row] + lateral * np.cos(heading), heading


@dataclass(frozen=True)
class Landmark:
    """Describes a thing that stands beside the road at `x` meters along it."""

    kind: str
    color: str
    x: float
    lateral: float  # metres left of the center line; negative is right

    @property
    def side(self) -> str:
        """The side of the road it stands on, as captions say it: left or right."""
        return "left" if self.lateral > 0 else "right"


@dataclass(frozen=True)
class Car:
    """Describes another car: `role` is ``lead`` (ahead in the own lane), ``oncoming`` or ``follower``."""

    role: str
    color: str
    x: float  # at clip time 0; a follower's is its distance behind
    speed: float  # m/s along x; a follower's is not used

    @property
    def lateral(self) -> float:
        """The distance left of the center line in meters; negative is right."""
        return LANE / 2 if self.role == "oncoming" else -LANE / 2

    @property
    def direction(self) -> int:
        """The sign of the car's motion along x."""
        return -1 if self.role == "oncoming" else 1


@dataclass(frozen=True)
class World:
    """Holds all that a recording's images show; gantries carry a signal over the road that drivers obey."""

    road: Road
    sky: str
    ground: str
    gantry_x: tuple[float, ...]
    gantry_signal: tuple[str, ...]
    landmarks: tuple[Landmark, ...]
    cars: tuple[Car, ...]

    @classmethod
    def generate(cls, rng: np.random.Generator, length: float) -> "World":
        """Generate a world for a drive of at most `length` meters from x = 0."""
        road = Road.generate(rng, length)
        gantry_x = _spaced(rng, -30.0, length + 60.0, 12.0, 17.0)
        landmarks = [
            Landmark(_pick(rng, LANDMARKS), _pick(rng, LANDMARK_COLORS), x, side * rng.uniform(11.0, 14.0))
            for side in (1, -1)
            for x in _spaced(rng, -40.0, length + 60.0, 17.0, 25.0)
        ]
        cars = []
        if rng.random() < 0.7:
            cars.append(Car("lead", _pick(rng, CAR_COLORS), rng.uniform(13.0, 22.0), rng.uniform(9.0, 12.0)))
        if rng.random() < 0.7:
            cars.append(Car("follower", _pick(rng, CAR_COLORS), rng.uniform(7.0, 12.0), 0.0))
        ahead = _spaced(rng, 15.0, length + 60.0, 25.0, 90.0)
        cars.extend(Car("oncoming", _pick(rng, CAR_COLORS), x, -9.0) for x in ahead)
        return cls(
            road,
            _pick(rng, tuple(SKY_RGB)),
            _pick(rng, tuple(GROUND_RGB)),
            tuple(gantry_x),
            tuple(_pick(rng, SIGNALS) for _ in gantry_x),
            tuple(landmarks),
            tuple(cars),
        )


def _pick(rng: np.random.Generator, choices: tuple[str, ...]) -> str:
    return choices[int(rng.integers(len(choices)))]


def _spaced(rng: np.random.Generator, start: float, stop: float, low: float, high: float) -> list[float]:
    """Points from `start` to `stop` whose spacing is uniform in [low, high)."""
    steps = rng.uniform(low, high, int((stop - start) / low) + 1)
    points = start + np.cumsum(steps) - steps[0] * rng.random()
    return points[points < stop].tolist()
