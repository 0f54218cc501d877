"""MFU refers to the peak of one device, known by its name or given."""

from types import SimpleNamespace

import pytest
import torch

from mmoe.models.flops import model_flops
from mmoe.monitoring.mfu import ModelFlops, device_peak
from mmoe.schema.counts import COST, POSITIONS, Counts, zeros
from mmoe.training.run import Run, model_inputs
from tests.data.synthetic import write_sources
from tests.training.test_trainer import config


@pytest.mark.parametrize(
    ("name", "compute", "peak"),
    [
        ("NVIDIA H200", "bfloat16", 989e12),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989e12),
        ("NVIDIA H100 PCIe", "bfloat16", 756e12),
        ("NVIDIA A100-SXM4-80GB", "float32", 19.5e12),
        ("NVIDIA L40S", "bfloat16", 362e12),
        ("NVIDIA GB200", "bfloat16", 2500e12),
        ("NVIDIA H200", "float64", None),
        ("NVIDIA GeForce GTX 1080", "bfloat16", None),
        ("NVIDIA L40", "bfloat16", None),
        ("NVIDIA RTX A1000", "bfloat16", None),
        ("NVIDIA A10G", "bfloat16", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16", None),
        ("", "bfloat16", None),
    ],
)
def test_peaks_are_those_of_the_data_sheets_and_none_is_guessed(name, compute, peak):
    assert device_peak(name, compute) == peak


def test_the_flops_of_a_step_are_those_of_its_documents_and_mfu_is_their_share_of_all_peaks(tmp_path):
    write_sources(tmp_path)
    run = Run.build(config(tmp_path, tmp_path / "run", monitoring__peak_flops=1e9))
    flops, documents = ModelFlops(run), [17, 40, 3]
    columns = zeros()
    columns[POSITIONS], columns[COST] = sum(documents), sum(n**2 for n in documents)
    wanted = model_flops(run.config.model, model_inputs(run.tokenizers), documents)
    assert flops.step_flops(Counts(columns)) == wanted > 0
    assert flops.scalars(wanted, 2.0, 4) == {"mfu": pytest.approx(wanted / 2 / 4e9), "mfu_peak_flops": 1e9}
    monitoring = run.config.monitoring.model_copy(update={"peak_flops": None})
    config_without = run.config.model_copy(update={"monitoring": monitoring})
    without = ModelFlops(SimpleNamespace(config=config_without, device=torch.device("cpu"), tokenizers=run.tokenizers))
    assert without.scalars(1.0, 1.0, 1) == {}
