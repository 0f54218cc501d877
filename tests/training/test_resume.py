"""A run that goes on with another config: longer, elsewhere, with another rate; and what is refused."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from mmoe.commands import session
from mmoe.commands.main import app
from mmoe.config.load import dump
from mmoe.data.plan.mixture import Mixture, SourceSize
from mmoe.errors import CheckpointError, ConfigError
from mmoe.monitoring.metrics import state_digest
from mmoe.recipe.config import RunConfig
from mmoe.training.changes import Change, History, record_changes
from mmoe.training.resume import adjust, check_resume
from mmoe.training.run import read_config
from tests.data.synthetic import MAKERS, write_sources
from tests.training.test_trainer import config, trainer

STEP = 640  # positions
CONSTANT = {"kind": "constant", "warmup": {"steps": 2}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("resume")
    write_sources(root)
    return root


def configured(folder, run, steps: int, **changes) -> RunConfig:
    changes = {"model__moe": None, "optim__schedule": CONSTANT, **changes}
    return config(folder, run, training__budget_positions=STEP * steps, **changes)


def train(configuration: RunConfig, **options) -> str:
    """What is printed."""
    console = Console(record=True, file=open(os.devnull, "w"), width=1000)
    session.train(configuration, console, **{"fresh": False, "stop_after": None, "from_step": None, **options})
    return console.export_text()


def end(configuration: RunConfig):
    """Digest, stream and step of the newest checkpoint."""
    one = trainer(configuration)
    one.resume()
    return state_digest(one.state), one.state.position, one.state.step


def rates(run: Path) -> dict[int, float]:
    return {r["step"]: r["lr"] for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}


def recorded(run: Path) -> list[tuple]:
    return [(c.step, c.key, c.before, c.after) for c in History.read(run).changes]


STAGES = {
    "first": {"until": STEP * 6 + 100, "weights": {"text": 1.0, "image": 1.0}},
    "then": {"temperature": 2.0},
}


FEW = {"all": {"weights": {"text": 1.0, "image": 1.0}}}


@pytest.mark.parametrize("stages", [FEW, STAGES], ids=["epochs", "stages"])
def test_a_finished_run_that_is_extended_twice_equals_one_that_was_so_long_from_the_start(folder, tmp_path, stages):
    """Over the end of an epoch of some source, and over a stage's border, from inside a window of the plan."""
    changes = {"data__stages": stages}
    whole = configured(folder, tmp_path / "whole", 13, **changes)
    train(whole)
    for steps in (4, 9, 13):
        said = train(configured(folder, tmp_path / "cut", steps, **changes))
    assert "training.budget_positions (5760 -> 8320)" in said and "resumed" in said
    assert "the rate at" not in said and "the shares of" not in said  # nothing that is done follows the length
    assert end(whole) == end(configured(folder, tmp_path / "cut", 13, **changes))
    plan = end(whole)[1]["plan"]
    assert max(plan["drawn"]) > 24  # rows of every source
    assert recorded(tmp_path / "cut") == [
        (4, "training.budget_positions", STEP * 4, STEP * 9),
        (9, "training.budget_positions", STEP * 9, STEP * 13),
    ]


def test_from_an_older_checkpoint_the_extension_counts_from_there(folder, tmp_path):
    whole = configured(folder, tmp_path / "whole", 9)
    train(whole)
    train(configured(folder, tmp_path / "run", 5, checkpoint__keep=9))
    train(configured(folder, tmp_path / "run", 7, checkpoint__keep=9))
    said = train(configured(folder, tmp_path / "run", 9, checkpoint__keep=9), from_step=3)
    assert "the change of training.budget_positions (3200 -> 4480) after step 5 is undone" in said
    assert recorded(tmp_path / "run") == [(3, "training.budget_positions", STEP * 5, STEP * 9)]
    assert end(configured(folder, tmp_path / "run", 9, checkpoint__keep=9)) == end(whole)


def test_a_rate_that_follows_the_length_goes_on_where_the_new_length_has_it_and_that_is_said(folder, tmp_path):
    schedule = {"kind": "cosine", "warmup": {"steps": 1}}
    train(configured(folder, tmp_path / "run", 4, optim__schedule=schedule))
    longer = configured(folder, tmp_path / "run", 8, optim__schedule=schedule)
    said = train(longer)
    rate = longer.optim.build_schedule(longer.batch)
    had = rates(tmp_path / "run")
    assert had[4] == pytest.approx(3e-4) and had[5] == rate(4)
    assert f"the rate at step 4 was 0.0003 and goes on with {rate(4):.4g}: optim.schedule.kind cosine follows" in said
    assert f"another rate in 3 of these 4 steps, {rate(3):.4g} in the last" in said


