"""Predicts actions for `mmoe generate`: those after a slice of given images and state, or those of a prepared clip.

Shape suffixes: m chunks, H steps of a chunk, A action dimensions of the source.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor

from mmoe.data.index.shard_index import SegmentTable, ShardIndex
from mmoe.data.load.decode import SampleLoader
from mmoe.data.plan.planner import DocumentRef
from mmoe.errors import ConfigError, DataError, brief, did_you_mean
from mmoe.evaluation.actions import chunk_starts, predict_actions, row_chunks
from mmoe.evaluation.generate import check_fits, document_batch, read_image
from mmoe.evaluation.inference import Inference, inference
from mmoe.modalities.document import Document, DocumentBuilder
from mmoe.schema.batch import IGNORE
from mmoe.schema.modality import Modality
from mmoe.schema.sample import NO_CAMERA, NO_PAIR
from mmoe.tokenizers.vocabulary import Structure
from mmoe.training.run import Run

_ROWS = 200  # of a source, by which the form of its slices is known
SPLITS_TO_SEARCH = ("heldout", "train")  # for a clip: first what the run has never seen


@dataclass(frozen=True)
class PredictedChunk:
    """Holds the actions [H, A] from one instant on, in the source's units.

    `time_ns` is the instant in clip time, `period_ns` lies between steps (0: it is not known). `named` are values that
    are no numbers, H by dimension. `logged` and `logged_named` are what the recording holds, NaN and "-" behind its
    end; None and empty where there is no recording.
    """

    names: tuple[str, ...]
    time_ns: int
    period_ns: int
    predicted: np.ndarray
    named: dict[str, list[str]] = field(default_factory=dict)
    logged: np.ndarray | None = None
    logged_named: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class _SliceForm:
    """What the slices of a source hold: cameras by their number, in order, modalities, and where their text stands."""

    cameras: tuple[int, ...]
    modalities: frozenset[Modality]
    text_after_action: bool

    @classmethod
    def from_source(cls, run: Run, source: str) -> "_SliceForm":
        """Look at the first rows that are trained on."""
        number = run.sources.names.index(source)
        table = SegmentTable.read(run.sources.files("train")[number].tars[0], run.sources.storage)
        shown: list[tuple[int, ...]] = []
        kinds: set[Modality] = set()
        after = False
        for row in range(min(len(table), _ROWS)):
            segments = table.segments[table.segment_offsets[row] : table.segment_offsets[row + 1]]
            for slice_number in np.unique(segments["slice"][segments["slice"] >= 0]):
                mine = segments[segments["slice"] == slice_number]
                shown.append(tuple(mine["camera"][mine["modality"] == Modality.VISION].tolist()))
                kinds |= {Modality(kind) for kind in mine["modality"]}
                is_text, acts = (np.flatnonzero(mine["modality"] == kind) for kind in (Modality.TEXT, Modality.ACTION))
                after |= bool(len(is_text) and len(acts) and is_text.max() > acts.min())
        fullest_first = sorted(shown, key=len, reverse=True)
        cameras = tuple(dict.fromkeys(camera for cameras in fullest_first for camera in cameras))
        return cls(cameras, frozenset(kinds), after)


def predict_slice(
    run: Run,
    source: str,
    *,
    images: Sequence[str] = (),
    state: Sequence[float] | None = None,
    instruction: str = "",
) -> PredictedChunk:
    """Predict the actions that follow one slice, as a clip of `source` would begin with it.

    `images` are ``CAMERA=PATH``, or a path alone where slices of the source have one image. `state` has a number for
    each dimension of the source's. `instruction` stands before the action. What is not given is absent from the slice.
    Raises ConfigError for what a slice of the source does not hold, DataError for what cannot be read.
    """
    form = _SliceForm.from_source(run, _acting(run, source))
    given = dict(_camera(run, source, form, item) for item in images)
    if len(given) < len(images):
        raise ConfigError(f"--image: two images are of one camera; {source} has one of each camera in a slice")
    vector = None if state is None else _state(run, source, form, state)
    if not given and vector is None:
        raise ConfigError(f"nothing is given to act on; a slice of {source} holds {_holds(run, source, form)}")
    if instruction and (form.text_after_action or Modality.TEXT not in form.modalities):
        held = "stands behind the action, which cannot follow from it" if form.text_after_action else "is not there"
        raise ConfigError(f"text in slices of {source} {held}; leave --prompt out")

    tokenizers, run_cameras = run.tokenizers, run.tokenizers.cameras[source]
    builder = DocumentBuilder.from_tokenizers(tokenizers)
    builder.structure(Structure.BOS)
    builder.structure(Structure.VIDEO_START)
    builder.open_slice(0, 0)
    for camera in form.cameras:
        if camera in given:
            builder.frame(*read_image(run, given[camera]), int(run_cameras[camera]), 0, NO_PAIR)
    if vector is not None:
        builder.vectors(Modality.STATE, Structure.STATE, vector[None])
    if instruction:
        ids = tokenizers.vocabulary.ranges["text"].start + tokenizers.text.encode(instruction).astype(np.int64)
        builder.text(ids, NO_PAIR)
    tokenizer, chunk, union = (
        tokenizers.actions[source],
        tokenizers.config.action.chunk,
        tokenizers.dims[Modality.ACTION],
    )
    if tokenizers.discrete_actions:
        builder.action_ids(np.full(tokenizer.tokens, IGNORE), 0)
    else:
        shape = (chunk, union.size)
        named = np.full(tokenizer.tokens - tokenizer.number_tokens, IGNORE)
        builder.action(np.zeros(shape, np.float32), np.zeros(shape, bool), named, 0)
    builder.close_slice(predicted=False)
    builder.structure(Structure.VIDEO_END)
    builder.structure(Structure.EOS)
    ((predicted, said),) = _predicted(run, source, builder.finish())
    period_ns = run.sources.manifests[source].vectors[Modality.ACTION.name].period_ns
    return PredictedChunk(tokenizer.names, 0, period_ns, predicted, said)


def predict_clip(run: Run, source: str, key: str) -> list[PredictedChunk]:
    """Predict every action chunk of a prepared sample, beside what was logged, from what stands before it.

    A clip that fits no sequence is cut as it is for training, so later parts do not see the earlier ones.
    Raises ConfigError where the source has no sample of this key.
    """
    split, shard, index, row = _find(run, _acting(run, source), key)
    storage, tokenizer = run.sources.storage, run.tokenizers.actions[source]
    limits = run.config.data.limits(run.config.training.seed, 0.0)
    (planned,) = run.sources.planned(split, limits, run.tokenizers, [source])
    parts = [DocumentRef(*part[:-1]) for part in planned.once(shard, np.array([row]), 0).parts.tolist()]
    loader = SampleLoader(run.sources.files(split), run.tokenizers, run.config.data.video_backend, storage=storage)
    chunks = list(row_chunks(index, row, tokenizer, storage))
    period_ns = run.sources.manifests[source].vectors[Modality.ACTION.name].period_ns
    found = []
    for part in parts:
        mine = [chunk for chunk in chunks if part.first <= chunk.segment["slice"] < part.last]
        for (predicted, said), chunk in zip(_predicted(run, source, loader(part)[0]), mine, strict=True):
            logged = np.where(chunk.inside, chunk.rows, np.nan)
            named = {
                name: [values[number] if number >= 0 else "-" for number in numbers]
                for (name, values), numbers in zip(tokenizer.categories.items(), chunk.named.T.tolist())
            }
            found.append(PredictedChunk(tokenizer.names, chunk.time_ns, period_ns, predicted, said, logged, named))
    if not found:
        raise ConfigError(
            f"{key} of {source} has no action to predict, or no slice of it fits a sequence; name another"
        )
    return found


def _predicted(run: Run, source: str, document: Document) -> list[tuple[np.ndarray, dict[str, list[str]]]]:
    """The chunks of a document: actions [H, A] in the source's units, and named values by dimension."""
    check_fits(run, len(document))
    batch = document_batch(run, document, run.sources.names.index(source))
    starts, parts = chunk_starts(batch)
    with inference(run) as model:
        hidden: Tensor = run.model(batch).hidden
        chunks = predict_actions(model, hidden, batch, starts, parts)
        named = [_named(run, model, source, hidden.flatten(0, 1)[start:]) for start in starts.tolist()]
    columns = run.tokenizers.dims[Modality.ACTION].columns[source]
    return list(zip(run.tokenizers.actions[source].denormalize(chunks[:, :, columns]), named))


