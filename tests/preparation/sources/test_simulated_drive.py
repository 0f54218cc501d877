"""The simulated drive: reproducible, aligned with its own files, and true to the world it was drawn from."""

import io
import json
from dataclasses import replace
from math import atan2, tan

import av
import numpy as np
import pytest
import soundfile
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mmoe.preparation.clocks import check_alignment, check_clock, seconds_to_ns
from mmoe.preparation.simulation import render, sensors, simulated_drive
from mmoe.preparation.simulation.captions import captions
from mmoe.preparation.simulation.driver import FASTEST, drive
from mmoe.preparation.simulation.simulated_drive import SimulatedDriveConfig, make_recording, video_name
from mmoe.preparation.simulation.world import LANE, RGB, SKY_RGB, Car, Landmark, World
from mmoe.schema.modality import Modality
from mmoe.schema.sample import Camera

CONFIG = SimulatedDriveConfig(recordings=8, seed=3, slices=(3, 5))
CODEC = (".mp4", ".flac")
MS = 1_000_000


@pytest.fixture(scope="module")
def recordings():
    return [make_recording(CONFIG, number) for number in range(CONFIG.recordings)]


def array(sample, member):
    return np.load(io.BytesIO(sample.members[member]))


def clocks(sample):
    return {name: np.array(times) for name, times in json.loads(sample.members["clip.json"])["clocks_ns"].items()}


def frames(data):
    with av.open(io.BytesIO(data)) as container:
        return [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]


def test_same_seed_same_bytes_and_no_two_recordings_alike(recordings):
    again = make_recording(CONFIG.model_copy(update={"recordings": 1}), 2)
    assert again.segments == recordings[2].segments
    for name, data in again.members.items():
        if not name.endswith(CODEC):
            assert data == recordings[2].members[name], name
    assert len({sample.members["actions.npy"] for sample in recordings}) == len(recordings)
    other = make_recording(CONFIG.model_copy(update={"seed": 4}), 2)
    assert other.members["imu.npy"] != again.members["imu.npy"]


def test_keys_are_recordings_and_have_no_dot(recordings):
    for number, sample in enumerate(recordings):
        assert sample.key == sample.recording == f"drive-{number:06d}"


@example(number=288, fps=4, period=491, most=2)
@settings(max_examples=8, deadline=None)
@given(
    number=st.integers(0, 10**6),
    fps=st.sampled_from([3, 4, 10]),
    period=st.integers(400, 900),
    most=st.integers(1, 6),
)
def test_slices_are_causal_whole_and_within_the_budget(number, fps, period, most):
    config = SimulatedDriveConfig(
        slices=(1, most), slice_period_ns=period * MS, camera_fps=fps, height=32, width=48, seed=number
    )
    sample = make_recording(config, number)
    times = clocks(sample)
    audio = json.loads(sample.members["clip.json"])["audio"]
    heard = soundfile.info(io.BytesIO(sample.members["engine.flac"])).frames
    rows = {name: len(array(sample, name)) for name in ("imu.npy", "state.npy", "actions.npy")}
    slices = sample.segments[-1].slice + 1
    assert 1 <= slices <= most
    order = [Modality.VISION] * 6 + [
        Modality.AUDIO,
        Modality.INERTIAL,
        Modality.STATE,
        Modality.ACTION,
        Modality.TEXT,
    ]
    assert [s.modality for s in sample.segments] == order * slices
    for s in sample.segments:
        raw = s.timestamp_ns + s.offset_ns
        if s.modality == Modality.VISION:
            assert raw == times[s.member][s.start] and s.stop == s.start + 1
            assert -simulated_drive.SKEW_BUDGET_NS <= s.offset_ns <= 0 and s.pair == s.slice
            assert (s.offset_ns == 0) == (s.camera == Camera.FRONT)
            assert (s.height, s.width) == (32, 48) and s.member == video_name(Camera(s.camera))
        elif s.modality == Modality.AUDIO:
            assert s.start >= 0 and s.stop - s.start == s.rate // 5
            assert abs(raw - audio["start_ns"] - (s.stop - 1) * 10**9 / s.rate) <= 1
            # The last sample before the reference; a reference behind the end of the audio has the end.
            assert s.offset_ns <= 0 and (s.offset_ns > -125_000 or s.stop == heard)
        elif s.modality in (Modality.INERTIAL, Modality.STATE):
            assert raw == times[s.member][s.stop - 1] and s.start >= 0
            assert s.offset_ns <= 0 and (s.stop == rows[s.member] or times[s.member][s.stop] > s.timestamp_ns)
        elif s.modality == Modality.ACTION:
            assert raw == times[s.member][s.start] and 0 <= s.offset_ns < simulated_drive.ACTION_PERIOD_NS
            assert s.start >= 1 and s.start + simulated_drive.ACTION_STEPS <= s.stop == rows[s.member]
        else:
            assert s.pair == s.slice and s.text
    for camera in Camera:
        picked = [s.start for s in sample.segments if s.camera == camera]
        assert len(set(picked)) == slices


