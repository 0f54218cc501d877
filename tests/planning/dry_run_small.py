"""Dry runs of a small model with the keys of the 10B run, in any layout."""

from mmoe.config.load import load
from mmoe.planning.dry_run_plan import Plan
from mmoe.recipe.config import RunConfig

SMALL = """
model.d_model=64 model.n_layers=2 model.n_heads=4 model.n_kv_heads=2
model.head_dim=16 model.intermediate_size=96 model.moe.n_experts=4
model.moe.intermediate_size=64 model.moe.layer_freq=2 data.sequence_length=128 data.patches_per_sequence=64
tokenizers.vision.max_patches=16 losses.ce.chunk=24 losses.contrastive.group_sequences=1
training.global_batch_positions=2048 optim.lr.peak=1e-4 parallel.ep=1
""".split()


def plan(world: int, overrides: str = "", imbalance: float = 1.0, documents: int = 4) -> Plan:
    config = load(RunConfig, "configs/moe_10b.yaml", [*SMALL, *overrides.split()])
    return Plan.from_config(config, world, imbalance, documents, 500)