def _named(run: Run, model: Inference, source: str, states: Tensor) -> dict[str, list[str]]:
    """The likeliest values, by dimension, of the chunk that begins at the first of the `states` [n, D]."""
    tokenizer = run.tokenizers.actions[source]
    if not tokenizer.categories:
        return {}
    scores = model.logits(states[tokenizer.number_tokens : tokenizer.tokens]).cpu().numpy()
    scores = scores.reshape(tokenizer.config.chunk, len(tokenizer.categories), -1)
    found = {}
    for column, (name, values) in enumerate(tokenizer.categories.items()):
        likeliest = scores[:, column, run.tokenizers.category_ids(name, values)].argmax(1)
        found[name] = [values[number] for number in likeliest.tolist()]
    return found


def _acting(run: Run, source: str) -> str:
    """The name of a source that has actions."""
    if source not in run.sources.names:
        hint = did_you_mean(source, run.sources.names) or ";"
        raise ConfigError(f"{run.folder} has no source {brief(source)}{hint} it has {', '.join(run.sources.names)}")
    if source not in run.tokenizers.actions:
        others = ", ".join(run.tokenizers.actions) or "none of its sources has"
        raise ConfigError(f"source {source} of {run.folder} has no actions to predict; those that do: {others}")
    return source


def _camera(run: Run, source: str, form: _SliceForm, item: str) -> tuple[int, Path]:
    """The camera's number in the source's rig, and the file, of ``CAMERA=PATH`` or ``PATH``."""
    cameras = run.sources.manifests[source].rig.cameras
    names = {cameras[number]: number for number in form.cameras if number != NO_CAMERA}
    name, is_named, path = item.partition("=")
    if is_named and name in names:
        return names[name], Path(path)
    if is_named and not Path(item).exists():
        hint, known = did_you_mean(name, names) or ";", ", ".join(names) or "no named camera"
        raise ConfigError(f"--image {brief(item)}: {name} is no camera of {source}{hint} its slices show {known}")
    if len(form.cameras) != 1:
        held = _holds(run, source, form)
        raise ConfigError(f"--image {brief(item)}: a slice of {source} holds {held}; say which it is, as CAMERA={item}")
    return form.cameras[0], Path(item)


