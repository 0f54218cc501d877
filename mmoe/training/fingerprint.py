"""Digests what a run's numbers follow from besides its config: the contents of its sources and of its tokenizers.

A checkpoint holds the digests, so that a run does not go on with other data in silence. They follow from the manifests
alone, which hold a digest of every shard's index, and so cost nothing where shards are far away. Where a source
lies is not part of it: a folder may move.
"""

from pathlib import Path
from typing import Any

from mmoe.data.plan.prepared import PreparedSources
from mmoe.errors import CheckpointError
from mmoe.hashing import blake2b, canonical_json
from mmoe.schema.manifest import SourceManifest
from mmoe.schema.modality import BUILT_IN, Modality
from mmoe.schema.rig import STANDARD
from mmoe.tokenizers.bundle import Tokenizers

Fingerprint = dict[str, dict[str, Any]]  # of every source and tokenizer, each as named parts


def fingerprint(sources: PreparedSources, tokenizers: Tokenizers) -> Fingerprint:
    """Return, as JSON can hold it, a digest of each part that numbers follow from, by source and by tokenizer."""
    found = {f"source {name}": _of_source(manifest) for name, manifest in sources.manifests.items()}
    vectors = {kind.name: dims.names for kind, dims in tokenizers.dims.items()}
    statistics = {name: manifest.model_dump(mode="json")["vectors"] for name, manifest in sources.manifests.items()}
    audio = tokenizers.audio
    if further := Modality.names[BUILT_IN:]:  # their codes and tokens are in the order in which they are registered
        found["modalities"] = {"further": ", ".join(further)}
    return found | {
        "tokenizers.text": {"fingerprint": tokenizers.text.fingerprint},
        "tokenizers.audio": {"fingerprint": audio.fingerprint if audio else None},
        "tokenizers.vision": {"settings": _digest(tokenizers.config.vision.model_dump(mode="json"))},
        "tokenizers.action": {
            "settings": _digest(tokenizers.config.action.model_dump(mode="json")),
            "dimensions": _digest(vectors),
            "statistics": _digest(statistics),
        },
    }


def _of_source(manifest: SourceManifest) -> dict[str, Any]:
    parts: dict[str, Any] = {
        "kind": manifest.kind,
        "text ids": manifest.text_fingerprint,
        "clock": _digest([manifest.clock, manifest.skew_budget_ns]),
        "statistics of vectors": _digest(manifest.model_dump(mode="json")["vectors"]),
    }
    if manifest.rig != STANDARD:  # so that checkpoints from before there were others say nothing else
        parts["cameras"] = _digest(manifest.rig.cameras)
    if manifest.categories:
        parts["categories"] = _digest({name: list(values) for name, values in manifest.categories.items()})
    for name, split in manifest.splits.items():
        shards = [(shard.rows, shard.bytes, shard.digest) for shard in split.shards]
        parts[f"{name} samples"] = f"{split.samples} in {len(shards)} shards, {_digest(shards)}"
    return parts


def check_unchanged(saved: Any, now: Fingerprint, folder: Path, only: str = "") -> None:
    """Check that the fingerprint `now` equals the one `saved` in a checkpoint of `folder`.

    `only`: the names to compare begin with this. A checkpoint of an earlier format holds none, and passes. Raises
    CheckpointError naming what differs.
    """
    if saved is None:
        return
    if not isinstance(saved, dict) or not all(isinstance(parts, dict) for parts in saved.values()):
        raise CheckpointError(
            f"{folder}/checkpoints: state.json holds no fingerprints where they belong; see its origin"
        )
    changes = []
    for name in [name for name in {**saved, **now} if name.startswith(only)]:
        if name not in now or name not in saved:
            changes.append(f"{name} is {'new' if name in now else 'gone'}")
            continue
        before, after = saved[name], now[name]
        parts = [part for part in {**before, **after} if before.get(part) != after.get(part)]
        if parts:
            said = ", ".join(f"{part} ({_short(before.get(part))} -> {_short(after.get(part))})" for part in parts)
            changes.append(f"{name} differs in {said}")
    if changes:
        raise CheckpointError(
            f"{folder} was trained on other data than it finds now: {'; '.join(changes)}; put back what it was trained "
            "on (the same prepared folder, or the same tokenizer file), or train a new run: set another training.run"
        )


def _digest(value: Any) -> str:
    return blake2b([canonical_json(value)], 16).hex()


def _short(value: Any) -> str:
    """A digest by its first letters, as they are compared by eye."""
    words = str(value).split()
    return " ".join(word[:12] if len(word) >= 32 else word for word in words)
