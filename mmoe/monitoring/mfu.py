"""Computes how much of a device's peak a run's model needs: MFU (Chowdhery et al. 2022, appendix B)."""

import re

import torch

from mmoe.models.flops import ParameterCounts, training_flops
from mmoe.schema.counts import Counts
from mmoe.training.run import Run, model_inputs

# Dense operations per second of a device by a part of its name, in bfloat16 and in float32 without TF32, from the
# vendors' data sheets. The first part that fits counts.
_PEAKS: tuple[tuple[str, float, float], ...] = (
    ("GB200", 2500e12, 80e12),
    ("B200", 2250e12, 75e12),
    ("H200", 989e12, 67e12),
    ("GH200", 989e12, 67e12),
    ("H100 PCIe", 756e12, 51e12),
    ("H100 NVL", 835e12, 60e12),
    ("H100", 989e12, 67e12),
    ("H800", 989e12, 67e12),
    ("H20", 148e12, 44e12),
    ("A100", 312e12, 19.5e12),
    ("A800", 312e12, 19.5e12),
    ("L40S", 362e12, 91.6e12),
    ("L4", 121e12, 30.3e12),
    ("A10", 125e12, 31.2e12),
    ("RTX 4090", 165.2e12, 82.6e12),
    ("RTX 3090", 71e12, 35.6e12),
    ("MI300X", 1307e12, 163.4e12),
)


def device_peak(name: str, compute: str) -> float | None:
    """Return the peak of a device by its `name`, in operations per second; None where it is not known.

    `compute` is the precision of products, ``bfloat16`` or ``float32``.
    """
    for part, bfloat16, float32 in _PEAKS:
        if re.search(rf"\b{part}\b", name) and "Laptop" not in name:
            return {"bfloat16": bfloat16, "float32": float32}.get(compute)
    return None


class ModelFlops:
    """Counts the operations that the model asks for in each step, and relates them to the `peak` of one device.

    `peak` is in operations per second; None: not known.
    """

    def __init__(self, run: Run) -> None:
        config = run.config
        name = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else ""
        self.peak = config.monitoring.peak_flops or device_peak(name, config.precision.compute)
        self._model = config.model
        inputs = model_inputs(run.tokenizers)
        self._multiplied = ParameterCounts.from_config(config.model, inputs).multiplied

    def step_flops(self, counts: Counts) -> int:
        """Count the operations of a step over all devices, by the lengths of its documents."""
        return training_flops(self._model, self._multiplied, counts.positions, counts.cost)

    def scalars(self, flops: float, seconds: float, devices: int) -> dict[str, float]:
        """Return the MFU of `flops` operations in `seconds` on so many `devices`, and the peak that it refers to.

        Empty where the peak is not known.
        """
        if self.peak is None:
            return {}
        return {"mfu": flops / (seconds * devices * self.peak), "mfu_peak_flops": self.peak}
