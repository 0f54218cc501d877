"""Videos with audio: what a slice holds follows from the times in the file, whatever the file is like."""

import json
import os

import av
import numpy as np
import pytest
import torch
import torchaudio

from mmoe.data.load.decode import SampleLoader, SourceFiles
from mmoe.data.load.frames import DAMAGED
from mmoe.data.load.media import audio_info, load_audio, load_image, load_resampled
from mmoe.data.plan.planner import DocumentRef
from mmoe.errors import DataError
from mmoe.preparation.slices import CLOCKS, Clocks
from mmoe.preparation.sources import video_file
from mmoe.schema.bounds import BEYOND
from mmoe.schema.modality import Modality
from mmoe.tokenizers.audio import AudioConfig
from mmoe.tokenizers.bundle import TokenizersConfig
from tests.data.recordings import images, turned, video, write_jsonl
from tests.data.recordings_robot import LEVEL, level_images
from tests.data.recordings_video import clicks, ramp, video_bytes, webm_bytes
from tests.data.test_frames import damaged, lasting, textured
from tests.data.video_files import RATE, VIDEOS, number_of
from tests.preparation.sources.test_sources import read, texts
from tests.preparation.test_prepare import read_everything, run

MS = 1_000_000
OPTIONAL_PACKAGES = ("decord", "pyav")


def by_kind(sample, kind):
    return [segment for segment in sample.segments if segment.modality is kind]


def shown(sample):
    """The number of each slice's image, of `level_images`."""
    means = [load_image(sample.members[s.member], "x").mean() for s in by_kind(sample, Modality.VISION)]
    return [round((mean - 10) / LEVEL) for mean in means]


def heard(sample):
    """(first, last) sample of the `ramp` in each sounding slice, by slice."""
    pieces = {}
    for s in by_kind(sample, Modality.AUDIO):
        wave, _ = load_audio(sample.members[s.member], s.start, s.stop, "x")
        numbers = np.rint(wave * 32768).astype(int) - 1
        assert (np.diff(numbers) == 1).all()
        pieces[s.slice] = (int(numbers[0]), int(numbers[-1]))
    return pieces


def only(samples):
    (sample,) = samples.values()
    return sample


@pytest.mark.parametrize("backend", OPTIONAL_PACKAGES)
def test_slices_are_found_by_time_where_the_spacing_varies(tmp_path, backend):
    """80 to 100 ms between frames and a pause of 1.2 s: number / rate would be wrong from the third frame on."""
    times = np.cumsum([0, 80, 100, 90, 80, 100, 90, 80, 1200, 90, 100, 80, 100, 90]).tolist()
    audio = (8000, [(0, ramp(0, 8 * (times[-1] + 90)))])
    (tmp_path / "v.mkv").write_bytes(video_bytes(level_images(0, 14), times, [audio], crf=1))
    samples, refused = read("video", tmp_path, video_backend=backend, slices=3)
    assert not refused
    ends = [(500, 450), (1000, 620), (2000, 1990)]  # the period's end, its last frame; 1000 to 1500 shows nothing
    expected = {end: max(t for t in times if t < end) for end, _ in ends}
    seen = [
        (int(key[-8:]) + s.timestamp_ns / MS, number)
        for key, sample in samples.items()
        for s, number in zip(by_kind(sample, Modality.VISION), shown(sample), strict=True)
    ]
    assert [(round(t), n) for t, n in seen] == [(t, times.index(t)) for t in expected.values()]
    for key, sample in samples.items():
        for slice_, (_, last) in heard(sample).items():
            time = next(s.timestamp_ns for s in by_kind(sample, Modality.VISION) if s.slice == slice_)
            assert abs(last - 8 * (int(key[-8:]) + time / MS)) <= 9  # a millisecond, as Matroska rounds
        clocks = Clocks.from_bytes(sample.members[CLOCKS])
        np.testing.assert_allclose(clocks.times_ns["video"] + clocks.origin_ns, np.array(times) * MS, atol=1000)
        assert (clocks.kind, clocks.reference, clocks.log) == ("captured", "video", "v.mkv")


