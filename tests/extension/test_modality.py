"""A modality from this file alone, a range image: prepared, planned, decoded, trained on one process and on two."""

import importlib
import io
import os
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mmoe.config.base import Config
from mmoe.config.load import validate
from mmoe.data.load.decode import SampleLoader
from mmoe.data.plan.measure import epoch_positions, measure_index
from mmoe.data.plan.planner import DocumentRef
from mmoe.errors import ConfigError, DataError
from mmoe.losses.term import LOSS_TERMS, Items, LossContext, LossTerm, LossTermConfig, TermSums
from mmoe.preparation.prepare import prepare
from mmoe.preparation.sources import SOURCES
from mmoe.preparation.sources.base import Item, Source
from mmoe.recipe.config import RunConfig
from mmoe.schema.manifest import SourceManifest
from mmoe.schema.modality import BUILT_IN, Modality, ModalitySpec, Planned, renumbered
from mmoe.schema.sample import Sample, Segment
from mmoe.tokenizers.text import TextTokenizer
from mmoe.training.run import Run
from tests.conftest import REPOSITORY
from tests.data.synthetic import write_sources
from tests.distributed.pool import Pool
from tests.distributed.test_training import LAYOUTS, figures, train
from tests.training.test_trainer import config

CELL = 4  # pixels a side


