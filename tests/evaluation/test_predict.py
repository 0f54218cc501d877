"""Actions predicted for `mmoe generate` are those that are measured, be a slice read from a shard or from files."""

import numpy as np
import pytest
import torch

from mmoe.data.index.shard_index import ShardIndex
from mmoe.errors import ConfigError, DataError
from mmoe.evaluation.actions import align, chunk_starts, predict_actions, read_chunks
from mmoe.evaluation.inference import inference
from mmoe.evaluation.predict import predict_clip, predict_slice
from mmoe.schema.modality import Modality
from tests.data.recordings_robot import write_bridge
from tests.preparation import test_prepare


@pytest.fixture(scope="module")
def arms(tmp_path_factory):
    """Bridge episodes as files, and prepared with one slice a clip and with three."""
    root = tmp_path_factory.mktemp("arms")
    write_bridge(root / "in", [{"steps": n, "cameras": [2, 0]} for n in (5, 3, 4, 6, 2, 5)])
    for slices in (1, 3):
        test_prepare.run("bridge", root / "in", root / f"arm{slices}", slices=slices)
    return root


@pytest.fixture(scope="module", params=["continuous", "discrete"])
def acting(request, build_run, arms, prepared):
    names = {"arm1": arms / "arm1", "arm3": arms / "arm3", "clip": prepared / "clip"}
    run = build_run(
        data__sources={
            **{name: {"kind": "bridge", "shards": str(folder)} for name, folder in names.items()},
            "text": {"kind": "text", "shards": str(prepared / "text")},
        },
        tokenizers__action={"chunk": 4, "mode": request.param, "bins": 16},
    )
    torch.manual_seed(0)
    for weight in run.model.parameters():  # as initialized it predicts the same, whatever it sees
        torch.nn.init.normal_(weight, std=0.3)
    return run


def test_a_slice_of_files_is_answered_as_the_same_slice_of_a_shard(acting, arms):
    for episode, step in ((0, 4), (3, 0), (5, 2)):
        folder = arms / f"in/ep{episode:02d}"
        with np.load(folder / "steps.npz") as tables:
            state, action = tables["state"], tables["action"]
        answer = predict_slice(
            acting,
            "arm1",
            images=[f"front_right={folder}/image_2_{step:02d}.jpg", f"front={folder}/image_0_{step:02d}.jpg"],
            state=state[step].tolist(),
            instruction=f"task {episode}",
        )
        (stored,) = predict_clip(acting, "arm1", f"ep{episode:02d}-{step:04d}")
        np.testing.assert_allclose(answer.predicted, stored.predicted, rtol=1e-5, atol=1e-5)
        assert (
            answer.names
            == stored.names
            == (*(f"delta_{n}" for n in ("x", "y", "z", "roll", "pitch", "yaw")), "gripper")
        )
        assert answer.predicted.shape == (4, 7) and answer.period_ns == 200_000_000 and answer.logged is None
        inside = action[step : step + 4]
        np.testing.assert_allclose(stored.logged[: len(inside)], inside, rtol=1e-6)
        assert np.isnan(stored.logged[len(inside) :]).all()
        bare = predict_slice(acting, "arm1", state=state[step].tolist())
        assert (bare.predicted != answer.predicted).any()


def test_a_clip_is_answered_as_it_is_measured(acting):
    """Every chunk that is held out, one by one and in the batches of the evaluation, in the source's units."""
    batches, chunks = (
        acting.heldout(isolated=False, only=["arm3", "clip"]),
        read_chunks(acting.sources, acting.tokenizers, "heldout"),
    )
    parts, values = [], []
    with inference(acting) as model:
        for batch in batches:
            starts, part = chunk_starts(batch)
            values.append(predict_actions(model, acting.model(batch).hidden, batch, starts, part))
            parts.append(part)
    measured = align(np.concatenate(parts), np.concatenate(values), chunks)
    compared = 0
    for source in ("arm3", "clip"):
        number, columns = acting.sources.names.index(source), acting.tokenizers.dims[Modality.ACTION].columns[source]
        mine = [at for at, key in enumerate(chunks.keys) if key[0] == number]
        expected = acting.tokenizers.actions[source].denormalize(measured[mine][:, :, columns])
        logged = acting.tokenizers.actions[source].denormalize(chunks.target[mine][:, :, columns])
        rows = sorted({chunks.keys[at][1:3] for at in mine})
        keys = [index_of(acting, number, shard).keys[row] for shard, row in rows]
        answers = [chunk for key in keys for chunk in predict_clip(acting, source, key)]
        np.testing.assert_allclose([a.predicted for a in answers], expected, rtol=1e-4, atol=1e-4)
        inside = chunks.mask[mine][:, :, columns]
        np.testing.assert_allclose(np.array([a.logged for a in answers])[inside], logged[inside], rtol=1e-4, atol=1e-5)
        assert [a.time_ns for a in answers] == chunks.time_ns[mine].tolist()
        compared += len(answers)
    assert compared > 8


def index_of(run, source, shard):
    return ShardIndex.read(run.sources.files("heldout")[source].tars[shard])


def test_what_a_slice_of_the_source_does_not_hold_is_refused_by_name(acting, arms):
    image = f"{arms}/in/ep00/image_0_00.jpg"
    zeros = [0.0] * 7
    for options, said in (
        ({"images": [image]}, "a slice of arm1 holds an image of front_right, an image of front, a state; say which"),
        (
            {"images": [f"fornt={image}"]},
            "fornt is no camera of arm1; did you mean front[?] its slices show front_right, front",
        ),
        ({"images": [f"front={image}", f"front={image}"]}, "two images are of one camera"),
        ({"state": [1.0]}, "--state has 1 numbers; give one for each dimension of arm1: x, y, z, roll, pitch"),
        ({}, "nothing is given to act on; a slice of arm1 holds an image of"),
    ):
        with pytest.raises(ConfigError, match=said):
            predict_slice(acting, "arm1", **options)
    remedy = "; give a number in this range, the dimensions in the order x, y, z, roll, pitch"
    with pytest.raises(DataError, match=f"--state: y is 1e.09, but in arm1 it goes from 0.1 to 516.1{remedy}"):
        predict_slice(acting, "arm1", state=[5.0, 1e9, *zeros[2:]])
    with pytest.raises(DataError, match="--state: x is nan"):
        predict_slice(acting, "arm1", state=[float("nan"), *zeros[1:]])
    with pytest.raises(DataError, match="--state: speed is inf"):
        predict_slice(acting, "clip", state=[float("inf")])
    with pytest.raises(DataError, match="missing.png cannot be read"):
        predict_slice(acting, "arm1", images=[f"front={arms}/missing.png"])
    with pytest.raises(
        ConfigError, match="text in slices of clip stands behind the action, which cannot follow from it"
    ):
        predict_slice(acting, "clip", state=[0.0], instruction="go")
    with pytest.raises(
        ConfigError, match="source text of .* has no actions to predict; those that do: arm1, arm3, clip"
    ):
        predict_slice(acting, "text", state=[0.0])
    with pytest.raises(ConfigError, match="has no source 'arm'; did you mean arm[13]"):
        predict_clip(acting, "arm", "x")
    with pytest.raises(ConfigError, match="source arm3 has no sample 'ep09-0000'; it has such as ep"):
        predict_clip(acting, "arm3", "ep09-0000")
