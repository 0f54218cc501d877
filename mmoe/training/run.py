"""Builds the parts of a run from its config or loads them from its folder; train, evaluate and generate share them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mmoe.checkpoint.config import CheckpointConfig
from mmoe.checkpoint.manager import CheckpointManager
from mmoe.config.base import change_addresses
from mmoe.config.load import absolute, dump, flatten, load, override
from mmoe.data.load.heldout import HeldoutBatches
from mmoe.data.plan.prepared import PreparedSources
from mmoe.errors import ConfigError
from mmoe.files import write_atomically, writes
from mmoe.models.decoder import ModelInputs, MultimodalModel
from mmoe.parallel.build import build
from mmoe.parallel.mesh import DEGREES, check_one_process
from mmoe.parallel.ranks import StepExecutor
from mmoe.recipe.config import RunConfig
from mmoe.recipe.resolved import ResolvedRun, layout_to_measure
from mmoe.recipe.upgrade import upgrade_config
from mmoe.schema.modality import Modality
from mmoe.tokenizers.bundle import Tokenizers
from mmoe.training.fingerprint import check_unchanged, fingerprint

CONFIG = "config.yaml"  # in the run's folder, and a copy in every checkpoint


def open_sources(config: RunConfig) -> tuple[PreparedSources, Tokenizers]:
    """Open and check the sources of a run, which must be prepared, and build its tokenizers."""
    sources = PreparedSources(config.data)
    tokenizers = config.tokenizers.build(sources.manifests, sources.storage.read)
    sources.check(tokenizers)
    return sources, tokenizers


def model_inputs(tokenizers: Tokenizers) -> ModelInputs:
    """Return the sizes of the inputs that a model is given by these tokenizers."""
    dims = tokenizers.value_dims | {Modality.ACTION: tokenizers.dims[Modality.ACTION].size}
    return ModelInputs.from_data(
        tokenizers.vocabulary.size, dims, tokenizers.config.action, len(tokenizers.rig.cameras)
    )


def is_run(folder: str | Path) -> bool:
    """Return whether `folder` is that of a run: it holds the run's config, or checkpoints, which have a copy of it."""
    return any((Path(folder) / name).exists() for name in (CONFIG, "checkpoints"))


BOUND = "evaluation.max_documents"
UNWATCHED = ("training.callbacks=[]", "monitoring.sinks=null")  # of what only a training needs, and its packages