def test_a_shorter_budget_ends_the_run_sooner_but_not_before_what_is_done(folder, tmp_path):
    train(configured(folder, tmp_path / "run", 9), stop_after=4)
    with pytest.raises(ConfigError, match="is 3 steps, but 4 are done.* set it to 2560 or more.*mmoe train .*run"):
        train(configured(folder, tmp_path / "run", 3))
    assert read_config(tmp_path / "run").training.budget_positions == STEP * 9
    train(configured(folder, tmp_path / "run", 5))
    assert "has its 5 steps already; a larger training.budget_positions" in train(read_config(tmp_path / "run"))


# Without training: the check alone.


def mixture(of: RunConfig) -> Mixture:
    """Over sources of 2,000 positions and more."""
    found = [SourceSize(name, 2000 * (i + 1), s.max_epochs) for i, (name, s) in enumerate(of.data.sources.items())]
    return Mixture(of.data.stages, found, of.training.budget_positions)


def check(before: RunConfig, now: RunConfig, step: int, *given: str, changes=()) -> list[str]:
    return check_resume(History(Path("runs/x"), before, tuple(changes)), now, step, mixture, given)


@pytest.mark.parametrize(
    "changes, key, values, why",
    [
        ({"data__window_documents": 41}, "data.window_documents", "40 -> 41", "data decides what every step"),
        ({"model__d_model": 64}, "model.d_model", "32 -> 64", "model decides which function"),
        ({"losses__z_loss": 0.5}, "losses.z_loss", "0.001 -> 0.5", "losses decides what is minimized"),
        ({"optim__matrices": None}, "optim.matrices", ".*momentum.* -> None", "optim decides what a step does"),
        ({"training__seed": 1}, "training.seed", "0 -> 1", "training decides how the run begins"),
        ({"precision__compute": "bfloat16"}, "precision.compute", "float32 -> bfloat16", "precision decides"),
        ({"tokenizers__vision__patch": 4}, "tokenizers.vision.patch", "8 -> 4", "tokenizers decides which ids"),
        (
            {"data__sources": {name: {"kind": "text", "shards": f"/d/{name}"} for name in reversed(MAKERS)}},
            "data.sources",
            "text, image, audio, clip -> clip, audio, image, text",
            "data decides",
        ),
    ],
)
def test_a_changed_identity_is_refused_by_key_values_reason_and_remedy(changes, key, values, why):
    before = config(Path("/d"), "/run")
    with pytest.raises(ConfigError, match=rf"runs/x/config.yaml differs .* in {key} \({values}\); {why}.*--fresh"):
        check(before, config(Path("/d"), "/run", **changes), 3)


def test_layout_and_operation_may_change_and_are_said():
    before = config(Path("/d"), "/run")
    now = config(Path("/moved"), "/else", training__micro_batch_sequences=1, parallel={"tp": 2}, data__workers=3)
    (said,) = check(before, now, 3)
    for change in ("data.workers (0 -> 3)", "parallel.tp (1 -> 2)", "training.run (/run -> /else)", "audio.path"):
        assert change in said
    assert check(before, before, 3) == []


def test_a_decay_that_had_not_begun_is_nothing_to_say_and_one_that_had_is():
    schedule = {"kind": "wsd", "warmup": {"steps": 2}, "decay": {"steps": 10}}
    before, now = (configured(Path("/d"), "/run", steps, optim__schedule=schedule) for steps in (40, 80))
    assert len(check(before, now, 30)) == 1  # the other budget
    assert "another rate in 1 of these 31 steps" in check(before, now, 31)[1]
    fraction = {**schedule, "warmup": {"fraction": 0.1}}
    before, now = (configured(Path("/d"), "/run", steps, optim__schedule=fraction) for steps in (40, 80))
    said = check(before, now, 2)[1]
    assert "the rate at step 2 was 0.0015 and goes on with 0.001125" in said and "2 of these 2 steps, 0.00075" in said


def test_shares_that_follow_the_length_are_said_where_they_are_passed():
    moving = {"first": {"until": STEP * 4, "temperature": 1.0}, "last": {"temperature": [1.0, 5.0]}}
    before, now = (configured(Path("/d"), "/run", steps, data__stages=moving) for steps in (12, 24))
    said = check(before, now, 8)
    assert len(said) == 2 and "the shares of stage last follow the length of the run: at position" in said[1]
    assert len(check(before, now, 4)) == 1  # not passed yet


