"""Evaluates within training: held-out cross-entropy and action error every n steps, on the model as it is spread."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np

from mmoe.checkpoint.rng import capture_rng, restore_rng
from mmoe.data.load.heldout import HeldoutBatches
from mmoe.errors import ConfigError
from mmoe.evaluation.actions import chunk_starts, logged_actions, predict_actions
from mmoe.evaluation.cross_entropy import TokenScores
from mmoe.evaluation.inference import MeasureProgress, inference
from mmoe.recipe.evaluation import EvaluationConfig
from mmoe.training.callback import Callback, EvaluationResult
from mmoe.training.loop import Trainer
from mmoe.training.run import Run
from mmoe.training.step import StepResult


class Evaluation(Callback):
    """Measures the run on a bounded, seeded choice of held-out batches, and tells all callbacks.

    Every rank has one. It changes nothing of what training draws, reads and computes. `shown` is entered for each
    evaluation and gives what is told of every round of its batches.
    """

    name = "evaluation"

    def __init__(
        self,
        config: EvaluationConfig,
        shown: Callable[[], AbstractContextManager[MeasureProgress]] = lambda: nullcontext(lambda *_: None),
    ) -> None:
        self.config, self._shown = config, shown

    def on_start(self, trainer: Trainer) -> None:
        """Keep the trainer, whose model is measured. Raises ConfigError where nothing is held out."""
        self._trainer = trainer
        manifests = trainer.run.sources.manifests
        only = [name for name, manifest in manifests.items() if manifest.holds_out]
        if not only:
            raise ConfigError(
                f"evaluation.every_steps is {self.config.every_steps}, but no source holds anything out "
                f"({', '.join(manifests)}); set it to null, or prepare a source with prepare.heldout_share"
            )
        self._heldout = trainer.run.heldout(isolated=False, only=only, most_batches=self.config.batches)

    def on_step(self, result: StepResult) -> None:
        """Measure after every `every_steps`-th step."""
        if self.config.every_steps is None or result.step % self.config.every_steps:
            return
        trainer = self._trainer
        with _random_state_kept(), self._shown() as show:

            def progress(what: str, done: int, of: int) -> None:
                trainer.beat("evaluation")
                show(what, done, of)

            scalars = measure_run(trainer.run, self._heldout, progress)
        trainer.tell_evaluation(EvaluationResult(result.step, scalars))


def measure_run(run: Run, heldout: HeldoutBatches, progress: MeasureProgress | None = None) -> dict[str, float]:
    """Measure the run on held-out batches; all ranks call this, and all get the same figures.

    ``ce_<modality>`` and ``ce_<modality>_from_<source>`` are means over labels in nats, by the modality of the target;
    ``action_mse`` and ``action_mse_from_<source>`` means over elements in normalized units (of discrete actions, from
    the bins that were logged). ``seconds`` is the time it took on this rank.
    """
    started = time.perf_counter()
    sources = run.sources.names
    tokens = TokenScores(run.tokenizers.vocabulary, sources)
    actions = np.zeros((len(sources), 2))  # sum of squares and number of elements
    with inference(run, progress) as model:
        for _, batch, hidden in model.outputs(heldout, "evaluation"):
            tokens.add(batch, *model.label_log_probabilities(hidden, batch))
            starts, parts = chunk_starts(batch)
            if len(starts):
                target, mask = logged_actions(run, batch, starts, parts)
                squares = np.where(mask, (predict_actions(model, hidden, batch, starts, parts) - target) ** 2, 0.0)
                np.add.at(actions, parts[:, 0], np.stack([squares.sum((1, 2)), mask.sum((1, 2))], axis=1))
        tokens.sum_over(model.total)
        actions = model.total(actions)
    report = tokens.report()
    scalars = {f"ce_{kind}": ce for kind, ce in report["val_ce"].items()}
    for source, entries in report["ce_by_source"].items():
        scalars |= {f"ce_{kind}_from_{source}": entry["ce"] for kind, entry in entries.items()}
    if actions[:, 1].any():
        scalars["action_mse"] = float(actions[:, 0].sum() / actions[:, 1].sum())
        acting = [number for number in range(len(sources)) if actions[number, 1]]
        scalars |= {f"action_mse_from_{sources[n]}": float(actions[n, 0] / actions[n, 1]) for n in acting}
    return scalars | {"seconds": time.perf_counter() - started}


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Let what training draws next not depend on what is drawn within."""
    state = capture_rng()
    try:
        yield
    finally:
        restore_rng(state)
