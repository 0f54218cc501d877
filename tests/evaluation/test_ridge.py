"""The ridge and the features it reads."""

import numpy as np
import pytest
import torch

from mmoe.evaluation.baselines import Baselines, read_features
from mmoe.evaluation.features import FeatureRows
from mmoe.evaluation.ridge import fit_ridge
from mmoe.schema.modality import Modality


def planted(seed: int = 0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(600, 6)) * [1, 10, 0.1, 1, 1, 0] + [0, 5, 0, 0, 0, 3]
    truth = rng.normal(size=(6, 2, 3))
    y = np.einsum("mf,fha->mha", x, truth) + 2.0
    return x, y, np.arange(600) // 3


def test_a_linear_relation_is_recovered():
    x, y, document = planted()
    ridge = fit_ridge(x[:400], y[:400], np.ones(y[:400].shape, bool), document[:400], seed=0)
    np.testing.assert_allclose(ridge.predict(x[400:]), y[400:], atol=1e-3)


def test_masked_elements_do_not_count():
    x, y, document = planted()
    mask = np.random.default_rng(1).random(y.shape) < 0.7
    mask[:, 1] &= mask[:, :1].any(2)
    spoilt = np.where(mask, y, 1e6)
    np.testing.assert_allclose(fit_ridge(x, spoilt, mask, document, 0).predict(x), y, atol=1e-3)


def test_noise_is_answered_with_the_mean():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(300, 100)), rng.normal(size=(300, 1, 1)) + 4
    ridge = fit_ridge(x, y, np.ones(y.shape, bool), np.arange(300), seed=0)
    assert ridge.penalty >= 1.0
    assert ridge.predict(rng.normal(size=(200, 100))).std() < 0.3


def test_the_closed_form_agrees_with_gradient_descent():
    x, y, document = planted()
    y = y + np.random.default_rng(2).normal(size=y.shape)
    ridge = fit_ridge(x, y, np.ones(y.shape, bool), document, seed=0)
    standard = torch.tensor((x - x.mean(0)) / np.where(x.std(0) > 1e-9, x.std(0), np.inf))
    weights = torch.zeros(6, 6, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(y.reshape(600, -1).mean(0), requires_grad=True)
    optimizer = torch.optim.LBFGS([weights, bias], max_iter=100, tolerance_grad=1e-12)

    def loss():
        optimizer.zero_grad()
        error = (standard @ weights + bias - torch.tensor(y.reshape(600, -1))).square().sum() / 600
        value = error + ridge.penalty * weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    np.testing.assert_allclose(ridge.weights.reshape(6, -1), weights.detach().numpy(), atol=1e-5)


def test_features_are_the_same_with_and_without_images(run):
    seen = FeatureRows()
    for batch in run.heldout(isolated=False, only=["clip"]):
        seen.add(batch)
    blind = read_features(run, ["clip"])
    columns, _ = seen.frequent(10_000)
    order, blind_order = (np.lexsort(rows.parts.T) for rows in (seen, blind))
    np.testing.assert_array_equal(seen.parts[order], blind.parts[blind_order])
    np.testing.assert_allclose(seen.dense(columns)[order], blind.dense(columns)[blind_order])
    assert blind.frequent(10_000)[1] == len(columns)
    assert blind.frequent(5)[0].shape == (5,)


def test_features_hold_what_stands_before_the_action_and_nothing_after(run):
    """A caption follows its action, so a first slice has no text; a later one has that of the slices before."""
    for batch in run.heldout(isolated=False, only=["clip"]):
        rows = FeatureRows()
        rows.add(batch)
        columns, _ = rows.frequent(10_000)
        dense = rows.dense(columns)
        text = columns >= 5 << 48
        for number, at in enumerate(batch.action_index.tolist()):
            sequence, place = divmod(at, batch.shape[1])
            same = batch.document[sequence, :place] == batch.document[sequence, place]
            words = (batch.modality[sequence, :place] == Modality.TEXT) & same
            assert dense[number, text].sum() == words.sum()
            state = batch.values[Modality.STATE]
            own = batch.slice[sequence, :place] == batch.slice[sequence, place]
            mine = torch.nonzero((batch.modality[sequence, :place] == Modality.STATE) & same & own).flatten()
            if len(mine):
                value = state.values[state.index == sequence * batch.shape[1] + mine[0]].item()
                assert value in dense[number, columns == int(Modality.STATE) << 32].tolist()


def test_one_fit_serves_every_evaluation_until_the_data_changes(build_run, monkeypatch):
    run = build_run(names=("text", "clip"))
    first = Baselines.from_run(run)
    fits = []
    fit = Baselines.fit.__func__
    monkeypatch.setattr(Baselines, "fit", classmethod(lambda cls, run: fits.append(run) or fit(cls, run)))
    again = Baselines.from_run(run)
    assert not fits and again.record == first.record
    np.testing.assert_array_equal(again.ridges["clip"][1].weights, first.ridges["clip"][1].weights)
    np.testing.assert_array_equal(again.means["clip"], first.means["clip"])
    path = run.folder / "baselines.npz"
    path.write_bytes(path.read_bytes()[:100])
    Baselines.from_run(run)
    assert len(fits) == 1
    other = build_run(names=("text", "clip"), training__seed=1)
    (other.folder / "baselines.npz").write_bytes(path.read_bytes())
    Baselines.from_run(other)
    assert len(fits) == 2


@pytest.mark.parametrize("most", [5, 24])
def test_a_cap_takes_so_many_documents(run, most):
    rows = read_features(run, ["clip"], split="train", most_documents=most)
    assert len(np.unique(rows.parts[:, :3], axis=0)) in range(most - 2, most + 1)  # one may log no action