def read_config(folder: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the config of the run in `folder`, which may have been moved since it was written.

    `UNWATCHED` as `overrides` leaves out callbacks and sinks, whose packages may not be installed where a run is only
    measured.
    Raises ConfigError, with the way to a copy of the config where the file is damaged or missing.
    """
    folder = Path(folder)
    path = folder / CONFIG
    if (missing := not path.is_file()) and not (folder / "checkpoints").is_dir():
        raise ConfigError(f"{path} does not exist: {folder} is not a run; train it first")
    try:
        config = load(RunConfig, path, overrides, upgrade_config)
    except ConfigError as error:
        copy = CheckpointManager(folder / "checkpoints", CheckpointConfig()).text(CONFIG)
        if copy is None or (not missing and path.read_bytes() == copy[1].encode()):
            raise
        why = f"{path} is missing" if missing else str(error)
        raise ConfigError(f"{why}; a checkpoint has a copy: restore it by: cp {copy[0]} {path}") from error
    return config.model_copy(update={"training": config.training.model_copy(update={"run": str(folder)})})


def rearrange(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """Return the config of a trained run with other addresses, of data that was moved, and a layout to measure in.

    Degrees that `overrides` name are taken as they are; else a process group gets a layout that fits it. Unless
    `overrides` say otherwise weights are gathered anew for every pass (ZeRO-3): none is kept for a backward pass. How
    much is measured (`evaluation.max_documents`) may change too.
    Raises ConfigError for an override of anything else, since the weights were trained with the rest, and for degrees
    that one process cannot have.
    """
    changed = override(config, overrides)
    before, now = (
        flatten(change_addresses(each, lambda _: "an address").model_dump(mode="json")) for each in (config, changed)
    )
    keys = {key for key in before.keys() | now.keys() if before.get(key) != now.get(key)}
    if others := sorted(key for key in keys if not key.startswith("parallel.") and key != BOUND):
        raise ConfigError(
            f"{', '.join(others)} cannot be changed of a run that is trained; only addresses can, such as "
            f"data.sources.NAME.shards=FOLDER, the layout, such as parallel.ep=2, and {BOUND}"
        )
    named = {item.partition("=")[0] for item in overrides}
    chosen = bool(named & {f"parallel.{axis}" for axis in DEGREES})
    if not dist.is_initialized():
        if chosen:
            check_one_process(changed.parallel)
        return changed
    parallel = changed.parallel if chosen else layout_to_measure(changed, dist.get_world_size())
    if "parallel.zero" not in named:
        parallel = parallel.model_copy(update={"zero": 3})
    return changed.model_copy(update={"parallel": parallel})


def saved_fingerprint(state: dict[str, Any]) -> Any:
    """Return the fingerprint of the data that a checkpoint was trained on; None in earlier formats."""
    return state["trainer"].get("data") if isinstance(state["trainer"], dict) else None


@dataclass(frozen=True)
class RunView:
    """Holds what a run is besides its model: its config, what follows from that, its folder and its data."""

    config: RunConfig
    resolved: ResolvedRun
    folder: Path
    sources: PreparedSources
    tokenizers: Tokenizers

    @classmethod
    def read(cls, folder: str | Path, overrides: Sequence[str] = ()) -> "RunView":
        """Read the run in `folder`, to be looked at; of its checkpoints only what is no tensor is read.

        `overrides` may give other addresses. Raises CheckpointError where the tokenizers are not those it has learned.
        """
        folder, config = Path(folder), rearrange(read_config(folder, UNWATCHED), overrides)
        sources, tokenizers = open_sources(config)
        found = CheckpointManager(folder / "checkpoints", config.checkpoint).document()
        if found is not None:
            check_unchanged(saved_fingerprint(found), fingerprint(sources, tokenizers), folder, only="tokenizers.")
        return cls(absolute(config), ResolvedRun.to_measure(config), folder, sources, tokenizers)


@dataclass(frozen=True)
class Run(RunView):
    """Holds a run with its model (weights as initialized, or as loaded)."""

    model: MultimodalModel
    device: torch.device
    ranks: StepExecutor

    @classmethod
    def build(
        cls, config: RunConfig, resolve: Callable[[RunConfig, int | None], ResolvedRun] = ResolvedRun.from_config
    ) -> "Run":
        """Open the sources of a run, which must be prepared, and initialize the model.

        With a process group every rank calls this, and each gets its part of the model. `resolve` derives what follows
        from the number of processes.
        """
        if config.parallel.threads:
            torch.set_num_threads(config.parallel.threads)
        sources, tokenizers = open_sources(config)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        resolved = resolve(config, dist.get_world_size() if dist.is_initialized() else None)
        model, ranks = build(resolved, model_inputs(tokenizers), len(sources.names), config.training.seed, device)
        # Its config holds from any folder; until it is read again, messages name places as the caller did.
        folder = Path(config.training.run)
        return cls(absolute(config), resolved, folder, sources, tokenizers, model, device, ranks)

    @classmethod
    def load(cls, folder: str | Path, step: int | None = None, overrides: Sequence[str] = ()) -> "Run":
        """Load the run in `folder`, to be measured, with the weights of its latest checkpoint, or of that after `step`.

        `overrides` may give other addresses, e.g. ``data.sources.drive.shards=/new/place``. With a process group every
        rank calls this, and each gets its part of the model in the layout that `overrides` name, or one that fits.
        """
        folder, config = Path(folder), rearrange(read_config(folder, UNWATCHED), overrides)
        run = cls.build(config, ResolvedRun.to_measure)
        manager = CheckpointManager(folder / "checkpoints", config.checkpoint)
        state: dict[str, Any] = {"model": run.model.state_dict(), "trainer": {}}
        manager.load(state, step)
        check_unchanged(saved_fingerprint(state), fingerprint(run.sources, run.tokenizers), folder, only="tokenizers.")
        run.model.load_state_dict(state["model"])
        return run

    def save_config(self) -> None:
        """Write ``config.yaml`` where it is missing or says something else."""
        path, text = self.folder / CONFIG, dump(self.config).encode()
        with writes(path):
            if not path.is_file() or path.read_bytes() != text:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_atomically(path, text)

    def heldout(
        self, *, isolated: bool, split: str = "heldout", most_documents: int | None = None, **choices: Any
    ) -> HeldoutBatches:
        """Plan the batches of a split, which are on the CPU; held out, of at most `evaluation.max_documents` a source.

        `isolated`: the text of every pair is a document of its own, else of none. For the rest see `HeldoutBatches`.
        """
        own = self.config.evaluation.max_documents if split == "heldout" else None
        bounds = [bound for bound in (most_documents, own) if bound is not None]
        return HeldoutBatches(
            self.config.data,
            self.sources,
            self.tokenizers,
            seed=self.config.training.seed,
            micro_sequences=self.config.training.heldout_sequences,
            label_weights=self.config.losses.ce.label_weights(),
            isolated=isolated,
            split=split,
            most_documents=min(bounds, default=None),
            **choices,
        )
