"""The loop on small packed multimodal batches: exact resume, accumulation, and the sentences of a run."""

import os
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from mmoe.commands import session
from mmoe.commands.console import Console
from mmoe.config.load import dump, load, validate
from mmoe.errors import CheckpointError, ConfigError, DivergenceError
from mmoe.monitoring.metrics import MetricsCallback, state_digest
from mmoe.monitoring.reader import read_lines
from mmoe.recipe.config import RunConfig
from mmoe.runtime.peak_memory import PeakMemory
from mmoe.schema.batch import Values
from mmoe.schema.modality import Modality
from mmoe.training.callback import Callback
from mmoe.training.decision import Decision
from mmoe.training.loop import Trainer
from mmoe.training.run import Run
from tests.data.synthetic import MAKERS, MEL, write_sources


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("training")
    write_sources(root)
    return root


def config(folder, run, **changes) -> RunConfig:
    tree = {
        "data": {
            "sources": {name: {"kind": "text", "shards": str(folder / name)} for name in MAKERS},
            "sequence_length": 160,
            "window_documents": 40,
        },
        "tokenizers": {
            "vision": {"patch": 8, "max_patches": 12},
            "audio": {"path": str(folder / "codec.safetensors"), "mel": MEL.model_dump()},
            "action": {"chunk": 4},
        },
        "model": {
            "d_model": 32,
            "n_layers": 2,
            "n_heads": 2,
            "n_kv_heads": 1,
            "intermediate_size": 48,
            "moe": {"n_experts": 4, "top_k": 2, "intermediate_size": 16, "layer_freq": 2},
        },
        "losses": {"contrastive": {"group_sequences": 1}},
        "optim": {"lr": {"peak": 3e-3}, "matrices": {"kind": "muon"}},
        "training": {
            "run": str(run),
            "micro_batch_sequences": 2,
            "global_batch_positions": 640,
            "budget_positions": 640 * 8,
        },
        "checkpoint": {"every_steps": 3},
        "evaluation": {"at_end": False},
        "monitoring": {"log_every_steps": 1, "tables_every_steps": 1, "sinks": [{"kind": "jsonl"}, {"kind": "arrays"}]},
    }
    for key, value in changes.items():
        node = tree
        *path, last = key.split("__")
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return validate(RunConfig, tree, "test")


def trainer(configuration, *callbacks, stop_at=None) -> Trainer:
    run = Run.build(configuration)
    run.save_config()
    return Trainer(run, list(callbacks), stop_at)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "model__moe__score_func": "sigmoid",
            "model__moe__bias_update_rate": 0.01,
            "model__moe__router_noise": 0.5,
            "model__moe__n_group": 2,
            "losses__load_balance": {"sequence": 0.001, "micro_batch": 0.01, "global_batch": 0.01},
        },
    ],
    ids=["default", "bias-noise-groups"],
)
def test_a_stopped_and_resumed_run_equals_the_uninterrupted_one_bit_for_bit(folder, tmp_path, changes):
    whole = trainer(config(folder, tmp_path / "whole", **changes))
    whole.train()
    stopped = trainer(config(folder, tmp_path / "cut", **changes), stop_at=5)
    stopped.train()
    torch.manual_seed(123)  # what a new process would start from
    resumed = trainer(config(folder, tmp_path / "cut", **changes))
    resumed.resume()
    assert resumed.state.step == 5 and resumed.state.session == 1
    resumed.train()
    assert state_digest(resumed.state) == state_digest(whole.state)
    assert resumed.state.position == whole.state.position
    for router, other in zip(whole.run.model.decoder.routers, resumed.run.model.decoder.routers, strict=True):
        if changes:
            assert torch.equal(router.expert_bias, other.expert_bias) and router.expert_bias.abs().max() > 0
        else:
            assert router.expert_bias is None


def test_the_bias_follows_the_loads_of_a_whole_step_and_no_optimizer_holds_it(folder, tmp_path):
    run = trainer(
        config(
            folder,
            tmp_path / "run",
            model__moe__bias_update_rate=0.25,
            optim__optimizer={"kind": "adamw", "weight_decay": 0.5},
        )
    )
    steps, bias = run.state.stream.steps(), torch.zeros(1, 4)
    held = {id(p) for group in run.state.optimizer.param_groups for p in group["params"]}
    assert id(run.run.model.decoder.routers[0].expert_bias) not in held
    for _ in range(3):
        result = run.train_step(next(steps))
        load = result.routing.sum.load_NMSE.sum((1, 2)).double()
        bias += 0.25 * (load.mean(1, keepdim=True) - load).sign()
        assert torch.equal(torch.stack([r.expert_bias for r in run.run.model.decoder.routers]), bias)


