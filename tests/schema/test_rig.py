"""Rigs: names of cameras, their numbers, and the numbers of a run of several sources."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmoe.config.load import validate
from mmoe.errors import ConfigError
from mmoe.schema.rig import MOST_CAMERAS, STANDARD, Rig
from mmoe.schema.sample import NO_CAMERA, Camera

NAMES = [*STANDARD.cameras, *(f"{place}_{side}" for place in ("wrist", "head", "side") for side in ("left", "right"))]
rigs = st.lists(st.sampled_from(NAMES), unique=True).map(lambda names: Rig(cameras=tuple(names)))


def test_the_standard_rig_has_the_numbers_that_readers_of_cars_write():
    assert {name: STANDARD.number(name) for name in STANDARD.cameras} == {c.name.lower(): c for c in Camera}
    assert STANDARD.number(None) == NO_CAMERA


@given(st.lists(rigs, max_size=4))
def test_a_run_maps_every_number_of_a_source_to_that_of_the_same_name(sources):
    union = Rig.union(sources)
    assert union.cameras[: len(STANDARD.cameras)] == STANDARD.cameras
    assert set(union.cameras) == {*STANDARD.cameras, *(name for rig in sources for name in rig.cameras)}
    for rig in sources:
        numbers = union.numbers(rig)
        assert tuple(union.cameras[number] for number in numbers[:-1]) == rig.cameras
        assert numbers[NO_CAMERA] == NO_CAMERA and numbers.dtype == np.int8


@given(st.lists(rigs, max_size=3), st.lists(rigs, max_size=3))
def test_a_source_more_moves_no_number_of_those_before_it(sources, further):
    few, many = Rig.union(sources), Rig.union([*sources, *further])
    assert many.cameras[: len(few.cameras)] == few.cameras


@pytest.mark.parametrize(
    "cameras, sentence",
    [
        (["top", "front", "top"], "two cameras are named 'top'"),
        (["Front"], "'Front' is no name of a camera; write a lower-case word"),
        (["wrist left"], "'wrist left' is no name of a camera"),
        (["left_"], "'left_' is no name of a camera"),
        ([""], "'' is no name of a camera"),
        ([f"c{number}" for number in range(128)], "a rig of 128 cameras is too large; name 127 at most"),
        ([1], "input should be a valid string"),
    ],
)
def test_what_is_no_rig_is_a_sentence(cameras, sentence):
    with pytest.raises(ConfigError, match=f"test: cameras.*{sentence}"):
        validate(Rig, {"cameras": cameras}, "test")


def test_a_run_of_more_cameras_than_a_position_can_tell_is_refused():
    half = [Rig(cameras=tuple(f"{side}{number}" for number in range(61))) for side in "lr"]
    assert len(Rig.union([half[0]]).cameras) == 67
    with pytest.raises(ConfigError, match=f"have 128 cameras with the 6 standard ones, .* {MOST_CAMERAS} apart"):
        Rig.union(half)


def test_an_unknown_name_names_the_nearest():
    rig = Rig(cameras=("wrist_left", "top"))
    with pytest.raises(ConfigError, match="'wrist_lft' is no camera of the rig; did you mean wrist_left?"):
        rig.number("wrist_lft")
    with pytest.raises(ConfigError, match=r"'front' is no camera of the rig. Name it in rig.cameras, which has wrist"):
        rig.number("front")
