"""Makes experts of a dense model's networks: the first checkpoint of a new run, and what that costs in loss."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from mmoe.checkpoint.manager import CheckpointManager
from mmoe.config.load import dump
from mmoe.errors import ConfigError
from mmoe.evaluation.inference import label_log_probabilities
from mmoe.interchange.start import start, take_weights
from mmoe.models.decoder import MultimodalModel
from mmoe.models.moe.layer import MoEConfig
from mmoe.recipe.config import RunConfig
from mmoe.recipe.training import StartConfig
from mmoe.schema.batch import PackedBatch
from mmoe.training.lock import run_lock
from mmoe.training.run import CONFIG, Run
from mmoe.training.state import TrainState

logger = logging.getLogger(__name__)

BATCHES = 4  # held-out micro-batches that the losses are measured on


@dataclass(frozen=True)
class Upcycled:
    """Holds the mean cross-entropy in nats on the same held-out batches: dense, copied, and copied with noise."""

    dense: float
    copies: float
    noisy: float


def upcycle(config: RunConfig, origin: StartConfig) -> Upcycled:
    """Write config.yaml and the checkpoint of step 0 of the run `config`, which begins as `origin`.

    Raises ConfigError where the run has checkpoints already, or where `origin` cannot become its experts.
    """
    moe = config.model.moe
    if moe is None:
        raise ConfigError("model.moe is null, so there are no experts to make; give its sizes")
    training = config.training.model_copy(update={"start_from": origin})
    config = config.model_copy(update={"training": training})
    with run_lock(Path(config.training.run)):
        return _upcycle(Run.build(config), moe, origin)


def _upcycle(run: Run, moe: MoEConfig, origin: StartConfig) -> Upcycled:
    checkpoints = CheckpointManager(run.folder / "checkpoints", run.config.checkpoint)
    if checkpoints.latest_step() is not None:
        raise ConfigError(f"{run.folder} holds checkpoints already; set another training.run")
    batches = [batch.to(run.device) for batch, _ in zip(run.heldout(isolated=False), range(BATCHES))]
    take_weights(run, origin.model_copy(update={"noise": 0.0}))  # refuses what does not fit
    copies, dense = heldout_loss(run.model, batches), _dense_loss(run, moe.intermediate_size, origin, batches)
    start(run, origin)
    losses = Upcycled(dense, copies, heldout_loss(run.model, batches) if origin.noise else copies)
    run.save_config()
    checkpoints.save(0, TrainState.from_run(run).state_dict() | {"callbacks": {}}, {CONFIG: dump(run.config)})
    logger.info(
        f"held-out loss: dense {losses.dense:.6f}, experts without noise {losses.copies - losses.dense:+.2e}, "
        f"with noise {origin.noise} {losses.noisy - losses.dense:+.2e}"
    )
    if losses.copies - losses.dense > 1e-5 and moe.capacity_factor is not None:
        logger.info("the copies lose tokens that model.moe.capacity_factor drops; null or a larger one does not")
    logger.info(f"wrote {run.folder}; go on with: mmoe train {run.folder}/config.yaml")
    return losses


def _dense_loss(run: Run, hidden: int, origin: StartConfig, batches: list[PackedBatch]) -> float:
    """Of the model as it was, with networks `hidden` wide: built anew beside `run`, with the same ids."""
    model = run.config.model.model_copy(update={"moe": None, "intermediate_size": hidden})
    config = run.config.model_copy(update={"model": model})
    dense = Run.build(config)
    take_weights(dense, origin)
    return heldout_loss(dense.model, batches)


@torch.no_grad()
def heldout_loss(model: MultimodalModel, batches: list[PackedBatch]) -> float:
    """Compute the mean cross-entropy in nats of all labels, in the precision of the weights."""
    training = model.training
    model.eval()
    parts = [label_log_probabilities(model, model(batch).hidden, batch, chunk=1024)[0] for batch in batches]
    model.train(training)
    return -float(torch.cat(parts).double().mean())
