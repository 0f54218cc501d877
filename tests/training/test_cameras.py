"""Seven cameras from a recipe to a training step, beside a source of the standard six."""

import numpy as np
import pytest

from mmoe.config.load import validate
from mmoe.data.load.decode import SampleLoader
from mmoe.data.plan.planner import DocumentRef
from mmoe.errors import DataError
from mmoe.evaluation.evaluate import evaluate
from mmoe.preparation.prepare import prepare
from mmoe.recipe.config import RunConfig
from mmoe.schema.manifest import SourceManifest
from mmoe.schema.modality import Modality
from mmoe.schema.rig import STANDARD
from mmoe.tokenizers.text import TextTokenizer
from mmoe.training.fingerprint import fingerprint
from mmoe.training.loop import Trainer
from mmoe.training.run import Run
from tests.data.recordings_robot import write_lerobot

SEVEN = ("wrist_left", "front", "wrist_right", "head", "back", "top", "back_left")
UNION = (*STANDARD.cameras, "wrist_left", "wrist_right", "head", "top")
SIX = STANDARD.cameras


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The sources `six` and `seven`, of as many cameras, and `renamed`: `seven` with two names exchanged."""
    root = tmp_path_factory.mktemp("cameras")
    rigs = {"six": SIX, "seven": SEVEN, "renamed": (SEVEN[1], SEVEN[0], *SEVEN[2:])}
    for name, cameras in rigs.items():
        features = {f"observation.images.{camera}": camera for camera in cameras}
        write_lerobot(root / f"{name}-in", [3] * 8, cameras=(), stored=tuple(features))
        options = {"cameras": features, "slices": 2} | ({} if cameras == SIX else {"rig": {"cameras": list(cameras)}})
        prepare("lerobot", root / f"{name}-in", root / name, text_tokenizer=TextTokenizer.bytes(), options=options)
    return root


def build(folder, *names, run="run") -> Run:
    tree = {
        "data": {
            "sources": {name: {"kind": "lerobot", "shards": str(folder / name)} for name in names},
            "sequence_length": 256,
        },
        "tokenizers": {"vision": {"patch": 16, "max_patches": 8}, "action": {"chunk": 3}},
        "model": {"d_model": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "intermediate_size": 16},
        "losses": {"contrastive": {"weight": 0.0}},
        "optim": {"lr": {"peak": 1e-2}},
        "training": {
            "run": str(folder / run),
            "micro_batch_sequences": 2,
            "global_batch_positions": 1024,
            "budget_positions": 1024,
        },
    }
    return Run.build(validate(RunConfig, tree, "test"))


def decoded(run: Run, source: int):
    """The first clip of a source and its segments of images."""
    decoder = SampleLoader(run.sources.files("train"), run.tokenizers, "pyav")
    index = decoder.index(source, 0)
    seen = index.row_segments(0)
    (document,) = decoder(DocumentRef(source, 0, 0, 0, 0, 2, isolated=False, is_last=True))
    return document, seen[seen["modality"] == Modality.VISION]


def test_a_manifest_names_the_rig_of_its_recipe(folder):
    assert SourceManifest.load(folder / "six").rig == STANDARD
    assert SourceManifest.load(folder / "seven").rig.cameras == SEVEN


def test_seven_cameras_go_from_shards_to_a_step(folder):
    run = build(folder, "six", "seven")
    assert run.tokenizers.rig.cameras == UNION
    document, seen = decoded(run, 1)
    assert [SEVEN[number] for number in seen["camera"]] == [*SEVEN, *SEVEN]
    vocabulary = run.tokenizers.vocabulary
    announced = [
        (vocabulary.name(int(token)), UNION[camera])
        for token, camera, kind in zip(document.token_ids, document.camera, document.modality)
        if camera >= 0 and kind == Modality.STRUCTURE
    ]
    assert announced == [(f"cam_{name}", name) for name in (*SEVEN, *SEVEN)]
    patches = document.camera[document.modality == Modality.VISION]
    assert np.unique(patches).tolist() == sorted(UNION.index(name) for name in SEVEN)

    table = run.model.embeddings.camera.weight
    before = table.detach().clone()
    trainer = Trainer(run, [])
    data = next(iter(trainer.state.stream.steps()))
    batches = list(data.batches)
    held = {camera for batch in batches for camera in batch.camera.unique().tolist()} - {-1}
    assert held == set(range(len(UNION)))
    trainer.train()
    assert table.shape == (len(UNION), 16) and (table != before).any(dim=1).all()


def test_a_source_of_seven_moves_no_number_and_no_id_of_one_of_six(folder):
    alone, beside = build(folder, "six"), build(folder, "seven", "six")
    (one, seen), (other, _) = decoded(alone, 0), decoded(beside, 1)
    for field in ("token_ids", "camera", "labels", "modality", "position", "offset_ns"):
        np.testing.assert_array_equal(getattr(one, field), getattr(other, field))
    assert one.camera[one.camera >= 0].max() == seen["camera"].max() == 5
    before, after = alone.tokenizers.vocabulary, beside.tokenizers.vocabulary
    assert after.size == before.size + len(UNION) - len(SIX)
    assert [after.name(id) for id in range(before.size)] == [before.name(id) for id in range(before.size)]
    assert alone.model.embeddings.camera.weight.shape == (6, 16)


def test_a_checkpoint_knows_the_rig_of_a_source_that_has_another(folder):
    run = build(folder, "six", "seven")
    known = fingerprint(run.sources, run.tokenizers)
    other = build(folder, "six", "renamed")
    assert "cameras" not in known["source six"]
    changed = fingerprint(other.sources, other.tokenizers)["source renamed"]["cameras"]
    assert known["source seven"]["cameras"] != changed


def test_shards_of_another_rig_are_not_read_as_those_of_the_run(folder):
    run = build(folder, "seven")
    with pytest.raises(DataError, match="with the same modalities, cameras and dimension names"):
        evaluate(run, shards=str(folder / "renamed"))


def test_a_camera_beyond_the_rig_is_a_fault_of_the_shard(folder):
    run = build(folder, "seven")
    run.tokenizers.cameras["seven"] = run.tokenizers.cameras["seven"][2:]
    with pytest.raises(DataError, match="is of camera 5, but the rig of seven has 5 cameras; prepare the source again"):
        decoded(run, 0)