def test_a_source_that_would_be_seen_more_often_than_it_may_is_refused_and_the_remedies_work():
    def run(steps, most):
        sources = {name: {"kind": "text", "shards": f"/d/{name}"} for name in MAKERS}
        sources["text"]["max_epochs"] = most
        return configured(Path("/d"), "/run", steps, data__sources=sources, data__stages={"all": {"temperature": 9.0}})

    before = run(20, 1.0)  # 12,800 positions, a quarter of them wanted of 2,000
    with pytest.raises(ConfigError, match=r"text.max_epochs is 1, .* of 40 steps would see source text 1.5 times"):
        check(before, run(40, 1.0), 20)
    assert len(check(before, run(40, None), 20)) == 2
    assert len(check(before, run(40, 2.0), 20)) == 1  # the share it had
    assert len(check(before, run(19, 1.0), 18)) == 2
    once = Change(20, "training.budget_positions", STEP * 20, STEP * 40)
    with pytest.raises(ConfigError, match="of 80 steps would see source text 2 times"):  # 1, 1/2 and 1/2
        check(run(40, 1.0), run(80, 1.0), 40, changes=[once])


# The rate of a run on its way.


def test_a_rate_that_is_set_is_taken_recorded_and_counts_from_then_on(folder, tmp_path):
    run = tmp_path / "run"
    original = configured(folder, run, 9)
    train(original, stop_after=3)
    said = train(original, stop_after=5, adjustments=["optim.lr.peak=1e-3", "optim.optimizer.weight_decay=0"])
    assert "optim.lr.peak (0.003 -> 0.001)" in said and "rate at step 3 was 0.003 and goes on with 0.001" in said
    assert rates(run) == {1: 0.0015, 2: 0.003, 3: 0.003, 4: 0.001, 5: 0.001}
    assert recorded(run) == [(3, "optim.lr.peak", 3e-3, 1e-3), (3, "optim.optimizer.weight_decay", 0.1, 0)]
    assert read_config(run).optim.lr.peak == 1e-3
    with pytest.raises(ConfigError) as refused:
        train(original)
    for part in (
        "optim.lr.peak (0.001 -> 0.003)",
        f"optim.lr.peak was changed after step 3 ({run}/changes.jsonl), and that counts",
        f"mmoe train {run}",
        "or with optim.lr.peak=0.001;",
        "--set optim.lr.peak=0.003 changes it again",
    ):
        assert part in str(refused.value)
    train(read_config(run), stop_after=6)
    same = ["optim.lr.peak=0.001", "optim.optimizer.weight_decay=0.0"]
    train(original, stop_after=7, adjustments=same)
    train(
        configured(folder, run, 9, optim__lr__peak=1e-3, optim__optimizer={"kind": "adamw", "weight_decay": 0.0}),
        stop_after=8,
    )
    assert len(recorded(run)) == 2  # nothing new was changed
    train(original, adjustments=["optim.lr.peak=0.003", "optim.optimizer.weight_decay=0.0"])
    assert rates(run)[8] == 0.001 and rates(run)[9] == 0.003
    assert recorded(run)[2:] == [(8, "optim.lr.peak", 1e-3, 3e-3)]


def test_going_back_before_a_change_undoes_it_and_asks_where_the_config_still_has_it(folder, tmp_path):
    run = tmp_path / "run"
    original = configured(folder, run, 9, checkpoint={"every_steps": 2, "keep": 9})
    train(original, stop_after=4)
    train(original, stop_after=6, adjustments=["optim.lr.peak=1e-3"])
    changed = read_config(run)
    with pytest.raises(ConfigError) as refused:
        train(changed, from_step=2)
    for part in (
        "after step 4",
        "which going back to step 2 undoes: --set optim.lr.peak=0.001 changes it from here on",
        "optim.lr.peak=0.003 goes on without the change",
    ):
        assert part in str(refused.value)
    said = train(original, from_step=2, stop_after=6)
    assert "the change of optim.lr.peak (0.003 -> 0.001) after step 4 is undone" in said
    assert recorded(run) == [] and rates(run)[6] == 0.003 and read_config(run).optim.lr.peak == 0.003
    train(original, stop_after=8, adjustments=["optim.lr.peak=1e-3"])
    train(changed, from_step=4, stop_after=5, adjustments=["optim.lr.peak=1e-3"])
    assert recorded(run) == [(4, "optim.lr.peak", 3e-3, 1e-3)] and rates(run)[5] == 0.001


def test_where_damage_takes_the_run_back_before_a_change_it_is_asked_for_and_recorded_from_there(folder, tmp_path):
    run = tmp_path / "run"
    original = configured(folder, run, 9, checkpoint={"every_steps": 2, "keep": 9})
    train(original, stop_after=4)
    train(original, stop_after=6, adjustments=["optim.lr.peak=1e-3"])
    for step in (4, 6):
        (run / f"checkpoints/step-0000000{step}/state.json").write_text("")
    with pytest.raises(
        ConfigError, match="going back to step 2 undoes: --set optim.lr.peak=0.001 changes it from here"
    ):
        train(read_config(run), stop_after=3)
    assert recorded(run) == [(4, "optim.lr.peak", 3e-3, 1e-3)]
    train(read_config(run), stop_after=3, adjustments=["optim.lr.peak=1e-3"])
    assert recorded(run) == [(2, "optim.lr.peak", 3e-3, 1e-3)] and rates(run)[3] == 0.001


