"""A source, a callback that skips a step and a sink, from this file alone."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from mmoe.config.base import Config
from mmoe.config.load import validate
from mmoe.monitoring.metrics import MetricsCallback
from mmoe.preparation.prepare import prepare
from mmoe.preparation.sources import SOURCES
from mmoe.preparation.sources.base import Item, Source
from mmoe.recipe.callbacks import CALLBACKS, CallbackConfig
from mmoe.recipe.config import RunConfig
from mmoe.recipe.monitoring import SINKS, SinkConfig, SinkContext
from mmoe.runtime.peak_memory import PeakMemory
from mmoe.schema.modality import Modality
from mmoe.schema.sample import Sample, Segment
from mmoe.tokenizers.text import TextTokenizer
from mmoe.training.callback import Callback
from mmoe.training.decision import Decision
from mmoe.training.loop import Trainer
from mmoe.training.run import Run
from tests.data.synthetic import write_sources
from tests.distributed.test_training import EXACT, LAYOUTS
from tests.training.test_trainer import config


class LinesConfig(Config):
    first: int = 0  # lines before this one are left out


def sample(key: str, text: str) -> Sample:
    return Sample(key, key, {"txt": text.encode()}, [Segment(Modality.TEXT, "txt", text=text)])


def items(path: Path, options: LinesConfig, quarantine):
    for number, line in enumerate(path.read_text().splitlines()[options.first :]):
        key = f"line-{number:04d}"
        yield Item(key, key, partial(sample, key, line))


SOURCES.register("lines_of_a_file")(Source("lines_of_a_file", "none", 0, LinesConfig, items))


@CALLBACKS.register("skip")
class SkipConfig(CallbackConfig):
    step: int

    def build(self) -> Callback:
        return Skip(self.label, self.step)


class Skip(Callback):
    """Skips a step, and counts in checkpoints what it saw."""

    def __init__(self, name: str, step: int) -> None:
        self.name, self.step, self.seen = name, step, 0

    def on_start(self, trainer) -> None:
        self.trainer = trainer

    def before_step(self, data) -> Decision:
        self.seen += 1
        return Decision.SKIP if self.trainer.state.step + 1 == self.step else Decision.GO

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state) -> None:
        self.seen = state.get("seen", 0)


@SINKS.register("losses_alone")
class LossesConfig(SinkConfig):
    def build(self, context: SinkContext) -> "LossesSink":
        return LossesSink(context.folder / "losses.json")


class LossesSink:
    """One JSON object of losses by step."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.losses = json.loads(path.read_text()) if path.exists() else {}

    def write(self, record) -> None:
        self.losses[str(record.step)] = record.scalars["loss"]

    def rewind(self, step: int) -> None:
        self.losses = {at: loss for at, loss in self.losses.items() if int(at) <= step}

    def state_dict(self):
        self.path.write_text(json.dumps(self.losses))
        return {}

    def load_state_dict(self, state) -> None:
        pass

    def close(self) -> None:
        self.state_dict()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("parts")
    write_sources(root)
    poem = root / "poem.txt"
    poem.write_text("".join(f"Line {i} of a poem about {i * i}, and lines.\n" for i in range(80)))
    prepare("lines_of_a_file", poem, root / "poem", text_tokenizer=TextTokenizer.bytes(), options={"first": 20})
    return root


def tree(folder: Path, run: Path, **parallel) -> RunConfig:
    made = config(folder, run, **EXACT).model_dump(mode="json")
    made["data"]["sources"]["poem"] = {"kind": "lines_of_a_file", "shards": str(folder / "poem")}
    made["training"]["callbacks"] = [{"kind": "skip", "step": 2}]
    made["monitoring"]["sinks"] = [{"kind": "jsonl"}, {"kind": "losses_alone"}]
    return validate(RunConfig, made | {"parallel": made["parallel"] | parallel}, "test")


def train(configuration: RunConfig, stop_at: int) -> int:
    """How often the callback of all sessions was asked."""
    run = Run.build(configuration)
    run.folder.mkdir(exist_ok=True)
    chosen = [callback.build() for callback in configuration.training.callbacks]
    trainer = Trainer(run, [*chosen, MetricsCallback(PeakMemory())], stop_at)
    if trainer.checkpoints.latest_step() is not None:
        trainer.resume()
    trainer.train()
    return chosen[0].seen


def losses(folder: Path) -> dict[str, float]:
    return json.loads((folder / "losses.json").read_text())


@pytest.mark.parametrize("layout", ["dp2", "ep2", "pp2"])
def test_they_work_on_two_processes_as_on_one_also_over_a_resume(two, folder, tmp_path, layout):
    assert train(tree(folder, tmp_path / "one"), 4) == 4
    many = tree(folder, tmp_path / "many", **LAYOUTS[layout])
    assert two.run(train, many, 3) == [3, 3]
    (tmp_path / "many" / "losses.json").write_text(json.dumps(losses(tmp_path / "many") | {"9": 1.0}))
    assert two.run(train, many, 4) == [4, 4]
    ours, theirs = losses(tmp_path / "many"), losses(tmp_path / "one")
    assert list(ours) == list(theirs) == ["1", "2", "3", "4"]  # what the run never did was purged
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-10)
    records = [json.loads(line) for line in (tmp_path / "many" / "metrics.jsonl").read_text().splitlines()]
    assert any(record["served_positions/poem"] for record in records)


def test_the_skipped_step_changed_no_weight(folder, tmp_path):
    """Steps 2 and 3 of the run begin from the weights that step 1 left."""
    plain = tree(folder, tmp_path / "plain").model_copy(deep=True)
    training = plain.training.model_copy(update={"callbacks": (SkipConfig(kind="skip", step=99),)})
    train(plain.model_copy(update={"training": training}), 3)
    train(tree(folder, tmp_path / "skipped"), 3)
    plain_losses, skipped = losses(tmp_path / "plain"), losses(tmp_path / "skipped")
    assert plain_losses["2"] == skipped["2"] and plain_losses["3"] != skipped["3"]