def test_clocks_agree_with_the_files(recordings):
    decord = pytest.importorskip("decord")
    sample = recordings[0]
    for name, times in clocks(sample).items():
        check_clock(times, name, sample.key)
        if not name.endswith(".mp4"):
            assert len(array(sample, name)) == len(times)
            continue
        by_av = np.array([time for time, _ in frames(sample.members[name])])
        reader = decord.VideoReader(io.BytesIO(sample.members[name]))
        by_decord = reader.get_frame_timestamp(range(len(reader)))[:, 0]
        for seconds in (by_av, by_decord):
            file_ns = times[0] + seconds_to_ns(seconds, name, sample.key)
            check_alignment(times, np.zeros_like(times), times, file_ns, name, sample.key)
            assert np.abs(file_ns - times).max() <= 1000  # the container's time base
        assert len(np.unique(np.diff(times))) > 1  # a camera's own clock is not a metronome
    info = soundfile.info(io.BytesIO(sample.members["engine.flac"]))
    assert (info.samplerate, info.channels) == (simulated_drive.AUDIO_RATE, 1)
    assert max(s.stop for s in sample.segments if s.modality == Modality.AUDIO) <= info.frames
    assert set(np.diff(clocks(sample)["actions.npy"])) == {simulated_drive.ACTION_PERIOD_NS}


def test_images_survive_the_codec():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (5, 3, 5, 3), dtype=np.uint8).repeat(16, 1).repeat(16, 2)
    times = np.array([0, 240, 500, 760, 1000]) * MS
    decoded = np.stack([image for _, image in frames(sensors.video(images, times))])
    assert np.abs(decoded.astype(int) - images).mean() < 6


def straight(rng_seed=0, **changes):
    """A world on a straight road with nothing beside it, driven along its lane."""
    world = World.generate(np.random.default_rng(rng_seed), 40.0)
    road = replace(
        world.road, waves=(), **{k: np.zeros_like(world.road.center) for k in ("center", "heading", "curvature")}
    )
    world = replace(world, road=road, landmarks=(), cars=(), sky="grey", **changes)
    return world, drive(world, np.random.default_rng(rng_seed), 0.0, 1.0)


@pytest.mark.parametrize("camera", [Camera.FRONT, Camera.FRONT_LEFT, Camera.BACK_RIGHT, Camera.BACK])
def test_a_tower_stands_where_a_pinhole_camera_sees_it(camera):
    """Its column and width against u = W/2 - f tan(bearing) and w = f W / depth, from its place alone."""
    world, trajectory = straight()
    height, width, time = 96, 160, np.array([0])
    x, y, heading = (float(v[0]) for v in trajectory.at(time, "x", "y", "heading"))
    mount = render.RIG[camera]
    eye = np.array([x, y]) + rotate((mount.forward, mount.left), heading)
    tower = eye + rotate((30.0, 3.0), heading + mount.yaw)
    world = replace(
        world,
        landmarks=(Landmark("tower", "purple", float(tower[0]), float(tower[1])),),
        gantry_signal=("red",) * len(world.gantry_signal),
    )
    scene = render.Scene(world, trajectory, height, width)
    image = scene.photograph(camera, time)[0].astype(int)
    without = render.Scene(replace(world, landmarks=()), trajectory, height, width).photograph(camera, time)[0]
    columns = np.flatnonzero((image != without).any(axis=(0, 2)))
    focal = width / 2 / tan(mount.field_of_view / 2)
    bearing = atan2(tower[1] - eye[1], tower[0] - eye[0]) - heading - mount.yaw
    assert (columns.min() + columns.max() + 1) / 2 == pytest.approx(width / 2 - focal * tan(bearing), abs=1.5)
    assert 4 * focal / 30 < len(columns) < 1.5 * 4.8 * focal / 30


def rotate(vector, angle):
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) @ np.array(vector)