@given(
    moves=st.lists(
        st.tuples(
            st.integers(0, 20),
            st.sampled_from([1e-3, 2e-3, 3e-3]),
            st.sampled_from([None, {"steps": 3}, {"fraction": 0.1}]),
            st.integers(30, 33),
        ),
        min_size=1,
        max_size=6,
    )
)
@settings(max_examples=30, deadline=None)
def test_the_record_tells_the_config_of_every_step_of_the_course_that_counts(tmp_path_factory, moves):
    """Whatever was changed when, and however often the run went back."""
    run = tmp_path_factory.mktemp("course")
    first = configured(Path("/d"), run, 30, optim__schedule={"kind": "cosine"})
    (run / "config.yaml").write_text(dump(first))
    course, done = [first] * 21, 0  # the config in force when so many steps were done
    for step, peak, hold, steps in moves:
        step = min(step, done + 5)
        schedule = {"kind": "cosine", "hold": hold}
        now = configured(Path("/d"), run, steps, optim__lr__peak=peak, optim__schedule=schedule)
        record_changes(History.read(run), step, now)
        (run / "config.yaml").write_text(dump(now))
        course[step:] = [now] * (21 - step)
        done = step
        assert [History.read(run).at(each) for each in range(21)] == course


def test_a_change_whose_config_was_not_written_is_none(folder, tmp_path):
    before, now = (configured(folder, tmp_path, 9, optim__lr__peak=peak) for peak in (3e-3, 1e-3))
    (tmp_path / "config.yaml").write_text(dump(before))
    record_changes(History.read(tmp_path), 4, now)  # and here the machine stops
    assert History.read(tmp_path).at(2) == History.read(tmp_path).at(6) == before


def test_a_damaged_record_is_one_sentence_with_its_line(folder, tmp_path):
    (tmp_path / "config.yaml").write_text(dump(configured(folder, tmp_path, 9)))
    whole = json.dumps({"step": 1, "key": "optim.lr.peak", "before": 1, "after": 2})
    for damage in ("{", "[]", '{"step": 1}', '"x"', "3"):
        (tmp_path / "changes.jsonl").write_text(f"{whole}\n{damage}\n")
        with pytest.raises(CheckpointError, match="changes.jsonl, line 2 is not a recorded change .*remove that line"):
            History.read(tmp_path)


def test_the_command_line_takes_several_settings(monkeypatch):
    given = {}
    monkeypatch.setattr(session, "train", lambda *_, **options: given.update(options))
    result = CliRunner().invoke(app, ["train", "configs/demo.yaml", "--set", "optim.lr.peak=1e-3", "--set", "b=2"])
    assert result.exit_code == 0 and given["adjustments"] == ["optim.lr.peak=1e-3", "b=2"]


def test_a_rate_that_is_set_twice_before_a_step_is_said_beside_the_one_that_was_used():
    first, second = (configured(Path("/d"), "/run", 9, optim__lr__peak=peak) for peak in (1e-3, 2e-3))
    once = Change(3, "optim.lr.peak", 3e-3, 1e-3)
    said = check(first, second, 3, "optim.lr.peak=2e-3", changes=[once])
    assert said[1] == "the rate at step 3 was 0.003 and goes on with 0.002"


def test_what_is_set_must_be_the_rate_of_a_run_on_its_way(folder, tmp_path):
    original = configured(folder, tmp_path / "run", 4)
    for setting, why in (
        ("model.n_layers=4", "model.n_layers is identity, which no run changes on its way .model decides"),
        ("optim.optimizer.betas=[0.8, 0.9]", "optim.optimizer.betas is identity"),
        ("optim.matrices=null", "optim.matrices is identity"),
        ("training.budget_positions=6400", "is extendable, which needs no --set"),
        ("checkpoint.keep=9", "is operational, which needs no --set"),
        ("optim.lr.peek=1", "did you mean"),
    ):
        with pytest.raises(ConfigError, match=why):
            adjust(original, [setting])
    with pytest.raises(ConfigError, match="has no checkpoint; give optim.lr.peak=1e-3 without --set"):
        train(original, adjustments=["optim.lr.peak=1e-3"])
    with pytest.raises(ConfigError, match="--fresh begins one"):
        train(original, fresh=True, adjustments=["optim.lr.peak=1e-3"])
