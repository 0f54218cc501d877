"""Hold the prepared sources of a run: their manifests, and what planning and decoding ask of them."""

import os
import shlex

from mmoe.addresses import join_address, local_path
from mmoe.data.config import DataConfig
from mmoe.data.load.decode import SourceFiles
from mmoe.data.plan.blocks import PlannedSource, SequenceBudget
from mmoe.data.plan.measure import epoch_positions
from mmoe.data.plan.mixture import Mixture, SourceSize
from mmoe.data.storage.store import Storage
from mmoe.errors import DataError
from mmoe.files import said_nearest
from mmoe.schema.manifest import SourceManifest
from mmoe.tokenizers.bundle import Tokenizers
from mmoe.tokenizers.text import check_fingerprint


class PreparedSources:
    """Holds the prepared sources with their manifests, in config order; the order numbers them."""

    def __init__(self, config: DataConfig) -> None:
        self.config, self.storage = config, Storage(config.storage)
        self.names = list(config.sources)
        self.folders = [source.shards for source in config.sources.values()]
        _check_there(config)
        loaded = self.storage.map(lambda folder: SourceManifest.load(folder, self.storage.read), self.folders)
        self.manifests = dict(zip(self.names, loaded, strict=True))

    def check(self, tokenizers: Tokenizers) -> None:
        """Raise DataError where an index was written with another text tokenizer."""
        for folder, manifest in zip(self.folders, self.manifests.values(), strict=True):
            check_fingerprint(tokenizers.text, manifest.text_fingerprint, folder)

    def planned(
        self, split: str, limits: SequenceBudget, tokenizers: Tokenizers, only: list[str] | None = None
    ) -> list[PlannedSource]:
        """Return the orders of documents of a split, of the sources in `only` where given; each keeps its number."""
        return [
            PlannedSource(number, name, folder, self.manifests[name], split, limits, tokenizers, self.storage)
            for number, (name, folder) in enumerate(zip(self.names, self.folders, strict=True))
            if only is None or name in only
        ]

    def files(self, split: str) -> list[SourceFiles]:
        """Return the shards of a split by source; a source without this split has none."""
        return [
            SourceFiles(name, tuple(join_address(folder, s.path) for s in self.manifests[name].splits[split].shards))
            if split in self.manifests[name].splits
            else SourceFiles(name, ())
            for name, folder in zip(self.names, self.folders, strict=True)
        ]

    def mixture(self, tokenizers: Tokenizers, end: int) -> Mixture:
        """Return the stages over the training splits, for a run of `end` positions."""
        return Mixture(self.config.stages, sizes(self.config, self.manifests, tokenizers), end)


def _check_there(config: DataConfig) -> None:
    """Raises DataError naming the first source whose local folder is missing, and what repairs it."""
    for name, source in config.sources.items():
        path = local_path(source.shards)
        if path is not None and not os.path.exists(path):  # noqa: PTH110  # false, not an error, where it may not be looked at
            made = shlex.join(["mmoe", "prepare", source.kind, source.input or "INPUT", source.shards])
            raise DataError(
                f"data.sources.{name}.shards: {source.shards} does not exist{said_nearest(path)}, so source {name} "
                f"cannot be read; make it by `{made}`, or give its new place: data.sources.{name}.shards=FOLDER"
            )


def sizes(config: DataConfig, manifests: dict[str, SourceManifest], tokenizers: Tokenizers | None) -> list[SourceSize]:
    """Return the size of each source in positions of one epoch: from the config, else from the source's manifest."""
    found = []
    for name, source in config.sources.items():
        if name in manifests and not manifests[name].splits["train"].samples:
            raise DataError(
                f"{source.shards} is held out as a whole (prepare.heldout_share=1), so there is nothing to train on; "
                f"leave data.sources.{name} out, and measure on it by `mmoe evaluate RUN --shards {source.shards}`"
            )
        positions = source.positions
        if positions is None:
            if tokenizers is None or name not in manifests:
                raise DataError(
                    f"{source.shards} does not exist and data.sources.{name}.positions is not given, so the share of "
                    f"{name} is unknown; prepare the source, or state its positions"
                )
            positions = epoch_positions(manifests[name].splits["train"], tokenizers, name)
        found.append(SourceSize(name, positions, source.max_epochs))
    return found
