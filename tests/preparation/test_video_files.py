"""Videos in preparation: what decord is proven to read is recorded, and what is accepted training decodes."""

from collections import Counter
from functools import partial

import pytest

from mmoe.config.base import Config
from mmoe.data.config import DataConfig, SourceConfig
from mmoe.data.load.decode import SampleLoader
from mmoe.data.load.frames import UNPROVEN
from mmoe.data.plan.planner import DocumentRef
from mmoe.data.plan.prepared import PreparedSources
from mmoe.errors import PackageError, Refused
from mmoe.optional import status
from mmoe.preparation import sources
from mmoe.preparation.sources.base import Item, Source
from mmoe.schema.modality import Modality
from mmoe.schema.sample import Sample, Segment
from mmoe.tokenizers.audio import AudioConfig
from mmoe.tokenizers.bundle import TokenizersConfig
from mmoe.tokenizers.vision import VisionConfig
from tests.data.recordings import video
from tests.data.test_frames import damaged, textured
from tests.data.video_files import VIDEOS, numbered
from tests.preparation.test_prepare import SMALL_CODEC, quarantine, rows, run

needs_decord = pytest.mark.skipif(not status("decord").available, reason="decord is not installed")


@pytest.fixture
def video_source(monkeypatch):
    """A source of stored videos that the test decides: bytes by key."""
    video_files = {}

    def items(path, config, refuse):
        for key, data in video_files.items():
            segments = [Segment(Modality.VISION, "front.mp4", start=n, stop=n + 1, height=80, width=96) for n in (0, 9)]
            yield Item(key, key, partial(lambda s: s, Sample(key, key, {"front.mp4": data}, segments, Counter())))

    monkeypatch.setitem(
        sources.SOURCES._registered, "videos", Source("videos", "none", 0, Config, items, generated=True)
    )
    return video_files


def proven(folder, manifest):
    """Whether decord is proven to read each member, by key and member."""
    found = {}
    for split in manifest.splits:
        for index, row in rows(folder, manifest, split):
            for number in range(int(index.member_offsets[row + 1] - index.member_offsets[row])):
                found[index.keys[row], index.row_member(row, number)[0]] = index.row_decord(row, number)
    return found


def some(**more):
    closed = video(numbered(12), bf=0, g=6)
    opened = next(clip for clip in VIDEOS if clip.name == "x264_open_mp4.mp4").write()
    return {"closed": closed, "open": opened} | more


@needs_decord
def test_the_proof_is_made_once_and_kept_where_duplicates_are_left_out(tmp_path, video_source):
    video_source |= some(again=some()["closed"])
    manifest, _ = run("videos", "-", tmp_path / "decord", prepare={"heldout_share": 0, "video_backend": "decord"})
    assert manifest.removed == {"duplicate of an earlier sample": 1}
    assert proven(tmp_path / "decord", manifest) == {("closed", "front.mp4"): True}
    manifest, _ = run("videos", "-", tmp_path / "auto", prepare={"heldout_share": 0})
    assert proven(tmp_path / "auto", manifest) == {("closed", "front.mp4"): False, ("open", "front.mp4"): False}


@needs_decord
def test_videos_prepared_for_decord_are_those_it_is_proven_to_read(tmp_path, video_source):
    video_source |= some()
    manifest, _ = run("videos", "-", tmp_path / "out", prepare={"heldout_share": 0, "video_backend": "decord"})
    assert manifest.quarantined == {UNPROVEN: 1} and proven(tmp_path / "out", manifest) == {
        ("closed", "front.mp4"): True
    }
    (line,) = quarantine(tmp_path / "out")
    assert "open.front.mp4 is not read by decord: its GOPs are open" in line["message"]
    assert "set prepare.video_backend=auto" in line["message"]


def test_decord_is_asked_for_where_it_is_not_installed(tmp_path, video_source, monkeypatch):
    def lacking(name, key):
        raise PackageError(f"{key} asks for {name}, which is not here")

    monkeypatch.setattr("mmoe.preparation.prepare.require", lacking)
    with pytest.raises(PackageError, match="prepare.video_backend asks for decord"):
        run("videos", "-", tmp_path / "out", prepare={"video_backend": "decord"})


def test_a_stored_video_whose_frames_the_decoder_makes_up_is_refused(tmp_path, video_source):
    video_file = video(textured(12), codec="mpeg4", g=12, bf=0)
    video_source |= {"whole": video_file, "damaged": damaged(video_file, 8)}
    manifest, _ = run("videos", "-", tmp_path / "out", prepare={"heldout_share": 0})
    assert manifest.quarantined == {"unreadable image or video": 1}
    assert (
        "damaged.front.mp4 is damaged: the decoder makes up parts of 1 frames"
        in quarantine(tmp_path / "out")[0]["message"]
    )


@needs_decord
def test_what_preparation_accepts_training_decodes_by_either_backend(tmp_path):
    """Frames of 144 x 64 are scaled to 48 x 21 for a small grid, a width that decord itself cannot give."""
    options = {"recordings": 4, "slices": [1, 2], "height": 64, "width": 144}
    options["prepare"] = SMALL_CODEC | {"video_backend": "decord"}
    manifest, _ = run("simulated_drive", "-", tmp_path / "drive", **options)
    found = proven(tmp_path / "drive", manifest)
    assert len(found) > 30 and all(is_proven == member.endswith(".mp4") for (_, member), is_proven in found.items())
    config = DataConfig(sources={"drive": SourceConfig(kind="-", shards=str(tmp_path / "drive"))}, sequence_length=512)
    prepared = PreparedSources(config)
    audio = AudioConfig(path=str(tmp_path / "drive/audio_codec.safetensors"), **SMALL_CODEC["audio"])
    vision = VisionConfig(patch=16, max_patches=2)
    tokenizers = TokenizersConfig(vision=vision, audio=audio).build(prepared.manifests)
    ours, theirs = (SampleLoader(prepared.files("train"), tokenizers, backend) for backend in ("auto", "decord"))
    for row in range(manifest.splits["train"].samples):
        segments = ours.index(0, 0).row_segments(row)
        ref = DocumentRef(0, 0, row, 0, 0, int(segments["slice"].max()) + 1, False, True)
        assert len(ours(ref)) == len(theirs(ref)) == 1


@needs_decord
def test_training_by_decord_refuses_a_video_that_was_not_proven(tmp_path):
    options = {"recordings": 3, "slices": [1, 1], "prepare": SMALL_CODEC}
    run("simulated_drive", "-", tmp_path / "drive", **options)
    config = DataConfig(sources={"drive": SourceConfig(kind="-", shards=str(tmp_path / "drive"))}, sequence_length=512)
    prepared = PreparedSources(config)
    audio = AudioConfig(path=str(tmp_path / "drive/audio_codec.safetensors"), **SMALL_CODEC["audio"])
    tokenizers = TokenizersConfig(vision=VisionConfig(patch=8), audio=audio).build(prepared.manifests)
    ref = DocumentRef(0, 0, 0, 0, 0, 1, False, True)
    assert SampleLoader(prepared.files("train"), tokenizers, "auto")(ref)
    with pytest.raises(Refused, match=r"drive-\d+\.front\w*\.mp4 is not read by decord.*data.video_backend=auto"):
        SampleLoader(prepared.files("train"), tokenizers, "decord")(ref)
