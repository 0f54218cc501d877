"""First weights from another run or a Hugging Face folder: every layout begins as one process does."""

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mmoe.commands import session
from mmoe.commands.console import Console
from mmoe.config.load import validate
from mmoe.interchange.export import export
from mmoe.interchange.start import take_weights
from mmoe.recipe.config import RunConfig
from mmoe.recipe.training import StartConfig
from mmoe.training.run import Run
from tests.data.synthetic import write_sources
from tests.training.test_trainer import config

LAYOUTS = {"dp2": {}, "ep2": {"ep": 2}, "tp2": {"tp": 2}, "pp2": {"pp": 2}, "zero1": {"zero": 1}}
FOUR = {"ep2,tp2": {"ep": 2, "tp": 2}, "pp2,ep2": {"pp": 2, "ep": 2}, "hsdp": {"dp_replicate": 2}}
COMMON = {"training__micro_batch_sequences": 1, "training__budget_positions": 1280}
DENSE = COMMON | {"model__moe": None}
EXPERTS = COMMON | {
    "model__moe": {"n_experts": 4, "top_k": 2, "intermediate_size": 48, "layer_freq": 2, "n_shared_experts": 1}
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("start")
    write_sources(root)
    session.train(
        config(root, root / "dense", **DENSE), Console(quiet=True), fresh=False, stop_after=None, from_step=None
    )
    export(Run.load(root / "dense"), root / "llama")
    return root


def spread(configuration: RunConfig, **parallel) -> RunConfig:
    tree = configuration.model_dump(mode="json")
    return validate(RunConfig, tree | {"parallel": tree["parallel"] | parallel}, "test")


def begin(configuration: RunConfig, origin: StartConfig) -> tuple[dict[str, Tensor], list[str]]:
    """The weights that this rank has parts of, whole, and what it says."""
    run = Run.build(configuration)
    said = take_weights(run, origin)
    state = run.model.state_dict()
    whole = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()}
    return {name: value.clone() for name, value in whole.items()}, said


def check(ranks, configuration: RunConfig, origin: StartConfig, **parallel) -> None:
    expected, said = begin(configuration, origin)
    answers = ranks.run(begin, spread(configuration, **parallel), origin)
    assert answers[0][1] == said
    found: dict[str, Tensor] = {}
    for state, _ in answers:
        found |= state
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7, msg=name)  # threads round a std anew


@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_of_a_dense_run_are_the_same_in_every_layout(two, root, tmp_path, layout):
    origin = StartConfig(weights=str(root / "dense"), noise=0.3)
    check(two, config(root, tmp_path / "moe", **EXPERTS), origin, **LAYOUTS[layout])


@pytest.mark.slow
@pytest.mark.parametrize("layout", FOUR)
def test_experts_of_a_dense_run_are_the_same_on_four_ranks(four, root, tmp_path, layout):
    origin = StartConfig(weights=str(root / "dense"), noise=0.3)
    check(four, config(root, tmp_path / "moe", **EXPERTS), origin, **FOUR[layout])


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_weights_from_a_folder_are_the_same_in_every_layout(two, root, tmp_path, layout):
    check(two, config(root, tmp_path / "run", **DENSE), StartConfig(weights=str(root / "llama")), **LAYOUTS[layout])
