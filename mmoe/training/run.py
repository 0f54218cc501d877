"""The parts of a run, built from its config or loaded from its folder; train, evaluate and generate share them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mmoe.checkpoint.manager import CheckpointManager
from mmoe.config.load import dump, load
from mmoe.config.tree import RunConfig
from mmoe.data.batch import PackedBatch
from mmoe.data.preparation.ready import ensure_prepared
from mmoe.data.prepared import Sources
from mmoe.data.sample import Modality
from mmoe.data.stream import heldout_batches
from mmoe.errors import ConfigError
from mmoe.models.decoder import ModelInputs, MultimodalModel
from mmoe.parallel.build import build
from mmoe.parallel.launch import first_alone
from mmoe.parallel.ranks import Ranks
from mmoe.tokenizers.bundle import Tokenizers
from mmoe.tokenizers.vision import COORDINATES


def prepared(config: RunConfig, console: Console | None = None) -> tuple[Sources, Tokenizers]:
    """The sources, prepared where they do not exist yet and checked, and the tokenizers of the run.

    With a process group every rank calls this; the first one prepares.
    """
    first_alone(lambda: ensure_prepared(config.data.sources, config.tokenizers.text, console or Console()))
    sources = Sources(config.data)
    tokenizers = config.tokenizers.build(sources.manifests)
    sources.check(tokenizers)
    return sources, tokenizers


@dataclass(frozen=True)
class Run:
    """A run's config, folder, data and model (weights as initialised, or as loaded)."""

    config: RunConfig
    folder: Path
    sources: Sources
    tokenizers: Tokenizers
    model: MultimodalModel
    device: torch.device
    ranks: Ranks

    @classmethod
    def build(cls, config: RunConfig, console: Console | None = None) -> "Run":
        """Prepare the sources that do not exist yet, check them, and initialise the model.

        With a process group every rank calls this; the first one prepares, and each gets its part of the model.
        """
        if config.parallel.threads:
            torch.set_num_threads(config.parallel.threads)
        sources, tokenizers = prepared(config, console)
        inputs = ModelInputs(
            vocabulary_size=tokenizers.vocabulary.size,
            patch_dim=tokenizers.vision.patch_dim if tokenizers.value_dims[Modality.VISION] else 0,
            patch_coordinates=COORDINATES if tokenizers.value_dims[Modality.VISION] else 0,
            inertial_dim=tokenizers.value_dims[Modality.INERTIAL],
            state_dim=tokenizers.value_dims[Modality.STATE],
            action_chunk=tokenizers.config.action.chunk,
            action_dim=0 if tokenizers.discrete_actions else tokenizers.dims[Modality.ACTION].size,
        )
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model, ranks = build(config, inputs, len(sources.names), device)
        return cls(config, Path(config.training.run), sources, tokenizers, model, device, ranks)

    @classmethod
    def load(cls, folder: str | Path, step: int | None = None) -> "Run":
        """The run in `folder` with the weights of its latest checkpoint, or of the one after `step`."""
        folder = Path(folder)
        if not (folder / "config.yaml").is_file():
            raise ConfigError(f"{folder}/config.yaml does not exist: {folder} is not a run; train it first")
        config = load(RunConfig, folder / "config.yaml")
        run = replace(cls.build(config), folder=folder)  # it may have been moved since its config was written
        manager = CheckpointManager(folder / "checkpoints", config.checkpoint)
        state: dict[str, Any] = {"model": run.model.state_dict()}
        manager.load(state, step)
        run.model.load_state_dict(state["model"])
        return run

    def save_config(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.yaml").write_text(dump(self.config), encoding="utf-8")

    def heldout(self, *, isolated: bool, **choices: Any) -> Iterator[PackedBatch]:
        """Held-out batches on the run's device; see `heldout_batches` for the choices."""
        batches = heldout_batches(
            self.config.data,
            self.sources,
            self.tokenizers,
            seed=self.config.training.seed,
            micro_sequences=self.config.training.heldout_sequences,
            label_weights=self.config.losses.label_weights(),
            isolated=isolated,
            **choices,
        )
        return (batch.to(self.device) for batch in batches)
