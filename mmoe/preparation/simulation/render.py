"""Draws images of the world by six pinhole cameras, in numpy.

The ground is drawn by inverse projection: each pixel's ray meets the plane z = 0 at a point that is fixed in the
vehicle's frame, so a frame is a rotation, a table look-up of the road and a palette. Everything that stands up is a
flat part (a trapezoid that faces the camera), painted from far to near.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import pi, radians, tan

import numpy as np

from mmoe.preparation.simulation.driver import Trajectory
from mmoe.preparation.simulation.world import (
    GROUND_RGB,
    LANE,
    RGB,
    SIGNAL_RGB,
    SKY_RGB,
    SOIL_RGB,
    TABLE_BEFORE,
    TABLE_STEP,
    World,
)
from mmoe.schema.sample import Camera


@dataclass(frozen=True)
class Mount:
    """Says where a camera sits on the vehicle (meters ahead of and left of its origin), where it looks, how wide."""

    forward: float
    left: float
    yaw: float
    field_of_view: float  # horizontal, radians


RIG = {
    Camera.FRONT: Mount(1.0, 0.0, 0.0, radians(70)),
    Camera.FRONT_LEFT: Mount(0.8, 0.4, radians(55), radians(70)),
    Camera.FRONT_RIGHT: Mount(0.8, -0.4, radians(-55), radians(70)),
    Camera.BACK: Mount(-1.0, 0.0, pi, radians(80)),
    Camera.BACK_LEFT: Mount(-0.4, 0.4, radians(112), radians(70)),
    Camera.BACK_RIGHT: Mount(-0.4, -0.4, radians(-112), radians(70)),
}
CAMERA_HEIGHT = 1.7
HORIZON = 0.46  # share of the image above it
SIGHT = 70.0  # metres; ground beyond it is one tone
HAZE = 110.0  # metres over which colors fade to 1/e
LEVELS = 8  # steps of haze on the ground, and of the sky's gradient
NIGHT = 0.6  # brightness under a dark sky


@dataclass(frozen=True)
class Rays:
    """Says where a camera's pixels meet the flat ground: [P] pixels of the rows below the horizon, row by row."""

    focal: float
    horizon: float  # row of the horizon
    first_row: int  # of the ground
    x: np.ndarray  # [P] metres ahead of the vehicle's origin
    y: np.ndarray  # [P] metres left of it
    haze: np.ndarray  # [P] i32 level
    sky: np.ndarray  # [first_row] i32 level


