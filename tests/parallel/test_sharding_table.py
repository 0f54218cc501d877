"""The table of what is cut names parameters of the model, and its units are modules that hold what they gather."""

import pytest
import torch

from mmoe.models.decoder import ModelConfig, MultimodalModel
from mmoe.parallel.sharding_table import CUTS, UNITS, cut_of, unit_of
from tests.models.random_batch import INPUTS


@pytest.fixture(scope="module")
def model() -> MultimodalModel:
    moe = {
        "n_experts": 4,
        "top_k": 2,
        "intermediate_size": 16,
        "layer_freq": 2,
        "n_shared_experts": 1,
        "shared_gate": True,
    }
    shape = {
        "d_model": 16,
        "n_layers": 2,
        "n_heads": 2,
        "n_kv_heads": 2,
        "intermediate_size": 32,
        "tie_embeddings": False,
    }
    with torch.device("meta"):
        return MultimodalModel(ModelConfig.model_validate(shape | {"moe": moe}), INPUTS)


def test_every_entry_is_of_a_parameter_that_a_model_has(model: MultimodalModel) -> None:
    names = [name for name, _ in model.named_parameters()]
    within = {name.split(".", 3)[3] if name.startswith("decoder.blocks.") else name for name in names}
    assert CUTS.keys() <= within
    assert all(any(name.startswith(start) for name in within) for start in UNITS)


def test_a_unit_gathers_all_of_its_module_but_what_inner_units_gather(model: MultimodalModel) -> None:
    units = {name: unit_of(name) for name, _ in model.named_parameters()}
    for path in {unit.path for unit in units.values()}:
        inner = [f"{path}.".lstrip(".") + name for name, _ in model.get_submodule(path).named_parameters()]
        assert all(len(units[name].path) >= len(path) for name in inner)
        assert {name for name, unit in units.items() if unit.path == path} <= set(inner)
    assert all(model.get_parameter(name).ndim > 1 for name, unit in units.items() if unit.matrices)


def test_keys_and_values_are_whole_where_ranks_outnumber_their_heads() -> None:
    name = "decoder.blocks.3.attention.key.weight"
    assert cut_of(name, 4, 4) == ("tp", 0) and cut_of(name, 2, 4) is None
    assert cut_of(name.replace("key", "query"), 2, 4) == ("tp", 0)
