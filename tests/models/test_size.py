"""Parameters counted in closed form are those that the model has, and too many are refused before they are made."""

import pytest
import torch

from mmoe.config.load import validate
from mmoe.data.config import DataConfig
from mmoe.data.load.collate import Collator
from mmoe.data.plan.assignment import check_dealing
from mmoe.errors import ConfigError
from mmoe.models.decoder import ModelConfig
from mmoe.models.embeddings import ModelInputs
from mmoe.models.flops import ParameterCounts
from mmoe.models.size import parameter_count
from mmoe.parallel.build import build
from mmoe.recipe.resolved import ResolvedRun
from mmoe.schema.modality import Modality
from tests.training.test_trainer import config

SMALL = {"d_model": 32, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "intermediate_size": 48}
MOE = {"n_experts": 4, "top_k": 2, "intermediate_size": 16}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qk_norm": True, "tie_embeddings": False, "head_dim": 6},
        {"moe": MOE},
        {"moe": MOE | {"layer_freq": 2, "n_shared_experts": 2, "first_k_dense": 1}},
        {"moe": MOE | {"n_shared_experts": 1, "shared_gate": True}},
    ],
    ids=str,
)
def test_the_closed_form_counts_what_the_model_has(changes):
    model, inputs = validate(ModelConfig, SMALL | changes, "test"), ModelInputs(vocabulary_size=300, patch_dim=8)
    assert parameter_count(model, inputs) == ParameterCounts.from_config(model, inputs).total


def test_a_model_that_memory_cannot_hold_is_refused_before_it_is_made(tmp_path):
    huge = config(
        tmp_path, tmp_path / "run", model__d_model=1 << 20, model__intermediate_size=1 << 20, model__n_layers=1000
    )
    with pytest.raises(ConfigError, match=r"parameters: [\d,]+.\d GiB on each of 1 processes, .*model.d_model"):
        build(ResolvedRun.from_config(huge), ModelInputs(vocabulary_size=300), 1, 0, torch.device("cpu"))


@pytest.mark.parametrize(
    "change",
    [
        {"sequence_length": 1 << 40},
        {"window_documents": 1 << 40},
        {"workers": 10**6},
        {"prefetch": 10**6},
        {"patches_per_sequence": 1 << 40},
    ],
    ids=str,
)
def test_sizes_that_no_machine_has_are_refused_by_their_key(change):
    tree = {"sources": {"a": {"kind": "text", "shards": "a"}}, "sequence_length": 64} | change
    with pytest.raises(ConfigError, match=f"{next(iter(change))}: input should be less than or equal to"):
        validate(DataConfig, tree, "test")


def test_batches_that_do_not_fit_the_memory_are_refused_before_they_are_made():
    dims = {Modality.VISION: 768, Modality.INERTIAL: 0, Modality.STATE: 0}
    collator = Collator(1 << 20, 1 << 20, dims, (1, 1), None, torch.ones(7).numpy())
    collator.check_room(1, 0, 4)
    with pytest.raises(ConfigError, match="4097 batches of 64 sequences .* lower data.workers, data.prefetch"):
        collator.check_room(64, 1024, 4)


def test_a_step_of_more_sequences_than_can_be_planned_is_refused():
    with pytest.raises(ConfigError, match="training.global_batch_positions makes 1,048,577 sequences"):
        check_dealing((1 << 20) + 1, 1, 1, 1)
