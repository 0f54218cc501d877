"""What `mmoe stages` and `mmoe inspect` say, against the arithmetic and the plan they speak of."""

import io

import pytest

from mmoe.commands.console import Console
from mmoe.commands.inspect import show_inspection
from mmoe.commands.stages import show_stages, si
from mmoe.config.load import load
from mmoe.errors import ConfigError, DataError
from mmoe.planning.data import inspect, mixture_of
from mmoe.recipe.config import RunConfig
from tests.conftest import REPOSITORY
from tests.data.streams import LENGTH, write_folders
from tests.data.synthetic import MAKERS


def printed(show, *arguments) -> str:
    console = Console(file=io.StringIO(), width=160)
    show(*arguments, console)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def recipe():
    return REPOSITORY / "configs" / "moe_10b.yaml"


def test_the_main_run_is_planned_without_any_source_on_disk(recipe):
    config = load(RunConfig, recipe)
    assert config.batch.iterations == 2_384_185
    mixture = mixture_of(config.data, config.tokenizers, config.training.budget_positions)
    assert [(s.name, s.start, s.stop) for s in mixture.stages] == [
        ("cold", 0, 10**12),
        ("mid", 10**12, 9 * 10**12),
        ("hot", 9 * 10**12, 10**13),
    ]
    sizes = {s.name: s.positions for s in mixture.sources}
    cold = {s.name: e.share for s, e in zip(mixture.sources, mixture.expected(mixture.stages[0]), strict=True)}
    weights = {name: sizes[name] ** (1 / 1.2) for name in config.data.stages["cold"].sources}
    for name, weight in weights.items():
        assert cold[name] == pytest.approx(weight / sum(weights.values()))
    assert sum(cold.values()) == pytest.approx(1) and cold["video"] == 0
    said = printed(show_stages, config)
    for words in ("cold", "3 to 5", "9T .. 10T", "vla_trajectories", "2,384,185 steps", "hot from step 2,145,767"):
        assert words in said


def test_repetition_is_announced_before_the_run(recipe):
    config = load(RunConfig, recipe, ["data.sources.driving_video.positions=50_000_000_000"])
    said = " ".join(printed(show_stages, config).split())
    assert "warning source driving_video would be seen" in said and "in stage hot" in said


def test_a_stage_behind_the_end_of_the_run_is_announced(recipe):
    said = printed(show_stages, load(RunConfig, recipe, ["training.budget_positions=5_000_000_000_000"]))
    assert "stage hot begins at 9T, after the run's end 5T" in said


def test_a_source_of_unknown_size_names_the_two_remedies(recipe):
    config = load(RunConfig, recipe, ["data.sources.wiki.positions=null", "data.sources.wiki.shards=nowhere"])
    with pytest.raises(DataError, match="data.sources.wiki.positions is not given.*prepare the source, or state"):
        mixture_of(config.data, config.tokenizers, config.training.budget_positions)


def test_a_stage_that_names_no_source_is_refused_at_its_key(recipe):
    with pytest.raises(ConfigError, match="stage cold names source 'wikipedia', which is not in data.sources"):
        load(RunConfig, recipe, ["data.stages.cold.sources=[wikipedia]"])


def test_inspect_shows_shares_fill_and_everything_lost(recipe, tmp_path):
    write_folders(tmp_path)
    sources = {name: {"kind": "text", "shards": str(tmp_path / name)} for name in MAKERS}
    (tmp_path / "run.yaml").write_text(
        f"""
data:
  sources: {sources}
  stages: {{all: {{weights: {{text: 0.25, image: 0.25, audio: 0.25, clip: 0.25}}}}}}
  sequence_length: {LENGTH}
  window_documents: 100
tokenizers: {{vision: {{patch: 8, max_patches: 12}}, audio: {{path: {tmp_path}/codec.safetensors, codebooks: 2, mel: {{
  sample_rate: 4000, window: 128, hop: 40, mels: 8, stack: 4, codebook_size: 8}}}}, action: {{chunk: 4}}}}
model: {{d_model: 32, n_layers: 1, n_heads: 2, n_kv_heads: 2, intermediate_size: 32}}
losses: {{contrastive: {{group_sequences: 1}}}}
optim: {{lr: {{peak: 1.0e-3}}}}
training: {{run: r, micro_batch_sequences: 2, global_batch_positions: {8 * LENGTH}, budget_positions: {800 * LENGTH}}}
"""
    )
    said = printed(show_inspection, inspect(load(RunConfig, tmp_path / "run.yaml"), 30, 4), 4)
    assert said.count("25.00%") >= 4 and "of 240 sequences of 160 positions" in said
    assert "clip / cut at a slice" in said and "text / cut at a text token" in said
    assert "attention work of the busiest of 4 replicas: 1." in said
    assert "vision work of the busiest of 4 replicas: 1." in said
    with pytest.raises(ConfigError, match="1280 is not a multiple of 960, .* x 2 training.micro_batch_sequences x 3"):
        inspect(load(RunConfig, tmp_path / "run.yaml"), 1, 3)


@pytest.mark.parametrize("number, text", [(2.5e12, "2.5T"), (9e9, "9B"), (12_345_678, "12.35M"), (999, "999")])
def test_counts_are_short(number, text):
    assert si(number) == text