def test_resuming_from_an_older_checkpoint_replays_the_same_steps(folder, tmp_path):
    configuration = config(folder, tmp_path / "run", monitoring__digest_steps=[5])
    with PeakMemory() as memory:
        trainer(configuration, MetricsCallback(memory), stop_at=5).train()
        again = trainer(configuration, MetricsCallback(memory))
        again.resume(step=3)
        again.train()
    first = {record["step"]: record for record in read_lines(tmp_path / "run" / "metrics-undone.jsonl")}
    records = list(read_lines(tmp_path / "run" / "metrics.jsonl"))
    assert [(r["step"], r["session"]) for r in records] == [(n, int(n > 3)) for n in range(1, 9)]
    second = {record["step"]: record for record in records[3:5]}
    assert list(first) == [4, 5]
    for step in first:
        for name in ("loss", "grad_norm", "positions", "tokens", "slots_routed", "packing_efficiency"):
            assert first[step][name] == second[step][name], name
    assert first[5]["digest"] == second[5]["digest"]


def test_cutting_a_step_into_micro_batches_changes_no_gradient(folder, tmp_path):
    """Capacity, InfoNCE and the auxiliary loss live inside a sequence here, so only the order of sums differs."""
    reports = []
    for micro in (1, 2, 4):
        one = trainer(
            config(
                folder,
                tmp_path / f"micro{micro}",
                training__micro_batch_sequences=micro,
                precision__compute="float64",
                model__moe__expert_backend="loop",
            )
        )
        gradients = {}

        model = one.run.model
        handles = [
            p.register_post_accumulate_grad_hook(lambda q, n=n, g=gradients: g.__setitem__(n, q.grad.clone()))
            for n, p in model.named_parameters()
        ]
        result = one.train_step(next(one.state.stream.steps()))
        for handle in handles:
            handle.remove()
        reports.append((float(result.losses.loss), result.grad_norm, gradients))
    loss, norm, gradients = reports[-1]
    for other_loss, other_norm, other in reports[:-1]:
        assert other_loss == pytest.approx(loss, rel=1e-12) and other_norm == pytest.approx(norm, rel=1e-11)
        assert other.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert torch.allclose(gradient, other[name], rtol=1e-9, atol=1e-13), name


def test_the_loss_falls(folder, tmp_path):
    run = trainer(config(folder, tmp_path / "run", training__budget_positions=640 * 40))
    steps = run.state.stream.steps()
    losses = [float(run.train_step(next(steps)).losses.loss) for _ in range(40)]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


def test_discrete_actions_train_through_the_vocabulary(folder, tmp_path):
    run = trainer(config(folder, tmp_path / "run", tokenizers__action={"mode": "discrete", "chunk": 4, "bins": 8}))
    steps = run.state.stream.steps()
    record = {}
    for _ in range(4):
        record |= run.setting.terms.figures(run.train_step(next(steps)).losses, run.run.sources.names)
    assert record["ce_action"] > 0 and "action_from_clip" not in record


def test_a_run_that_was_moved_is_loaded_where_it_lies(folder, tmp_path):
    """Else an evaluation of a copy would overwrite that of the original."""
    one = trainer(config(folder, tmp_path / "before"), stop_at=1)
    one.train()
    (tmp_path / "before").rename(tmp_path / "after")
    loaded = Run.load(tmp_path / "after")
    assert loaded.folder == tmp_path / "after"
    for name, weight in one.run.model.state_dict().items():
        assert torch.equal(weight, loaded.model.state_dict()[name])


class Tick(Callback):
    """Moves the clock of a trainer by `seconds` before every step, and nothing else does."""

    name = "tick"

    def __init__(self, seconds):
        self.seconds, self.now, self.saved = seconds, 0.0, []

    def on_start(self, trainer):
        trainer._clock = lambda: self.now
        trainer._saved_at = 0.0

    def before_step(self, data):
        self.now += self.seconds
        return Decision.GO

    def on_checkpoint(self, path):
        self.saved.append(int(path.name.rpartition("-")[2]))


@pytest.mark.parametrize(
    "steps, minutes, saved",
    [(None, 1.0, [3, 6, 8]), (4, 1.0, [3, 4, 7, 8]), (4, None, [4, 8]), (None, None, [8]), (None, 0.4, [*range(1, 9)])],
)
def test_a_checkpoint_is_due_by_steps_of_the_run_and_by_minutes_since_the_last_one(
    folder, tmp_path, steps, minutes, saved
):
    tick = Tick(25)
    changes = {"checkpoint__every_steps": steps, "checkpoint__every_minutes": minutes, "checkpoint__keep": 9}
    run = trainer(config(folder, tmp_path / "run", model__moe=None, **changes), tick)
    run.train()
    assert tick.saved == saved == run.checkpoints.steps()


