"""What a run's records take on the disk: bytes a step of the 10B shape, by the cadence of its tables.

    python benchmarks/records.py
    python benchmarks/records.py configs/moe_10b.yaml --cadences 10 20 50

Records of the shape that the config says are written by the sinks that a run has. Their loads are made up as routers
make them: each layer, source and modality has its favorites, skewed, which wander slowly; every window draws anew
around them. Each stage is measured by itself, since a source that is not read costs nothing, and weighed by its length.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mmoe.config.load import load
from mmoe.models.moe.statistics import CAPACITY_FACTORS
from mmoe.monitoring.record import StepRecord
from mmoe.monitoring.sinks.arrays import ArraysConfig
from mmoe.monitoring.sinks.jsonl import JsonlConfig
from mmoe.recipe.config import RunConfig
from mmoe.recipe.monitoring import MonitoringConfig, SinkContext
from mmoe.result import print_result
from mmoe.schema.modality import Modality

LIMIT = 6 * 1024  # bytes a step
RECORDS = 192  # of tables that each figure is over: three whole parts
# What the positions of a source's kind are; the marks between segments are a modality, too.
MODALITIES = {
    "text": (Modality.TEXT,),
    "webdataset": (Modality.TEXT, Modality.VISION),
    "audio_text": (Modality.TEXT, Modality.AUDIO),
    "video": (Modality.TEXT, Modality.VISION, Modality.AUDIO),
    "lerobot": (Modality.TEXT, Modality.VISION, Modality.INERTIAL, Modality.STATE, Modality.ACTION),
    "nuscenes": (Modality.TEXT, Modality.VISION, Modality.INERTIAL, Modality.STATE, Modality.ACTION),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("config", nargs="?", default="configs/moe_10b.yaml")
    parser.add_argument("--cadences", nargs="+", type=int, default=[10, 20, 50])
    arguments = parser.parse_args()
    config = load(RunConfig, arguments.config)
    default = MonitoringConfig().tables_every_steps
    figures: dict[str, Any] = {"records": RECORDS, "default": default}
    for cadence in sorted({*arguments.cadences, default}):
        figures[f"every {cadence}"] = found = measure(config, cadence)
        stages = ", ".join(f"{name} {size:,.0f}" for name, size in found["by_stage"].items())
        print(
            f"tables every {cadence} steps: {found['bytes_a_step']:,.0f} bytes a step ({stages}), "
            f"{found['bytes_a_step'] * 500_000 / 1e9:.2f} GB in 500,000; {found['milliseconds_a_step']:.2f} ms a step",
            flush=True,
        )
    value = figures[f"every {default}"]["bytes_a_step"]
    targets = {"bytes a step": {"value": value, "target": f"<= {LIMIT}", "ok": value <= LIMIT}}
    print_result("records", figures, targets)


def measure(config: RunConfig, cadence: int) -> dict[str, Any]:
    """Bytes a step of all stages by their lengths, of each of them, and the time that the sinks take."""
    stages = config.data.stages or {}
    shares, begin, by_stage, seconds = {}, 0, {}, []
    for name, stage in stages.items():
        shares[name], begin = stage.until - begin, stage.until
    for name in shares:
        sources = [list(config.data.sources).index(source) for source in stages[name].sources]
        with tempfile.TemporaryDirectory() as folder:
            context = SinkContext(Path(folder), {})
            sinks = [JsonlConfig().build(context), ArraysConfig(flush_seconds=1e9).build(context)]
            for record in records(config, sources, cadence):
                started = time.perf_counter()
                for sink in sinks:
                    sink.write(record)
                seconds.append(time.perf_counter() - started)
            for sink in sinks:
                sink.close()
            size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        by_stage[name] = size / (RECORDS * cadence)
    steps = RECORDS * cadence * len(shares)
    whole = sum(by_stage[name] * share for name, share in shares.items()) / begin
    return {"bytes_a_step": whole, "by_stage": by_stage, "milliseconds_a_step": 1e3 * sum(seconds) / steps}


def records(config: RunConfig, sources: list[int], cadence: int) -> Iterator[StepRecord]:
    """Records whose tables are due every `cadence` steps, and those of scalars between them."""
    random, moe = np.random.default_rng(0), config.model.moe
    assert moe is not None, "a dense model has no tables"
    layers = sum(moe.in_layer(layer) for layer in range(config.model.n_layers))
    names = list(config.data.sources)
    kinds = [
        (kind, s) for s in sources for kind in (Modality.STRUCTURE, *MODALITIES[config.data.sources[names[s]].kind])
    ]
    share_NMSE = np.zeros((layers, len(Modality), len(names), moe.n_experts))
    for (kind, source), share in zip(kinds, random.dirichlet(np.ones(len(kinds)))):
        share_NMSE[:, kind, source] = share * random.dirichlet(np.full(moe.n_experts, 2.0), layers)
    choices = config.training.global_batch_positions * 0.97 * moe.top_k * cadence
    every = MonitoringConfig().log_every_steps
    means = {name: random.normal(size=(layers, moe.n_experts)) for name in MEANS}
    for number in range(RECORDS):
        end = (number + 1) * cadence
        for step in range(number * cadence // every * every + every, end, every):
            yield StepRecord(step, 0, scalars(config, random), {}, {"stage": "mid"})
        share_NMSE *= np.exp(random.normal(0, 0.01, share_NMSE.shape))  # favorites wander
        load = random.poisson(choices * share_NMSE * np.exp(random.normal(0, 0.03, share_NMSE.shape)))
        would_drop = random.poisson(choices * 0.05 * random.random((layers, len(CAPACITY_FACTORS))))
        held = {
            "expert_load": load,
            "expert_drops": random.binomial(load, 0.05 * random.random(share_NMSE.shape)),
            "would_drop": np.sort(would_drop)[:, ::-1],
            "capacity_factors": np.array(CAPACITY_FACTORS),
            **{n: (m * np.exp(random.normal(0, 0.05, m.shape))).astype(np.float32) for n, m in means.items()},
        }
        yield StepRecord(end, 0, scalars(config, random), held, {"stage": "mid"})


MEANS = ("expert_importance", "router_logit_mean", "router_logit_variance", "router_grad_norm")


def scalars(config: RunConfig, random: np.random.Generator) -> dict[str, float]:
    """About as many numbers, of about as many digits, as a run logs."""
    sources = config.data.sources
    names = [f"scalar_{number}" for number in range(36)] + [f"ce_from_{name}" for name in sources]
    counts = {
        f"{what}_positions/{name}": int(random.integers(1 << 40)) for name in sources for what in ("planned", "served")
    }
    return {name: float(random.normal()) for name in names} | counts


if __name__ == "__main__":
    main()
