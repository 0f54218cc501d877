"""Simulates the expert driver and the vehicle: a kinematic bicycle whose actuators lag behind the driver's commands.

Steering is pure pursuit of the own lane (Coulter, "Implementation of the Pure Pursuit Path Tracking Algorithm",
1992): curvature = 2 l / d^2 for a target at distance d with lateral offset l. Throttle and brake obey the signal
over the road, the bend ahead and the gap to the car ahead, whichever asks for the least acceleration.
"""

from bisect import bisect_right
from dataclasses import dataclass
from math import atan, cos, exp, sin, sqrt, tan

import numpy as np

from mmoe.preparation.simulation.world import LANE, TABLE_BEFORE, TABLE_STEP, Car, World

STEP_S = 0.02
LOOK_AHEAD, LOOK_BEND = 10.0, 12.0  # metres
WHEELBASE, MAX_WHEEL = 2.7, 0.3  # metres, radians at steering 1
MAX_ACCELERATION, MAX_BRAKING = 3.0, 4.0  # m/s^2 at throttle 1 and at brake 1
STEERING_LAG_S, PEDAL_LAG_S = 0.25, 0.35
LATERAL_LIMIT = 12.0  # m/s^2 in bends: a sporty driver
SLOWEST, FASTEST = 3.5, 15.0  # m/s; the driver never stops
SAFE_GAP = 5.0  # metres to the car ahead
FOLLOWER_DELAY_S = 0.4

# A signal counts until the gantry is SIGNAL_PASS metres ahead, then the next one; the driver blends over
# SIGNAL_BLEND metres. At SIGNAL_PASS the panel is about to leave the front image.
SIGNAL_ACCELERATION = {"red": -2.6, "amber": 0.0, "green": 2.4}
SIGNAL_PASS, SIGNAL_BLEND = 8.0, 4.0


@dataclass(frozen=True)
class Trajectory:
    """Holds what happened on a drive, on a grid of STEP_S with T steps.

    The vehicle's `x, y, heading, speed, acceleration, yaw_rate` and the driver's `steering, throttle, brake` (commands,
    not what the lagging actuators do) are all [T]; `cars` [T, C] are x of the C other cars."""

    seconds: np.ndarray
    values: dict[str, np.ndarray]
    cars: np.ndarray

    def at(self, times_ns: np.ndarray, *names: str) -> list[np.ndarray]:
        """Interpolate the named values at `times_ns` [N]; returns an array [N] for each name."""
        seconds = times_ns * 1e-9
        return [np.interp(seconds, self.seconds, self.values[name]) for name in names]

    def cars_at(self, times_ns: np.ndarray) -> np.ndarray:
        """Interpolate x of the C other cars at `times_ns` [N]; returns [N, C] in meters."""
        seconds = times_ns * 1e-9
        columns = [np.interp(seconds, self.seconds, self.cars[:, c]) for c in range(self.cars.shape[1])]
        return np.stack(columns, axis=1) if columns else np.empty((len(times_ns), 0))


_RECORDED = ("x", "y", "heading", "speed", "acceleration", "yaw_rate", "steering", "throttle", "brake")


def drive(world: World, rng: np.random.Generator, start_s: float, stop_s: float) -> Trajectory:
    """Let the expert drive through `world`; it starts beside its lane and not parallel to it.

    At most FASTEST * `stop_s` meters are covered, which is the length the world must have.
    """
    road = world.road
    steps = int((stop_s - start_s) / STEP_S) + 2
    x, lateral = 0.0, rng.normal(0, 0.45) - LANE / 2
    y, heading = road.y(x) + lateral, atan(road.slope(x)) + rng.normal(0, 0.06)
    speed, acceleration, wheel = rng.uniform(7.5, 11.5), 0.0, 0.0
    lead = next((car for car in world.cars if car.role == "lead"), None)
    lead_x = lead.x + lead.speed * start_s if lead else 0.0
    window = int(LOOK_BEND / TABLE_STEP)
    sharpest = np.lib.stride_tricks.sliding_window_view(np.abs(road.curvature), window).max(1).tolist()
    signals = [SIGNAL_ACCELERATION[signal] for signal in world.gantry_signal]
    steering_gain, pedal_gain = 1 - exp(-STEP_S / STEERING_LAG_S), 1 - exp(-STEP_S / PEDAL_LAG_S)

    rows = []
    for _ in range(steps):
        forward_x, left_x = cos(heading), -sin(heading)
        dx = LOOK_AHEAD * cos(atan(road.slope(x)))
        dy = road.y(x + dx) - LANE / 2 - y
        curvature = 2 * (left_x * dx + forward_x * dy) / (dx * dx + dy * dy)
        steering = min(1.0, max(-1.0, atan(WHEELBASE * curvature) / MAX_WHEEL))

        gantry = bisect_right(world.gantry_x, x + SIGNAL_PASS)
        near = min(1.0, (world.gantry_x[gantry] - x - SIGNAL_PASS) / SIGNAL_BLEND)
        wanted = near * signals[gantry] + (1 - near) * signals[gantry + 1]
        bend_speed = sqrt(LATERAL_LIMIT / max(sharpest[int((x + TABLE_BEFORE) / TABLE_STEP)], 1e-3))
        wanted = min(wanted, 0.6 * (bend_speed - speed), 2 * (FASTEST - speed))
        if lead:
            wanted = min(wanted, 0.4 * (lead_x - x - SAFE_GAP) + 0.6 * (lead.speed - speed))
            lead_x += lead.speed * STEP_S
        wanted = max(wanted, 2 * (SLOWEST - speed))
        throttle = min(1.0, max(0.0, wanted / MAX_ACCELERATION))
        brake = min(1.0, max(0.0, -wanted / MAX_BRAKING))

        yaw_rate = speed * tan(wheel) / WHEELBASE
        rows.append((x, y, heading, speed, acceleration, yaw_rate, steering, throttle, brake))
        x += speed * forward_x * STEP_S
        y -= speed * left_x * STEP_S
        heading += yaw_rate * STEP_S
        speed = max(0.5, speed + acceleration * STEP_S)
        wheel += steering_gain * (steering * MAX_WHEEL - wheel)
        acceleration += pedal_gain * (throttle * MAX_ACCELERATION - brake * MAX_BRAKING - acceleration)

    seconds = start_s + STEP_S * np.arange(steps)
    values = dict(zip(_RECORDED, np.array(rows).T))
    cars = [_car_track(car, seconds, values["x"], values["speed"][0]) for car in world.cars]
    return Trajectory(seconds, values, np.stack(cars, axis=1) if cars else np.empty((steps, 0)))


def _car_track(car: Car, seconds: np.ndarray, own_x: np.ndarray, own_speed: float) -> np.ndarray:
    if car.role != "follower":
        return car.x + car.speed * seconds
    # Newell's car-following rule: where the own car was a moment ago, less a distance.
    then = seconds - FOLLOWER_DELAY_S
    before_start = own_speed * np.minimum(then - seconds[0], 0)
    return np.interp(then, seconds, own_x) + before_start - car.x