@lru_cache(maxsize=32)
def rays(camera: Camera, height: int, width: int) -> Rays:
    """Compute where the pixels of a camera below its horizon meet the ground, and how hazy it is there."""
    mount = RIG[camera]
    focal = width / 2 / tan(mount.field_of_view / 2)
    horizon = height * HORIZON
    first_row = int(horizon) + 1
    down = (np.arange(first_row, height) + 0.5 - horizon) / focal
    right = (np.arange(width) + 0.5 - width / 2) / focal
    depth = np.minimum(CAMERA_HEIGHT / down, SIGHT)[:, None] * np.ones(width)
    across = -right * depth  # positive to the left
    x = mount.forward + np.cos(mount.yaw) * depth - np.sin(mount.yaw) * across
    y = mount.left + np.sin(mount.yaw) * depth + np.cos(mount.yaw) * across
    haze = (1 - np.exp(-depth / HAZE)) * LEVELS
    return Rays(
        focal=focal,
        horizon=horizon,
        first_row=first_row,
        x=x.ravel().astype(np.float32),
        y=y.ravel().astype(np.float32),
        haze=haze.ravel().astype(np.int32),
        sky=(np.arange(first_row) * LEVELS // first_row).astype(np.int32),
    )


# Ground classes by metres left of the center line; land on the left is light, on the right it is ploughed and dark.
_LAND, _LAND_SHADED, _SOIL, _SOIL_SHADED, _ASPHALT, _MARKING, _GROUNDS = range(7)
_BINS_PER_METRE, _BINS = 10, 128


def _ground_codes() -> np.ndarray:
    """Palette rows without haze [strip along the road * _BINS + lateral bin], where strip = 2 * dash + shaded."""
    lateral = (np.arange(_BINS) + 0.5 - _BINS / 2) / _BINS_PER_METRE
    marked = (np.abs(lateral) > LANE - 0.2) & (np.abs(lateral) < LANE + 0.3)
    codes = []
    for dash in (False, True):
        for shaded in (False, True):
            land = np.where(lateral > 0, _LAND, _SOIL) + shaded
            road = np.where(dash & (np.abs(lateral) < 0.2), _MARKING, _ASPHALT)
            codes.append(np.where(marked, _MARKING, np.where(np.abs(lateral) < LANE, road, land)))
    return np.concatenate(codes).astype(np.int32) * LEVELS


_GROUND_CODES = _ground_codes()


@dataclass(frozen=True)
class Part:
    """Describes a flat trapezoid that faces the camera: half widths at `bottom` and `top`, heights `low` and `high`.

    `rear` is its color seen along the thing's heading, `front` against it; `lit` parts shine in the dark.
    """

    color: tuple[int, int, int]
    bottom: float
    top: float
    low: float
    high: float
    across: float = 0.0
    front: tuple[int, int, int] | None = None
    lit: bool = False


_DARK, _GREY, _WOOD, _LAMP = (40, 36, 36), (110, 110, 112), (92, 62, 40), (255, 250, 210)


def _car(color: str) -> list[Part]:
    rgb = RGB[color]
    lights = [Part((255, 0, 0), 0.2, 0.2, 0.6, 0.9, side, front=_LAMP, lit=True) for side in (-0.75, 0.75)]
    return [
        Part(_DARK, 0.9, 0.9, 0.0, 0.3),
        Part(rgb, 1.0, 1.0, 0.3, 1.1),
        Part(rgb, 0.9, 0.75, 1.1, 1.7),
        Part(_DARK, 0.7, 0.6, 1.15, 1.5),
        *lights,
    ]


def _landmark(kind: str, color: str) -> list[Part]:
    rgb = RGB[color]
    if kind == "house":
        return [Part(rgb, 4.0, 4.0, 0.0, 6.0), Part(_DARK, 4.6, 1.0, 6.0, 8.5), Part(_DARK, 0.8, 0.8, 0.0, 2.2)]
    if kind == "tower":
        return [Part(rgb, 2.0, 2.0, 0.0, 13.0), Part(_GREY, 2.4, 2.4, 13.0, 14.0)]
    return [Part(_WOOD, 0.5, 0.5, 0.0, 2.0), Part(rgb, 3.6, 0.4, 2.0, 9.0)]


def _gantry(signal: str) -> list[Part]:
    posts = [Part(_GREY, 0.15, 0.15, 0.0, 5.2, side) for side in (-4.2, 4.2)]
    return [
        *posts,
        Part(_DARK, 4.0, 4.0, 3.0, 5.2, front=_GREY),
        Part(SIGNAL_RGB[signal], 3.7, 3.7, 3.2, 5.0, front=_GREY, lit=True),
    ]


class Scene:
    """Photographs a world and what happened in it at `height` x `width` pixels."""

    def __init__(self, world: World, trajectory: Trajectory, height: int, width: int) -> None:
        self.world, self.trajectory, self.height, self.width = world, trajectory, height, width
        road, light = world.road, NIGHT if world.sky == "dark" else 1.0
        sky = np.array(SKY_RGB[world.sky], dtype=np.float64)
        self.horizon_rgb = 0.8 * sky + 0.2 * 255 * light

        x = np.arange(len(road.center)) * TABLE_STEP - TABLE_BEFORE
        dash, shaded = (x % 6.0 < 3.0), (x % 12.0 < 6.0)
        self._strip = ((2 * dash + shaded) * _BINS).astype(np.int32)
        self._center, self._across = road.center.astype(np.float32), np.cos(road.heading).astype(np.float32)

        ground = np.array(GROUND_RGB[world.ground], dtype=np.float64)
        soil = np.array(SOIL_RGB, dtype=np.float64)
        tones = np.stack([ground, ground * 0.92, soil, soil * 0.88, np.full(3, 62.0), np.full(3, 238.0)]) * light
        fade = (np.arange(LEVELS) / LEVELS)[:, None]
        hazed = tones[:, None] * (1 - fade) + self.horizon_rgb * fade
        gradient = sky * (1 - fade) + self.horizon_rgb * fade
        palette = np.concatenate([hazed.reshape(-1, 3), gradient])
        # Four bytes a color, so that painting the ground is one gather of u32.
        self._palette = np.pad(palette.round().astype(np.uint8), ((0, 0), (0, 1))).view(np.uint32).ravel()

        things = [_gantry(signal) for signal in world.gantry_signal]
        things += [_landmark(item.kind, item.color) for item in world.landmarks]
        things += [_car(car.color) for car in world.cars]
        self._gantries, self._cars = len(world.gantry_x), len(world.cars)
        ratio = [0.04] * self._gantries + [1.0] * len(world.landmarks) + [2.2] * self._cars
        self._ratio = np.array(ratio)  # of length to width
        lateral = [0.0] * self._gantries + [item.lateral for item in world.landmarks]
        self._still = road.place(np.array(world.gantry_x + tuple(i.x for i in world.landmarks)), np.array(lateral))
        parts = [part for thing in things for part in thing]
        self._owner = np.repeat(np.arange(len(things)), [len(thing) for thing in things])
        self._shape = np.array([(p.across, p.bottom, p.top, p.low, p.high) for p in parts]).T
        brightness = np.array([1.0 if p.lit else light for p in parts])[:, None]
        self._rear = np.array([p.color for p in parts]) * brightness
        self._front = np.array([p.front or p.color for p in parts]) * brightness

    def photograph(self, camera: Camera, times_ns: np.ndarray) -> np.ndarray:
        """Take images [N, height, width, 3] u8 with `camera` at clip times `times_ns` [N]."""
        x, y, heading = self.trajectory.at(times_ns, "x", "y", "heading")
        view = rays(camera, self.height, self.width)
        images = self._ground(view, x, y, heading)
        self._paint_things(images, view, RIG[camera], x, y, heading, self.trajectory.cars_at(times_ns))
        return images

    def _ground(self, view: Rays, x: np.ndarray, y: np.ndarray, heading: np.ndarray) -> np.ndarray:
        cos, sin = np.cos(heading).astype(np.float32)[:, None], np.sin(heading).astype(np.float32)[:, None]
        row = self.world.road.row(x.astype(np.float32)[:, None] + cos * view.x - sin * view.y)
        lateral = y.astype(np.float32)[:, None] + sin * view.x + cos * view.y - self._center[row]
        bins = (lateral * self._across[row] * _BINS_PER_METRE + _BINS / 2).clip(0, _BINS - 1).astype(np.int32)
        codes = np.empty((len(x), self.height, self.width), dtype=np.int32)
        codes[:, : view.first_row] = (_GROUNDS * LEVELS + view.sky)[:, None]
        ground = _GROUND_CODES[self._strip[row] + bins] + view.haze
        codes[:, view.first_row :] = ground.reshape(len(x), -1, self.width)
        return np.ascontiguousarray(self._palette[codes].view(np.uint8).reshape(*codes.shape, 4)[..., :3])

    def _paint_things(
        self,
        images: np.ndarray,
        view: Rays,
        mount: Mount,
        x: np.ndarray,
        y: np.ndarray,
        heading: np.ndarray,
        cars_x: np.ndarray,
    ) -> None:
        frames = len(x)
        cars = self.world.road.place(cars_x, np.array([car.lateral for car in self.world.cars]))
        still = (np.broadcast_to(value, (frames, len(value))) for value in self._still)
        thing_x, thing_y, thing_heading = (np.concatenate(pair, axis=1) for pair in zip(still, cars))
        turned = np.array([0.0 if car.direction > 0 else np.pi for car in self.world.cars])
        thing_heading[:, thing_heading.shape[1] - self._cars :] += turned

        cos, sin = np.cos(heading)[:, None], np.sin(heading)[:, None]
        dx = thing_x - (x[:, None] + cos * mount.forward - sin * mount.left)
        dy = thing_y - (y[:, None] + sin * mount.forward + cos * mount.left)
        axis = heading[:, None] + mount.yaw
        depth = np.cos(axis) * dx + np.sin(axis) * dy  # [frames, things]
        right = np.sin(axis) * dx - np.cos(axis) * dy
        aspect = np.arctan2(dy, dx) - thing_heading
        along = np.cos(aspect)
        stretched = np.abs(along) + np.abs(np.sin(aspect)) * self._ratio

        seen = (depth > 1.5) & (depth < 2 * SIGHT)
        scale = view.focal / np.where(seen, depth, 1.0)
        owner = self._owner
        across, bottom, top, low, high = self._shape
        scale, right, stretched = scale[:, owner], right[:, owner], stretched[:, owner]
        middle = self.width / 2 + scale * (right + across * stretched)
        foot = np.rint(view.horizon - scale * (low - CAMERA_HEIGHT)).astype(np.int32)
        head = np.rint(view.horizon - scale * (high - CAMERA_HEIGHT)).astype(np.int32)
        half_foot, half_head = scale * bottom * stretched, scale * top * stretched
        widest = np.maximum(half_foot, half_head)
        inside = (middle + widest > 0) & (middle - widest < self.width) & (foot > 0) & (head < self.height)
        fade = 1 - np.exp(-depth / HAZE)[:, owner, None]
        color = np.where((along > 0)[:, owner, None], self._rear, self._front)
        color = (color * (1 - fade) + self.horizon_rgb * fade).astype(np.uint8)

        order = np.argsort(-depth[:, owner], axis=1, kind="stable")
        frame, rank = np.nonzero(np.take_along_axis(seen[:, owner] & inside, order, axis=1))
        part = order[frame, rank]
        for f, p, c, v0, v1, u0, u1 in zip(
            frame.tolist(),
            part.tolist(),
            middle[frame, part].tolist(),
            head[frame, part].tolist(),
            foot[frame, part].tolist(),
            half_head[frame, part].tolist(),
            half_foot[frame, part].tolist(),
        ):
            _trapezoid(images[f], color[f, p], c, v0, v1, u0, u1)


def _trapezoid(
    image: np.ndarray, color: np.ndarray, middle: float, head: int, foot: int, half_head: float, half_foot: float
) -> None:
    """Fill rows head..foot of `image`; a part thinner than a pixel still shows as one."""
    height = image.shape[0]
    foot = max(foot, head + 1)
    if half_head == half_foot:
        left = round(middle - half_head)
        right = max(round(middle + half_head), left + 1)
        image[max(head, 0) : min(foot, height), max(left, 0) : max(right, 0)] = color
        return
    for v in range(max(head, 0), min(foot, height)):
        half = half_head + (half_foot - half_head) * (v + 0.5 - head) / (foot - head)
        left = round(middle - half)
        right = max(round(middle + half), left + 1)
        image[v, max(left, 0) : max(right, 0)] = color