class RangeSpec(ModalitySpec):
    """Distances in metres, cut into cells; a target of each is its mean."""

    name = "RANGE"
    tokens = ("range_start", "range")
    count_columns = ("range_cells",)
    refused_as = "unreadable range image"

    def vector_size(self, tokenizers, manifests) -> int:
        held = any(split.segments(self.name) for m in manifests.values() for split in m.splits.values())
        return CELL**2 if held else 0

    def check(self, segments, content, where) -> None:
        image = np.load(io.BytesIO(content))
        for segment in segments:
            if image.shape != (segment.height, segment.width) or (image < 0).any():
                raise DataError(f"{where} is no range image of {segment.height} x {segment.width}; record it again")

    def planned(self, segments, tokenizers, source) -> Planned:
        cells = (segments["height"] // CELL * (segments["width"] // CELL)).astype(np.int64)
        return Planned.without_targets(cells, 1, range_cells=cells)

    def positions(self, group, tokenizers, source) -> int:
        return group.count * (group.height // CELL * (group.width // CELL) + 1)

    def encode(self, payload, tokenizers):
        rows, columns = (int(payload.segment[side]) // CELL for side in ("height", "width"))
        image = np.zeros((rows * CELL, columns * CELL), np.float32)
        if payload.shown is not None:
            image = np.load(io.BytesIO(payload.content()))[: rows * CELL, : columns * CELL].astype(np.float32)
        return image.reshape(rows, CELL, columns, CELL).transpose(0, 2, 1, 3).reshape(rows * columns, -1)

    def layout(self, builder, encoded, payload) -> None:
        columns = int(payload.segment["width"]) // CELL
        builder.structure(builder.further_ids["range_start"])
        number = np.arange(len(encoded))
        place = np.stack([0 * number, number // columns, number % columns], axis=1)
        builder.vectors(Modality.named(self.name), builder.further_ids["range"], encoded, place=place)
        builder.target("range", encoded.mean(1, keepdims=True))

    def embedding(self, vector_size, d_model) -> nn.Module:
        return nn.Linear(vector_size, d_model)


@LOSS_TERMS.register("range")
class RangeConfig(LossTermConfig):
    def build(self) -> LossTerm:
        return RangeTerm(self.label, self.weight)


class RangeTerm(LossTerm):
    def head(self, inputs, d_model) -> nn.Module:
        return nn.Linear(d_model, 1)

    def denominator(self, counts, sequences) -> float:
        return counts.count("range_cells")

    def compute(self, context: LossContext) -> TermSums | None:
        if not context.planned:
            return None
        hidden = context.hidden_BLD.flatten(0, 1)
        found = context.batch.targets.get("range")
        index = torch.zeros(0, dtype=torch.long) if found is None else context.share(found.index)
        target = hidden.new_zeros(0) if found is None else context.share(found.values).squeeze(1)
        errors = (context.model.heads[self.name](hidden[index]).squeeze(1) - target).square()
        kinds = torch.full_like(index, Modality.named("RANGE"))
        return TermSums(errors.sum(), Items(errors, torch.ones_like(errors), index, kinds))


def sample(number: int) -> Sample:
    random, key = np.random.default_rng(number), f"scan-{number:03d}"
    height, width = (int(CELL * random.integers(1, 4)) for _ in range(2))
    buffer = io.BytesIO()
    np.save(buffer, random.uniform(-1 if number == 7 else 0, 2, (height, width)).astype(np.float32))
    text = f"scan {number}"
    segments = [
        Segment(Modality.named("RANGE"), "scan.npy", 0, 1, height=height, width=width),
        Segment(Modality.TEXT, "txt", text=text),
    ]
    return Sample(key, key, {"scan.npy": buffer.getvalue(), "txt": text.encode()}, segments)


def items(path, options, quarantine):
    for number in range(60):
        yield Item(f"scan-{number:03d}", f"scan-{number:03d}", partial(sample, number))


SOURCES.register("scans")(Source("scans", "none", 0, Config, items, generated=True))


def extended(function, *arguments):
    """What `function` gives where the modality is registered: a process of a pool has not done so itself."""
    Modality.register(RangeSpec())
    return function(*arguments)


@pytest.fixture(scope="module", autouse=True)
def registered():
    """Other tests of this process know nothing of the modality."""
    Modality.register(RangeSpec())
    yield
    del Modality._members[BUILT_IN:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("range")
    write_sources(root)
    prepare("scans", root, root / "scans", text_tokenizer=TextTokenizer.bytes(), options={})
    return root


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    with Pool(2, tmp_path_factory.mktemp("pair")) as pool:
        yield pool


def tree(folder: Path, run: Path, **parallel) -> RunConfig:
    exact = {
        "precision": {"compute": "float64"},
        "model__moe__expert_backend": "loop",
        "optim__matrices": None,
        "training__micro_batch_sequences": 1,
        "losses": {"contrastive": {"weight": 0.3}, "terms": [{"kind": "range", "weight": 0.5}]},
    }
    made = config(folder, run, **exact).model_dump(mode="json")
    made["data"]["sources"]["scans"] = {"kind": "scans", "shards": str(folder / "scans")}
    return validate(RunConfig, made | {"parallel": made["parallel"] | parallel}, "test")


def test_preparation_checks_it_and_counts_what_it_refuses(folder):
    manifest = SourceManifest.load(folder / "scans")
    assert manifest.quarantined == {"unreadable range image": 1}
    assert sum(split.segments("RANGE") for split in manifest.splits.values()) == 59


def test_a_plan_counts_what_is_decoded(folder, tmp_path):
    run = Run.build(tree(folder, tmp_path / "run"))
    number = run.sources.names.index("scans")
    decoder, names = SampleLoader(run.sources.files("train"), run.tokenizers, "pyav"), {"range_start", "range"}
    index = decoder.index(number, 0)
    measures, code = measure_index(index, run.tokenizers, "scans"), Modality.named("RANGE")
    for row in range(len(index)):
        (document,) = decoder(DocumentRef(number, 0, row, 0, 0, 1, False, True))
        cells = int((document.modality == code).sum())
        assert len(document) == measures.length[row] and cells == measures.count("range_cells")[row] > 0
        assert len(document.targets["range"][1]) == len(document.values[code][1]) == cells
        shown = {run.tokenizers.vocabulary.name(int(token)) for token in document.token_ids}
        assert names <= shown
        # What follows stands behind the furthest cell, whose rows and columns are those of the image.
        after = document.position[np.flatnonzero(document.modality == code)[-1] + 1]
        assert (after > document.position[document.modality == code].max()).all()
    whole = sum(
        epoch_positions(split, run.tokenizers, "scans") for split in [run.sources.manifests["scans"].splits["train"]]
    )
    assert whole == sum(
        int(measure_index(decoder.index(number, shard), run.tokenizers, "scans").length.sum())
        for shard in range(len(run.sources.files("train")[number].tars))
    )


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "cp2"])
def test_two_processes_train_it_as_one_also_over_a_resume(pair, folder, tmp_path, layout):
    expected = train(tree(folder, tmp_path / "one"), 4)
    many = tree(folder, tmp_path / "many", **LAYOUTS[layout])
    pair.run(extended, train, many, 2)
    records = pair.run(extended, train, many, 4)[0]
    np.testing.assert_allclose(figures(records), figures(expected), rtol=1e-10)
    for ours, theirs in zip(records, expected, strict=True):
        assert ours["loss_range"] == pytest.approx(theirs["loss_range"], rel=1e-10)
        assert ours["range_from_scans"] == pytest.approx(theirs["range_from_scans"], rel=1e-10)
        assert ours["range_range"] == pytest.approx(theirs["range_range"], rel=1e-10)
    assert records[-1]["loss_range"] < records[0]["loss_range"]


def test_shards_are_read_by_name_whatever_is_registered_beside_it(folder):
    class Other(RangeSpec):
        name = "OTHER"
        count_columns = ("other_cells",)

    Modality.register(Other())
    codes = np.array([0, 1, 7, 7, 6], np.uint8)
    assert renumbered(codes, ["OTHER"], "x").tolist() == [0, 1, 8, 8, 6]
    assert renumbered(codes, ["RANGE"], "x").tolist() == codes.tolist()
    del Modality._members[BUILT_IN + 1 :]
    with pytest.raises(DataError, match="modality OTHER, which is not known here; name the module .* in extensions"):
        renumbered(codes, ["OTHER"], "x")


def test_a_source_of_a_modality_that_nothing_registers_is_refused(folder):
    kept = Modality._members[BUILT_IN:]
    del Modality._members[BUILT_IN:]
    try:
        with pytest.raises(DataError, match="source.json holds segments of modality RANGE, which is not known here"):
            SourceManifest.load(folder / "scans")
    finally:
        Modality._members[BUILT_IN:] = kept


def test_a_process_that_imports_but_the_second_of_two_numbers_both_alike(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("first_of_two", "second_of_two"):
        module = f"class Spec(ModalitySpec):\n    name = {name.upper()!r}\n\n\nModality.register(Spec())\n"
        (tmp_path / f"{name}.py").write_text("from mmoe.schema.modality import Modality, ModalitySpec\n\n\n" + module)
    kept = Modality._members[BUILT_IN:]
    del Modality._members[BUILT_IN:]
    try:
        importlib.import_module("first_of_two")
        importlib.import_module("second_of_two")
        held = pickle.dumps(Modality.named("SECOND_OF_TWO"))
    finally:
        Modality._members[BUILT_IN:] = kept
    script = f"import pickle; print(int(pickle.loads({held!r})), len(pickle.loads({held!r}).__class__))"
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{REPOSITORY}"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(BUILT_IN + 1), str(BUILT_IN + 2)]
    with pytest.raises(ConfigError, match="has code 8 in one process and not in another"):
        pickle.loads(held)


@pytest.mark.parametrize("name, said", [("TEXT", "there is a modality TEXT"), ("range image", "in capitals")])
def test_a_name_that_cannot_be_one_is_refused(name, said):
    spec = RangeSpec()
    spec.name = name
    with pytest.raises(ConfigError, match=said):
        Modality.register(spec)