def _state(run: Run, source: str, form: _SliceForm, state: Sequence[float]) -> np.ndarray:
    """The state as the model is given it, f32 [dimensions of all sources]."""
    if Modality.STATE not in form.modalities:
        raise ConfigError(f"--state: slices of {source} hold no state; leave it out")
    stats, dims = run.sources.manifests[source].vectors[Modality.STATE.name], run.tokenizers.dims[Modality.STATE]
    if len(state) != len(stats.names):
        raise ConfigError(
            f"--state has {len(state)} numbers; give one for each dimension of {source}: {', '.join(stats.names)}"
        )
    infinity = (np.inf,) * len(state)
    for name, value, low, high in zip(
        stats.names, state, stats.minimum or np.negative(infinity), stats.maximum or infinity
    ):
        if not low <= np.float32(value) <= high or not np.isfinite(value):
            raise DataError(
                f"--state: {name} is {value:g}, but in {source} it goes from {low:g} to {high:g}; give a number in "
                f"this range, the dimensions in the order {', '.join(stats.names)}"
            )
    vector = np.zeros(dims.size, np.float32)
    vector[dims.columns[source]] = run.tokenizers.normalizers[source, Modality.STATE](np.array(state))
    return vector


def _holds(run: Run, source: str, form: _SliceForm) -> str:
    cameras = run.sources.manifests[source].rig.cameras
    images = ["an image" if number == NO_CAMERA else f"an image of {cameras[number]}" for number in form.cameras]
    state = ["a state"] if Modality.STATE in form.modalities else []
    return ", ".join([*images, *state]) or "neither images nor a state"


def _find(run: Run, source: str, key: str) -> tuple[str, int, ShardIndex, int]:
    """Split, shard, index and row of a sample."""
    some: list[str] = []
    for split, shard, index in _indices(run, source):
        if key in index.keys:
            return split, shard, index, index.keys.index(key)
        some += index.keys[: 3 - len(some)]
    raise ConfigError(f"--clip: source {source} has no sample {brief(key)}; it has such as {', '.join(some)}")


def _indices(run: Run, source: str) -> Iterator[tuple[str, int, ShardIndex]]:
    number = run.sources.names.index(source)
    for split in SPLITS_TO_SEARCH:
        for shard, tar in enumerate(run.sources.files(split)[number].tars):
            yield split, shard, ShardIndex.read(tar, run.sources.storage)