def test_audio_that_starts_late_or_has_a_gap_is_absent_not_silent(tmp_path):
    times = [40 * i for i in range(100)]  # 4 s
    rate = 8000
    pieces = [(700, ramp(5600, 8 * 1000)), (2800, ramp(22_400, 8 * 900))]  # 0.7 to 1.7 s, 2.8 to 3.7 s
    (tmp_path / "v.mkv").write_bytes(video_bytes(level_images(0, 100), times, [(rate, pieces)]))
    samples, _ = read("video", tmp_path)
    sample = only(samples)
    pieces = heard(sample)
    # Slices end at 0.48, 0.96 (260 ms of audio), 1.48, 1.96 (too old), 2.48, 2.96 (too little), 3.48, 3.96.
    assert set(pieces) == {1, 2, 6} and sample.flags == {"audio: absent": 5}
    assert pieces[1][0] == 5600
    assert [last - first + 1 for first, last in (pieces[2], pieces[6])] == [4000, 4000]
    for number, (_, last) in pieces.items():
        frame = next(s for s in by_kind(sample, Modality.VISION) if s.slice == number)
        assert abs(last - frame.timestamp_ns * rate // 10**9) <= 8
    assert {m for m in sample.members if m.startswith("audio")} == {"audio-0.flac", "audio-1.flac"}


def test_clips_hold_their_own_part_alone(tmp_path):
    times = [40 * i for i in range(150)]  # 6 s
    data = video_bytes(level_images(0, 150), times, [(4000, [(0, ramp(0, 24_000))])])
    (tmp_path / "v.mkv").write_bytes(data)
    samples, _ = read("video", tmp_path, slices=4)
    assert list(samples) == ["v_mkv-00000000", "v_mkv-00002000", "v_mkv-00004000"]
    for number, sample in enumerate(samples.values()):
        assert len(by_kind(sample, Modality.VISION)) == 4 and not any(m.endswith("mkv") for m in sample.members)
        pieces = heard(sample)
        for s in by_kind(sample, Modality.VISION):
            first, last = pieces[s.slice]
            assert abs(last - 4 * (2000 * number + s.timestamp_ns // MS)) <= 4  # Matroska rounds to a millisecond
            assert last - first + 1 == 2000 or (number, s.slice, first) == (0, 0, 0)
        stored, _ = audio_info(sample.members["audio-0.flac"], "x")
        # From half a second before the first frame to the last frame, with what resampling needs around.
        assert 0 <= stored - (last + 1 - pieces[0][0]) <= 4 * (10 + 40 + 10)
        assert json.loads(sample.members["clip.json"])["start_ns"] == number * 2000 * MS
    assert only(read("video", tmp_path / "v.mkv", slices=20, audio_stream="none")[0]).flags == {}


@pytest.mark.parametrize("audio_first", [False, True])
def test_of_several_streams_one_must_be_chosen(tmp_path, audio_first):
    frames = [level_images(0, 30), level_images(3, 30, 64, 128)]
    audio = [(8000, [(0, ramp(0, 9600))]), (16_000, [(0, ramp(0, 19_200))])]
    data = video_bytes(frames, [40 * i for i in range(30)], audio, audio_first=audio_first)
    (tmp_path / "v.mkv").write_bytes(data)
    videos, audios = ((2, 3), (0, 1)) if audio_first else ((0, 1), (2, 3))
    samples, refused = read("video", tmp_path)
    assert not samples and refused["v_mkv"].reason == "ambiguous audio stream"
    assert f"{audios[0]} (pcm_s16le 8000 Hz), {audios[1]} (pcm_s16le 16000 Hz); some" in str(refused["v_mkv"])
    assert "set audio_stream to a number or to best" in str(refused["v_mkv"])
    for seen, size in zip(videos, ((32, 64), (64, 128))):
        for audio, rate in zip(audios, (8000, 16_000)):
            choice = {"video_stream": seen, "audio_stream": audio, "video_backend": "pyav"}
            sample = only(read("video", tmp_path, **choice)[0])
            assert {(s.height, s.width) for s in by_kind(sample, Modality.VISION)} == {size}
            assert {s.rate for s in by_kind(sample, Modality.AUDIO)} == {rate}
            about = json.loads(sample.members["clip.json"])
            assert (about["video_stream"], about["audio_stream"], about["video_backend"]) == (seen, audio, "pyav")
    best = only(read("video", tmp_path, audio_stream="best")[0])
    assert by_kind(best, Modality.VISION)[0].height == 32 and by_kind(best, Modality.AUDIO)[0].rate == 16_000
    _, refused = read("video", tmp_path, video_stream=videos[1], audio_stream=audios[0], video_backend="decord")
    assert "it reads the best video stream only; set video_backend=auto" in str(*refused.values())
    _, refused = read("video", tmp_path, video_stream=9)
    assert refused["v_mkv"].reason == "no such stream" and "has no video stream 9, only" in str(refused["v_mkv"])


def test_a_silent_audio_is_counted_and_may_be_left_out(tmp_path):
    audio = [(8000, [(0, np.zeros(8000, np.int16))])]
    (tmp_path / "v.mkv").write_bytes(video_bytes(level_images(0, 25), [40 * i for i in range(25)], audio))
    kept = only(read("video", tmp_path)[0])
    assert len(by_kind(kept, Modality.AUDIO)) == 2 and not kept.flags
    manifest, _ = run("video", tmp_path, tmp_path / "out", prepare={"heldout_share": 0, "audio": {"kind": "mimi"}})
    assert manifest.splits["train"].flagged == {"audio: silent": 2}
    left = only(read("video", tmp_path / "v.mkv", silent_audio="leave_out")[0])
    assert not by_kind(left, Modality.AUDIO) and "audio-0.flac" not in left.members
    assert left.flags == {"audio: silent, left out": 1, "audio: absent": 2}


@pytest.mark.parametrize("backend", OPTIONAL_PACKAGES)
@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotated_video_is_upright(tmp_path, backend, degrees):
    plain = video(images(25, 64, 96), crf=1)
    (tmp_path / "v.mp4").write_bytes(turned(plain, degrees))
    sample = only(read("video", tmp_path, video_backend=backend)[0])
    with av.open(str(tmp_path / "v.mp4")) as file:
        stored = [f.to_ndarray(format="rgb24") for f in file.decode(video=0)]
    for segment, number in zip(by_kind(sample, Modality.VISION), (12, 24), strict=True):
        ours = load_image(sample.members[segment.member], "x")
        theirs = np.rot90(stored[number], -degrees // 90)
        assert ours.shape[:2] == (segment.height, segment.width) == theirs.shape[:2]
        assert np.abs(ours.astype(int) - theirs).mean() < 3


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
def test_avi_with_garbage_times_is_read_and_refused_to_decord_by_name(tmp_path, codec):
    frames = level_images(0, 30)
    (tmp_path / "v.avi").write_bytes(video(frames, container="avi", codec=codec, bf=2))
    samples, refused = read("video", tmp_path, video_backend="decord")
    assert not samples and "v.avi" in str(*refused.values()) and "set video_backend=auto" in str(*refused.values())
    sample = only(read("video", tmp_path)[0])
    assert shown(sample) == [12, 24]
    assert [s.timestamp_ns for s in by_kind(sample, Modality.VISION)] == [480 * MS, 960 * MS]


def sequential(file, kind):
    """What PyAV decodes of a file from its start on: frames by their times in ms, or mono audio [n] in [-1, 1]."""
    with av.open(str(file)) as container:
        decoded = list(container.decode(**{kind: 0}))
    if kind == "video":
        return {round(frame.time * 1000): frame.to_ndarray(format="rgb24") for frame in decoded}
    wave = np.concatenate([frame.to_ndarray().reshape(-1) for frame in decoded])
    return wave / 2**15 if wave.dtype == np.int16 else wave


@pytest.mark.parametrize(
    "suffix, container, audio_codec, rate",
    [
        ("avi", "avi", "pcm_s16le", 8000),
        ("avi", "avi", "libmp3lame", 16_000),
        ("mkv", "matroska", "pcm_s16le", 8000),
        ("mov", "mov", "pcm_s16le", 8000),
        ("mp4", "mp4", "aac", 16_000),
    ],
)
def test_every_clip_is_what_decoding_from_the_start_gives(tmp_path, suffix, container, audio_codec, rate):
    """The first clip too: AVI cannot be sought to a time before its beginning."""
    times = [40 * i for i in range(100)]  # 4 s
    wave = (12_000 * np.sin(np.arange(4 * rate) ** 2 * 5e-6)).astype(np.int16)
    made = {"container": container, "codec": "mpeg4", "audio_codec": audio_codec}
    data = video_bytes(level_images(0, 100), times, [(rate, [(0, wave)])], **made)
    file = tmp_path / f"v.{suffix}"
    file.write_bytes(data)
    samples, refused = read("video", file, slices=4)
    assert not refused and [int(key[-8:]) for key in samples] == [0, 2000]
    frames, whole = sequential(file, "video"), sequential(file, "audio")
    for key, sample in samples.items():
        pieces = by_kind(sample, Modality.AUDIO)
        assert len(pieces) == len(by_kind(sample, Modality.VISION)) == 4 and not sample.flags
        for image, piece in zip(by_kind(sample, Modality.VISION), pieces, strict=True):
            time_ms = int(key[-8:]) + image.timestamp_ns // MS
            shows = load_image(sample.members[image.member], "x").astype(int)
            assert np.abs(shows - frames[time_ms]).mean() < 1
            heard_wave, _ = load_audio(sample.members[piece.member], piece.start, piece.stop, "x")
            last = time_ms * rate // 1000
            theirs = whole[last + 1 - len(heard_wave) : last + 1]
            assert len(heard_wave) == rate // 2 or last < rate // 2
            assert np.abs(heard_wave - theirs).max() < 2**-14


def test_audio_of_slices_is_resampled_as_that_of_the_whole_video_is(tmp_path):
    """Of every clip and slice; the ids of a document are as many as its plan says."""
    times, rate, target = [40 * i for i in range(150)], 44_100, 8000
    wave = (4000 * np.random.default_rng(0).normal(size=6 * rate)).astype(np.int16)
    file = tmp_path / "v.mov"
    made = {"container": "mov", "codec": "mpeg4"}
    file.write_bytes(video_bytes(level_images(0, 150), times, [(rate, [(0, wave)])], **made))
    samples, refused = read("video", file, slices=4)
    assert not refused and len(samples) == 3
    whole = torchaudio.functional.resample(torch.from_numpy(wave / np.float32(2**15)), rate, target).numpy()
    for key, sample in samples.items():
        for s in by_kind(sample, Modality.AUDIO):
            piece = load_resampled(sample.members[s.member], s.start, s.stop, target, "x")
            end = round((int(key[-8:]) + (s.timestamp_ns + s.offset_ns) / MS) * target / 1000) + 1
            near = [stop for stop in range(end - 1, end + 2) if stop >= len(piece)]  # the samples nearest to that time
            assert min(np.abs(piece - whole[stop - len(piece) : stop]).max() for stop in near) < 1e-6
    prepare = {"heldout_share": 0, "audio": {"codebooks": 2, "mel": {"codebook_size": 8}}}
    manifest, _ = run("video", file, tmp_path / "out", prepare=prepare, slices=4)
    audio = AudioConfig(path=str(tmp_path / "out/audio_codec.safetensors"), **prepare["audio"])
    tokenizers = TokenizersConfig(audio=audio).build({"v": manifest})
    tars = tuple(str(tmp_path / "out" / shard.path) for shard in manifest.splits["train"].shards)
    loader = SampleLoader([SourceFiles("v", tars)], tokenizers, "auto")
    for row in range(3):
        segments = loader.index(0, 0).row_segments(row)
        segments = segments[segments["modality"] == Modality.AUDIO]
        planned = Modality.AUDIO.spec.planned(segments, tokenizers, "v").tokens
        (document,) = loader(DocumentRef(0, 0, row, 0, 0, 4, False, True))
        assert np.isin(document.token_ids, list(tokenizers.vocabulary.ranges["audio"])).sum() == planned.sum() > 0


def test_a_seek_that_leads_too_far_is_made_up_for(tmp_path, monkeypatch):
    """Some indices of containers are wrong: what is before the place that was reached is read from the start."""
    times, rate = [40 * i for i in range(150)], 4000
    (tmp_path / "v.mkv").write_bytes(video_bytes(level_images(0, 150), times, [(rate, [(0, ramp(0, 6 * rate))])]))
    expected = [heard(sample) for sample in read("video", tmp_path, slices=4)[0].values()]
    opened = video_file.open_container

    class Astray:
        def __init__(self, container):
            self.container = container

        def __enter__(self):
            self.container.__enter__()
            return self

        def __exit__(self, *error):
            return self.container.__exit__(*error)

        def seek(self, ticks, stream):
            self.container.seek(ticks + 2000, stream=stream)

        def __getattr__(self, name):
            return getattr(self.container, name)

    monkeypatch.setattr(video_file, "open_container", lambda *of: Astray(opened(*of)))
    assert [heard(sample) for sample in read("video", tmp_path, slices=4)[0].values()] == expected


def test_audio_whose_times_deviate_for_a_block_is_whole(tmp_path):
    """Vorbis in WebM: what a block of another size is off by, up to 11 ms, the next one repays."""
    seconds, fps, rate = 30, 5, 44_100
    wave, frames = clicks(seconds, rate), level_images(0, 25)[np.arange(seconds * fps) % 25]
    (tmp_path / "v.webm").write_bytes(webm_bytes(frames, fps, wave, rate))
    with av.open(str(tmp_path / "v.webm")) as file:
        begin = float(file.streams.video[0].start_time * file.streams.video[0].time_base)
        decoded = [(frame.time - begin, frame.samples) for frame in file.decode(audio=0)]
    counted = np.cumsum([0] + [samples for _, samples in decoded])[:-1] / rate
    off = np.array([time for time, _ in decoded]) - counted
    assert (np.abs(off - off[0]) > 0.005).sum() > 30  # so the file is one of those
    samples, refused = read("video", tmp_path)
    assert not refused and not any(sample.flags for sample in samples.values())
    pieces = [s for sample in samples.values() for s in by_kind(sample, Modality.AUDIO)]
    # The first of the 60 slices has the audio from the beginning to its frame, at 0.4 s.
    assert len(pieces) == 60 and sum(s.stop - s.start for s in pieces) == 59 * rate // 2 + rate * 2 // 5 + 1
    whole = sequential(tmp_path / "v.webm", "audio")
    for key, sample in samples.items():
        for s in by_kind(sample, Modality.AUDIO)[1:]:
            piece, _ = load_audio(sample.members[s.member], s.start, s.stop, "x")
            end = round((int(key[-8:]) + (s.timestamp_ns + s.offset_ns) / MS - 1000 * decoded[0][0]) * rate / 1000)
            late = np.arange(-90, 91)  # samples of two milliseconds: what the container rounds times to, twice
            late = late[end + late <= len(whole)]
            assert min(np.abs(piece - whole[end + n - len(piece) : end + n]).max() for n in late) < 2**-14


def test_a_gap_that_lasts_is_cut_and_counted_among_blocks_that_deviate(tmp_path):
    seconds, fps, rate = 8, 5, 44_100
    frames = level_images(0, 25)[np.arange(seconds * fps + 3) % 25]
    (tmp_path / "v.webm").write_bytes(webm_bytes(frames, fps, clicks(seconds, rate), rate, gap_ms=700))
    sample = only(read("video", tmp_path, slices=20)[0])
    assert {m for m in sample.members if m.startswith("audio")} == {"audio-0.flac", "audio-1.flac"}
    assert sample.flags == {"audio: absent": 2}  # at 4.4 and 4.8 s
    stored = [audio_info(sample.members[f"audio-{number}.flac"], "x")[0] / rate for number in (0, 1)]
    assert abs(stored[0] - 4.0) < 0.03 and abs(stored[1] - (8.4 - 4.7)) < 0.03  # the last frame is at 8.4 s


def test_a_video_without_a_duration_is_measured_by_its_frames(tmp_path):
    times = [40 * i for i in range(30)]
    (tmp_path / "v.mkv").write_bytes(video_bytes(level_images(0, 30), times, [(8000, [(0, ramp(0, 9600))])], pipe=True))
    with av.open(str(tmp_path / "v.mkv")) as file:
        assert file.duration is None
    samples, _ = read("video", tmp_path, slices=1)
    assert [shown(sample) for sample in samples.values()] == [[12], [24]]
    assert all(set(heard(sample)) == {0} for sample in samples.values())


def test_a_video_shorter_than_a_period_is_one_slice(tmp_path):
    (tmp_path / "v.mp4").write_bytes(video(level_images(0, 5)))
    assert shown(only(read("video", tmp_path)[0])) == [4]


def test_captions_follow_the_last_slice_as_a_pair(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a.mp4", "sub/b.mp4"):
        (tmp_path / name).write_bytes(video(level_images(0, 50)))
    rows = [
        {"video": "a.mp4", "caption": "all of it"},
        {"video": "sub/b.mp4", "caption": "the end", "start_s": 1.0},
        {"video": "sub/b.mp4", "caption": "the beginning", "start_s": 0, "stop_s": 1.0},
        {"video": "c.mp4", "caption": "nothing"},
        {"video": "a.mp4", "caption": "x", "start_s": "1"},
    ]
    write_jsonl(tmp_path / "captions.jsonl", rows)
    samples, refused = read("video", tmp_path, slices=2)
    assert {key: texts(s) for key, s in samples.items()} == {
        "a_mp4-00000000": ["all of it"],
        "a_mp4-00001000": ["all of it"],
        "sub/b_mp4-00000000": ["the beginning"],
        "sub/b_mp4-00001000": ["the end"],
    }
    sample = samples["a_mp4-00000000"]
    assert sample.segments[-1].modality is Modality.TEXT and sample.segments[-1].slice == 1
    assert {s.pair for s in sample.segments} == {0} and sample.members["txt"] == b"all of it"
    assert sorted(r.reason for r in refused.values()) == ["malformed row", "missing file"]


def test_broken_files_are_refused_alone(tmp_path):
    whole = video(level_images(0, 50), g=10)
    (tmp_path / "good.mp4").write_bytes(whole)
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "none.webm").write_bytes(b"nothing")
    samples, refused = read("video", tmp_path)
    assert set(samples) == {"good_mp4-00000000"} and set(refused) == {"cut_mp4", "none_webm"}
    assert {r.reason for r in refused.values()} == {"unreadable image or video"}
    with pytest.raises(DataError, match="holds no video"):
        read("video", tmp_path / "empty")


def test_prepared_videos_can_be_read_back(tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(8):
        audio = [(8000, [(0, ramp(7 * number, 16_000))])]
        data = video_bytes(level_images(number, 50), [40 * i for i in range(50)], audio)
        (tmp_path / "in" / f"{number}.mkv").write_bytes(data)
    small = {"audio": {"codebooks": 2, "mel": {"codebook_size": 8}}}
    manifest, _ = run("video", tmp_path / "in", tmp_path / "out", prepare=small)
    counts = read_everything(tmp_path / "out", manifest)
    assert counts["train", "VISION"] == counts["train", "AUDIO"] == 28 and counts["heldout", "VISION"] == 4
    assert manifest.clock == "captured" and manifest.skew_budget_ns == 10 * MS


@pytest.mark.real_data
@pytest.mark.parametrize("name, choice", [("rabbit320", {}), ("nasa_13013", {"video_stream": 3, "audio_stream": 1})])
def test_real_audio_is_the_same_from_the_middle_as_from_the_start(shared_data, name, choice):
    """Each clip seeks; its audio must be that of decoding the whole video in order."""
    file = shared_data / f"video/{name}.mp4"
    samples, refused = read("video", file, slices=3, **choice)
    assert not refused and len(samples) > 4
    with av.open(str(file)) as container:
        stream = container.streams[choice.get("audio_stream", 1)]
        whole = np.concatenate([f.to_ndarray().mean(axis=0) for f in container.decode(stream)])
        rate = stream.rate
    assert np.abs(whole).max() > 0.05
    for key, sample in samples.items():
        for s in by_kind(sample, Modality.AUDIO):
            wave, found = load_audio(sample.members[s.member], s.start, s.stop, "x")
            end_ns = int(key[-8:]) * MS + s.timestamp_ns + s.offset_ns
            last = round(end_ns * rate / 1e9)
            theirs = whole[last + 1 - len(wave) : last + 1]
            assert found == rate and np.abs(wave - theirs).max() < 2**-14


@pytest.mark.real_data
def test_real_streams_are_refused_chosen_and_silent(shared_data):
    samples, refused = read("video", shared_data / "video")
    assert refused.pop("PROBE.md").reason == "file of another kind"
    assert refused.keys() == {"nasa_13013_mp4"} and refused["nasa_13013_mp4"].reason == "ambiguous video stream"
    _, refused = read("video", shared_data / "video", video_stream="best")
    assert refused["nasa_13013_mp4"].reason == "ambiguous audio stream"
    assert "1 (aac 8000 Hz), 4 (aac 16000 Hz)" in str(refused["nasa_13013_mp4"])
    by_name = {}
    for key, sample in samples.items():
        by_name.setdefault(key.split("_mp4")[0], []).append(sample)
    silent = by_name["udacity_solidWhiteRight"]
    assert len(silent) == 3 and not any(s.flags for s in silent)  # counted by preparation, as in every reader
    assert [len(by_kind(s, Modality.VISION)) for s in silent] == [8, 8, 1]  # 8.84 s
    assert all(not s.flags for s in by_name["rabbit320"])


def test_the_stored_image_of_a_time_is_the_frame_of_that_time(tmp_path):
    """Sixty videos of mixed codecs, GOPs and edit lists; decord shows the same or refuses by name."""
    for video_made in VIDEOS:
        video_made.save(tmp_path)
    for backend, most_refused in (("auto", 0), ("decord", 50)):
        samples, refused = read("video", tmp_path, video_backend=backend, slices=4, slice_period_ns=200 * MS)
        wrong = []
        for key, sample in samples.items():
            about = json.loads(sample.members["clip.json"])
            cut = next(clip.first for clip in VIDEOS if clip.name == about["file"])
            for segment in by_kind(sample, Modality.VISION):
                time_ns = about["start_ns"] + segment.timestamp_ns + segment.offset_ns
                shows, expected = number_of(load_image(sample.members[segment.member], "x")), cut + time_ns * RATE / 1e9
                if shows != round(expected):
                    wrong.append((key, expected, shows))
        assert not wrong
        assert len({key.rpartition("-")[0] for key in refused}) <= most_refused
        assert all("set video_backend=auto" in str(refusal) for refusal in refused.values())


def test_images_that_the_decoder_makes_up_are_counted(tmp_path):
    (tmp_path / "v.mp4").write_bytes(damaged(video(textured(50), codec="mpeg4", g=25, bf=0), 30))
    sample = only(read("video", tmp_path)[0])
    assert sample.flags[DAMAGED] == 2 and len(by_kind(sample, Modality.VISION)) == 4  # at 1.48 and 1.96 s


def test_what_is_no_video_is_refused_alone_and_does_not_hang(tmp_path):
    (tmp_path / "good.mp4").write_bytes(video(level_images(0, 25)))
    (tmp_path / "years.mkv").write_bytes(lasting(video(level_images(0, 25), container="matroska"), 3.2e12))
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile good.mp4\n")
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "zero.mp4").symlink_to("/dev/zero")
    samples, refused = read("video", tmp_path)
    assert set(samples) == {"good_mp4-00000000"}
    reasons = {key: refusal.reason for key, refusal in refused.items()}
    unreadable, odd = "unreadable image or video", "no regular file"
    assert reasons == {"years_mkv": BEYOND, "list_mp4": unreadable, "pipe.mp4": odd, "zero.mp4": odd}


def test_captions_whose_times_hold_nowhere_are_refused_one_by_one(tmp_path):
    """A video of four seconds; json.dumps writes NaN and Infinity as JSON's readers take them."""
    (tmp_path / "a.mp4").write_bytes(video_bytes(level_images(0, 40), [100 * i for i in range(40)], []))
    (tmp_path / "b.MP4").write_bytes((tmp_path / "a.mp4").read_bytes())
    (tmp_path / "c.m4v").write_bytes(b"")
    rows = {
        "used": {"start_s": 1.0, "stop_s": 2.0},
        "open end": {"start_s": 0.0, "stop_s": None},
        "from the start": {"start_s": None, "stop_s": 1.5},
        "dot": {"video": "./a.mp4", "start_s": 3.5},
        "nan": {"start_s": float("nan"), "stop_s": 2},
        "endless": {"start_s": 0, "stop_s": float("inf")},
        "swapped": {"start_s": 3.0, "stop_s": 1.0},
        "instant": {"start_s": 1.0, "stop_s": 1.0},
        "ms": {"start_s": 1000, "stop_s": 2000},
        "before": {"start_s": -1.0, "stop_s": 1.0},
        "elsewhere": {"video": "z.mp4"},
    }
    write_jsonl(tmp_path / "captions.jsonl", [{"video": "a.mp4", "caption": name} | row for name, row in rows.items()])
    samples, refused = read("video", tmp_path)
    assert len(samples) == 2 and texts(samples["a_mp4-00000000"]) == ["from the start open end used dot"]
    lines = {int(key.rpartition(" ")[2]): r.reason for key, r in refused.items() if "line" in key}
    names = list(rows)
    assert {names[number - 1]: reason for number, reason in lines.items()} == {
        "nan": "malformed row",
        "endless": "malformed row",
        **dict.fromkeys(("swapped", "instant", "ms", "before"), "caption holds nowhere"),
        "elsewhere": "missing file",
    }
    assert refused["c.m4v"].reason == "file of another kind"
