"""Provides MegaBlocks' grouped GEMM, on a GPU.

Shape suffixes as in `mmoe.models.moe.engines.engine`.
"""

import torch
from torch import Tensor

from mmoe.models.moe.engines.engine import ProductEngine, sizes_of


class MegaBlocksEngine(ProductEngine):
    """Multiplies all groups in one call of MegaBlocks; their sizes are on the host."""

    requires = ("megablocks",)
    multiple = 8
    dtypes = frozenset({torch.bfloat16})

    def multiply(self, x_RD: Tensor, weight_EDF: Tensor, ends_E: Tensor) -> Tensor:
        """Multiply each group of rows with the weight of its expert by MegaBlocks' `gmm`, [R, D] -> [R, F]."""
        from megablocks import grouped_gemm_util

        if len(x_RD) == 0:  # which the kernel refuses; this keeps the zero gradients
            return x_RD @ weight_EDF[0]
        sizes = torch.tensor(sizes_of(ends_E), dtype=torch.int64)
        return grouped_gemm_util.ops.gmm(x_RD.contiguous(), weight_EDF.contiguous(), sizes)
