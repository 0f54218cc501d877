"""Prepared clips of real formats become the documents that were planned; an instruction stands before its actions."""

import numpy as np
import pytest

from mmoe.data.load.decode import SampleLoader
from mmoe.data.plan.measure import measure_index
from mmoe.data.plan.planner import DocumentRef
from mmoe.schema.batch import IGNORE
from mmoe.schema.modality import Modality
from tests.data.recordings import write_jsonl
from tests.data.recordings_rlds import episode, write_rlds
from tests.data.recordings_robot import level_images, write_bridge, write_lerobot
from tests.data.recordings_video import ramp, video_bytes
from tests.data.streams import setup
from tests.preparation.test_prepare import run


def write_videos(folder):
    folder.mkdir()
    for number in range(8):
        audio = [(8000, [(600, ramp(7 * number, 8000))])]  # begins late, so that some slices have none
        (folder / f"{number}.mkv").write_bytes(
            video_bytes(level_images(number, 50), [40 * i for i in range(50)], audio)
        )
    write_jsonl(folder / "captions.jsonl", [{"video": f"{i}.mkv", "caption": f"video {i}"} for i in range(0, 8, 2)])


WRITERS = {
    "bridge": lambda folder: write_bridge(folder, [{"steps": n, "cameras": [0, 2]} for n in (5, 3, 7, 2)]),
    "lerobot": lambda folder: write_lerobot(folder, [5, 3, 7, 2]),
    "rlds": lambda folder: write_rlds(folder, {"train": [[episode(e, n) for e, n in enumerate((5, 3, 6, 2))]]}),
    "video": write_videos,
}
OPTIONS = {"rlds": {"rate_hz": 5}}


@pytest.mark.parametrize("kind", WRITERS)
def test_what_is_decoded_is_what_was_planned(tmp_path, kind):
    WRITERS[kind](tmp_path / "in")
    small = {"audio": {"codebooks": 2, "mel": {"codebook_size": 8}}}
    run(
        kind,
        tmp_path / "in",
        tmp_path / kind,
        slices=3,
        **OPTIONS.get(kind, {}),
        prepare=small | {"heldout_share": 0.3},
    )
    _, sources, tokenizers = setup(tmp_path, names=(kind,))
    decoder = SampleLoader(sources.files("train"), tokenizers, "pyav")
    seen = np.zeros(len(Modality), int)
    for shard in range(len(sources.files("train")[0].tars)):
        index = decoder.index(0, shard)
        measures = measure_index(index, tokenizers, kind)
        for row in range(len(index)):
            for isolated in {False, bool(measures.pairs[row])}:
                ref = DocumentRef(0, shard, row, 0, 0, int(measures.slices[row]), isolated, True)
                documents = decoder(ref)
                labels = np.concatenate([d.labels for d in documents])
                kinds = tokenizers.vocabulary.modality_of(labels[labels != IGNORE])
                expected = (measures.isolated_labels if isolated else measures.labels)[row]
                assert sum(map(len, documents)) == (measures.isolated if isolated else measures.length)[row]
                assert np.bincount(kinds, minlength=len(Modality)).tolist() == expected.tolist()
                assert sum(d.action_mask.sum() for d in documents) == measures.count("action_elements")[row]
            (document,) = decoder(DocumentRef(0, shard, row, 0, 0, int(measures.slices[row]), False, True))
            seen += np.bincount(document.modality, minlength=len(Modality))
            if kind != "video":
                text, action = (np.flatnonzero(document.modality == m) for m in (Modality.TEXT, Modality.ACTION))
                assert len(text) and text.max() < action.min()
                assert not document.spans  # no pair: isolated, the instruction would be hidden from the actions
    held = (Modality.VISION, Modality.TEXT, Modality.AUDIO if kind == "video" else Modality.ACTION)
    assert all(seen[list(held)] > 0)


def test_a_caption_and_the_images_of_its_clip_are_the_two_sides_of_one_pair(tmp_path):
    write_videos(tmp_path / "in")
    run("video", tmp_path / "in", tmp_path / "video", audio_stream="none", prepare={"heldout_share": 0.3})
    _, sources, tokenizers = setup(tmp_path, names=("video",))
    decoder = SampleLoader(sources.files("train"), tokenizers, "pyav")
    index = decoder.index(0, 0)
    spans = []
    for row in range(len(index)):
        documents = decoder(DocumentRef(0, 0, row, 0, 0, 4, True, True))
        spans.append([(number, s.pair, s.modality) for number, d in enumerate(documents) for s in d.spans])
    captioned = [of for of in spans if of]
    assert captioned and all(of == [(0, 0, Modality.VISION), (1, 0, Modality.TEXT)] for of in captioned)