def test_near_things_hide_far_ones():
    world, trajectory = straight(gantry_x=(200.0, 220.0), gantry_signal=("red", "red"))
    pair = (Landmark("tower", "white", 12.0, -LANE / 2), Landmark("house", "blue", 30.0, -LANE / 2))
    image = [
        render.Scene(replace(world, landmarks=order), trajectory, 48, 80).photograph(Camera.FRONT, np.array([0]))[0]
        for order in (pair, pair[::-1])
    ]
    assert (image[0] == image[1]).all()
    center = image[0][20, 40].astype(int)
    assert np.abs(center - RGB["white"]).max() < 40


def test_the_road_meets_the_image_where_the_lane_is():
    """On a straight road the lane's right edge, 1.75 m right of the eye, lies at u = W/2 + f 1.75 / depth."""
    world, _ = straight(gantry_x=(200.0, 220.0), gantry_signal=("red", "red"))
    steps = np.zeros(2)
    names = ("x", "y", "heading")
    pose = {name: steps - (LANE / 2 if name == "y" else 0) for name in names}
    trajectory = replace(
        drive(world, np.random.default_rng(0), 0.0, 1.0),
        seconds=np.array([0.0, 1.0]),
        values=pose,
        cars=np.empty((2, 0)),
    )
    image = render.Scene(world, trajectory, 96, 160).photograph(Camera.FRONT, np.array([0]))[0].astype(int)
    focal = 80 / tan(render.RIG[Camera.FRONT].field_of_view / 2)
    for row in (60, 70, 80):
        depth = render.CAMERA_HEIGHT * focal / (row + 0.5 - 96 * render.HORIZON)
        marking = np.flatnonzero(image[row, 80:].min(-1) > 150) + 80
        assert marking.mean() + 0.5 == pytest.approx(80 + focal * (LANE / 2 + 0.05) / depth, abs=1.5)


def test_the_front_camera_shows_the_signal_that_is_obeyed():
    """Red over the road brings the brake, green the throttle, and the image holds that color."""
    for signal, channel, pedal in (("red", 0, "brake"), ("green", 1, "throttle")):
        world, trajectory = straight()
        world = replace(world, gantry_signal=(signal,) * len(world.gantry_x))
        trajectory = drive(world, np.random.default_rng(0), 0.0, 1.0)
        other = "throttle" if pedal == "brake" else "brake"
        assert trajectory.values[pedal][:20].min() > 0.5 and trajectory.values[other][:20].max() == 0
        image = render.Scene(world, trajectory, 48, 80).photograph(Camera.FRONT, np.array([0]))[0].astype(int)
        lit = (image[:22, :, channel] > 200) & (image[:22].min(-1) < 80) & (image[:22, :, 1 - channel] < 80)
        assert lit.mean() > 0.02


def test_the_expert_keeps_its_lane_and_steers_into_the_bend():
    offsets, turn, steering = [], [], []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        world = World.generate(rng, FASTEST * 4)
        trajectory = drive(world, rng, 0.0, 4.0)
        values = trajectory.values
        row = world.road.row(values["x"])
        offsets.append((values["y"] - world.road.center[row]) * np.cos(world.road.heading[row]) + LANE / 2)
        turn.append(world.road.curvature[row][50:])
        steering.append(values["steering"][50:])
        assert values["speed"].min() > 2 and values["speed"].max() < FASTEST + 1
    settled = np.concatenate([offset[100:] for offset in offsets])
    assert np.sqrt((settled**2).mean()) < 0.7 and np.abs(settled).max() < LANE / 2
    assert np.corrcoef(np.concatenate(turn), np.concatenate(steering))[0, 1] > 0.9


def test_sensors_measure_the_motion():
    rng = np.random.default_rng(5)
    world = World.generate(rng, FASTEST * 4)
    trajectory = drive(world, rng, 0.0, 4.0)
    times = np.arange(0, 3_900 * MS, 10 * MS)
    readings = np.mean([sensors.inertial(rng, trajectory, times) for _ in range(200)], axis=0)
    x, y, heading, speed = trajectory.at(times, "x", "y", "heading", "speed")
    seconds = times * 1e-9
    travelled = np.hypot(np.gradient(x, seconds), np.gradient(y, seconds))
    turned = np.gradient(heading, seconds)
    inner = slice(2, -2)
    assert np.abs(travelled - speed)[inner].max() < 0.2
    assert np.abs(readings[inner, 5] - turned[inner]).max() < 0.25
    assert np.abs(readings[inner, 1] - (speed * turned)[inner]).max() < 1.5
    assert np.abs(readings[inner, 0] - np.gradient(speed, seconds)[inner]).max() < 1.5
    assert readings[:, 2].mean() == pytest.approx(9.81, abs=0.2)
    log = sensors.wheel_speed(rng, trajectory, times)[:, 0]
    assert np.abs(log - speed).mean() < 0.3