def test_ctrl_c_saves_and_leaves_and_the_next_session_resumes(folder, tmp_path):
    class Interrupt(Callback):
        name = "interrupt"

        def on_step(self, result):
            if result.step == 1:  # all processes agree to end after the next step
                os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    run = trainer(config(folder, tmp_path / "run"), Interrupt())
    run.train()
    assert run.interrupted and run.state.step == 2 and run.checkpoints.latest_step() == 2
    assert signal.getsignal(signal.SIGINT) is before


def test_a_full_disk_keeps_the_last_checkpoint(folder, tmp_path, monkeypatch):
    run = trainer(config(folder, tmp_path / "run"), stop_at=3)
    run.train()
    full = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr("shutil.disk_usage", lambda path: full)
    with pytest.raises(CheckpointError, match="checkpoints"):
        run.save()
    assert run.checkpoints.latest_step() == 3


def test_a_step_that_diverges_changes_no_weight_and_says_so(folder, tmp_path):
    run = trainer(config(folder, tmp_path / "run"))
    with torch.no_grad():
        run.run.model.decoder.norm.weight.fill_(float("nan"))
    before = state_digest(run.state)
    with pytest.raises(DivergenceError, match="step 1 is nan .ce nan.* no weight was changed"):
        run.train_step(next(run.state.stream.steps()))
    assert state_digest(run.state) == before


def test_a_diverged_step_names_the_router_whose_logits_were_not_finite(folder, tmp_path):
    run = trainer(config(folder, tmp_path / "run", model__moe={"n_experts": 4, "top_k": 2, "intermediate_size": 16}))
    with torch.no_grad():
        run.run.model.decoder.routers[1].weight[2] = float("nan")
    before = [p.clone() for p in run.run.model.parameters()]
    with pytest.raises(DivergenceError, match="not finite from layer of experts 1 .from 0. on; no weight was changed"):
        run.train_step(next(run.state.stream.steps()))
    assert all(torch.equal(a, b) or a.isnan().any() for a, b in zip(before, run.run.model.parameters()))


def test_a_changed_config_is_refused_by_naming_the_keys(folder, tmp_path):
    console = Console(quiet=True)
    options = {"fresh": False, "stop_after": 3, "from_step": None}
    session.train(config(folder, tmp_path / "run"), console, **options)
    with pytest.raises(ConfigError, match="optim.lr.peak .0.003 -> 0.1."):
        session.train(config(folder, tmp_path / "run", optim__lr__peak=0.1), console, **options)


def test_a_batch_that_is_not_made_of_whole_groups_is_refused_with_the_remedy(folder, tmp_path):
    with pytest.raises(ConfigError, match="group_sequences is 3, but a global batch has 4 sequences .* or to null"):
        config(folder, tmp_path / "run", losses__contrastive={"group_sequences": 3})


def test_the_resolved_tree_reloads_to_the_same_tree(folder, tmp_path):
    tree = config(folder, tmp_path / "run")
    (tmp_path / "config.yaml").write_text(dump(tree))
    assert load(RunConfig, tmp_path / "config.yaml") == tree


def test_blinding_a_caption_leaves_its_hidden_states_alone(folder, tmp_path):
    """Isolated pairs: with a dense model, other pixels change nothing at all of the caption's states."""
    run = Run.build(config(folder, tmp_path / "run", model__moe=None, data__isolated_pair_share=1.0))
    batch = next(iter(Trainer(run, []).state.stream.steps())).batches.__next__()
    vision = batch.values[Modality.VISION]
    changed = replace(
        batch, values={**batch.values, Modality.VISION: Values(torch.randn_like(vision.values), vision.index)}
    )
    run.model.eval()
    with torch.no_grad():
        before, after = run.model(batch).hidden.flatten(0, 1), run.model(changed).hidden.flatten(0, 1)
    kinds = batch.pairs.modality[:, 1] == Modality.TEXT
    assert kinds.all() and len(kinds) > 0
    for span in batch.pairs.span[:, 1]:
        assert torch.equal(before[span[0] : span[1]], after[span[0] : span[1]])
    assert not torch.equal(before, after)


def test_what_is_decoded_does_not_depend_on_the_precision_of_who_asks(folder, tmp_path):
    """An evaluation asks from within bfloat16: codes of audio came out otherwise where no worker decodes."""
    run = Run.build(config(folder, tmp_path / "run"))
    expected = list(run.heldout(isolated=False))
    with torch.autocast("cpu", torch.bfloat16):
        found = list(run.heldout(isolated=False))
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.token_ids, theirs.token_ids)
        for kind, values in theirs.values.items():
            assert torch.equal(ours.values[kind].values, values.values)
