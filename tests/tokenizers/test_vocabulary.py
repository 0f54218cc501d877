"""The vocabulary: one id space cut into ranges."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmoe.errors import ConfigError
from mmoe.schema.modality import Modality
from mmoe.schema.rig import STANDARD, Rig
from mmoe.tokenizers.vocabulary import Placeholder, Structure, Vocabulary, further_cameras

# As the design's "Vocabulary" contract lists them.
DESIGN = """bos eos pad image_start image_end video_start video_end slice_start slice_end audio_start audio_end
cam_front cam_front_left cam_front_right cam_back cam_back_left cam_back_right timestamp state action action_end"""

vocabularies = st.builds(
    Vocabulary,
    text_size=st.integers(1, 70_000),
    audio_codebooks=st.integers(0, 8),
    audio_codebook_size=st.integers(0, 1024),
    action_bins=st.integers(0, 256),
    further=st.lists(st.sampled_from(["cam_top", "cam_wrist", "radar", "lidar"]), unique=True).map(tuple),
)


def test_structure_tokens_are_those_of_the_design():
    assert {token.name.lower() for token in Structure} == set(DESIGN.split())
    assert sorted(Structure) == list(range(len(Structure)))


@given(vocabularies)
def test_ranges_are_adjacent_and_cover_the_ids(vocabulary):
    ids = [id for ids in vocabulary.ranges.values() for id in (ids.start, ids.stop)]
    assert ids[0] == 0 and ids[-1] == vocabulary.size
    assert ids[1:-1:2] == ids[2::2]  # each range begins where the one before ends: no overlap, no gap
    assert set(Structure) == set(vocabulary.ranges["structure"])
    assert set(Placeholder) == set(vocabulary.ranges["placeholder"])


@given(vocabularies)
def test_modality_agrees_with_the_ranges(vocabulary):
    kinds = {"text": Modality.TEXT, "audio": Modality.AUDIO, "action": Modality.ACTION}
    for name, ids in vocabulary.ranges.items():
        if ids:
            ends = vocabulary.modality_of(np.array([ids[0], ids[-1]]))
            assert (ends == kinds.get(name, Modality.STRUCTURE)).all()


def test_every_id_has_a_name_of_its_own():
    vocabulary = Vocabulary(
        text_size=5, audio_codebooks=2, audio_codebook_size=3, action_bins=4, further=("cam_top", "radar")
    )
    names = [vocabulary.name(id) for id in range(vocabulary.size)]
    assert len(set(names)) == vocabulary.size
    assert names[Structure.CAM_FRONT] == "cam_front"
    assert names[vocabulary.ranges["audio"].start + 4] == "audio 1:1"
    assert names[vocabulary.further_ids["radar"]] == "radar" == names[-1]
    with pytest.raises(ValueError, match="outside the vocabulary"):
        vocabulary.name(vocabulary.size)


@given(st.integers(1, 8), st.integers(1, 64))
def test_audio_ids_fill_their_range(codebooks, size):
    vocabulary = Vocabulary(text_size=256, audio_codebooks=codebooks, audio_codebook_size=size, action_bins=7)
    codebook, codes = (grid.ravel() for grid in np.indices((codebooks, size)))
    assert vocabulary.audio_ids(codes, codebook).tolist() == list(vocabulary.ranges["audio"])


@given(vocabularies)
def test_further_tokens_move_no_other_id(vocabulary):
    without = replace(vocabulary, further=())
    assert [vocabulary.ranges[name] for name in without.ranges if name != "further"] == [
        ids for name, ids in without.ranges.items() if name != "further"
    ]
    ids = np.arange(without.size)
    assert (vocabulary.modality_of(ids) == without.modality_of(ids)).all()
    assert [vocabulary.further_ids[name] for name in vocabulary.further] == list(vocabulary.ranges["further"])


def test_each_camera_has_its_token():
    rig = Rig(cameras=("wrist", *reversed(STANDARD.cameras), "top"))
    vocabulary = Vocabulary(text_size=5, action_bins=4, further=(*further_cameras(rig), "radar"))
    ids = vocabulary.camera_ids(rig)
    assert [vocabulary.name(id) for id in ids.tolist()] == [f"cam_{name}" for name in rig.cameras]
    assert vocabulary.camera_ids(STANDARD).tolist() == list(range(Structure.CAM_FRONT, Structure.TIMESTAMP))


@pytest.mark.parametrize("further", [("radar", "radar"), ("state",), ("cam_front",), ("inertial",)])
def test_a_name_stands_for_one_token(further):
    with pytest.raises(ConfigError, match=f"two structure tokens are named {further[0]}; give"):
        Vocabulary(text_size=5, further=further)