def test_the_engine_sings_the_speed(recordings):
    for sample in recordings[:4]:
        audio, rate = soundfile.read(io.BytesIO(sample.members["engine.flac"]))
        speed = array(sample, "state.npy")[:, 0]
        for piece, state in zip(of(sample, Modality.AUDIO), of(sample, Modality.STATE)):
            spectrum = np.abs(np.fft.rfft(audio[piece.start : piece.stop] * np.hanning(piece.stop - piece.start)))
            pitch = spectrum.argmax() * rate / (piece.stop - piece.start)
            expected = sensors.IDLE_HZ + sensors.HZ_PER_SPEED * speed[state.start]
            assert pitch == pytest.approx(expected, abs=15)


def of(sample, modality):
    return [s for s in sample.segments if s.modality == modality]


def test_captions_name_what_is_there_and_nothing_that_steers(recordings):
    texts = [s.text for sample in recordings for s in of(sample, Modality.TEXT)]
    words = [text.replace(",", "").split() for text in texts]
    assert all(8 <= len(w) <= 16 for w in words) and len({word for w in words for word in w}) < 40
    assert not {"bend", "signal", "red"} & {word for text, w in zip(texts, words) for word in w[4:]}
    assert len(set(texts)) > len(texts) / 2
    for sample in recordings:
        clip = json.loads(sample.members["clip.json"])
        named = [s.text for s in of(sample, Modality.TEXT)]
        assert named == clip["captions"]
        assert all(text.startswith(f"{clip['world']['sky']} sky, {clip['world']['ground']}") for text in named)


def test_the_sky_of_the_caption_is_the_sky_of_the_images(recordings):
    for sample in recordings:
        name = of(sample, Modality.TEXT)[0].text.split()[0]
        top = np.concatenate([frames(sample.members[video_name(c)])[0][1][:4].reshape(-1, 3) for c in Camera])
        seen = np.median(top, axis=0)
        nearest = min(SKY_RGB, key=lambda sky: np.abs(seen - SKY_RGB[sky]).sum())
        assert nearest == name


@pytest.mark.parametrize("side, camera", [("left", Camera.FRONT_LEFT), ("right", Camera.FRONT_RIGHT)])
def test_a_landmark_is_named_on_the_side_whose_camera_sees_it(side, camera):
    world, trajectory = straight()
    house = Landmark("house", "purple", 12.0, 12.0 if side == "left" else -12.0)
    world = replace(world, landmarks=(house,))
    time = np.array([0])
    assert captions(world, trajectory, time)[0].endswith(f", purple house {side}")
    seen = {c: purple(render.Scene(world, trajectory, 48, 80).photograph(c, time)) for c in Camera}
    assert seen[camera] > 0.1 and max(seen.values()) == seen[camera]


@pytest.mark.parametrize(
    "role, x, phrase, camera",
    [
        ("lead", 14.0, "purple car ahead", Camera.FRONT),
        ("oncoming", 14.0, "purple car oncoming", Camera.FRONT),
        ("follower", 8.0, "purple car behind", Camera.BACK),
        ("oncoming", -9.0, "purple car passed", Camera.BACK),
    ],
)
def test_a_car_is_named_where_the_camera_sees_it(role, x, phrase, camera):
    world, _ = straight()
    world = replace(world, cars=(Car(role, "purple", x, 0.0),))
    trajectory, time = drive(world, np.random.default_rng(0), 0.0, 1.0), np.array([0])
    assert captions(world, trajectory, time)[0].endswith(f", {phrase}")
    seen = {c: purple(render.Scene(world, trajectory, 48, 80).photograph(c, time)) for c in Camera}
    assert seen[camera] > 0.005 and max(seen.values()) == seen[camera]


def purple(images):
    """Share of purple pixels."""
    return (np.abs(images.astype(int) - RGB["purple"]).max(-1) < 50).mean()


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"slices": (5, 2)}, "fewest, most"),
        ({"height": 47}, "yuv420p"),
        ({"width": 8}, "yuv420p"),
        ({"slice_period_ns": 100 * MS}, "share frames"),
        ({"recordings": 0}, "greater than or equal to 1"),
    ],
)
def test_impossible_configs_are_refused(changes, reason):
    with pytest.raises(ValidationError, match=reason):
        SimulatedDriveConfig(**changes)
