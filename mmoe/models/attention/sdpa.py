"""Wraps torch's scaled dot-product attention, which several backends call.

Shape suffixes as in `mmoe.models.attention.backend`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmoe.compat import CPU_ATTENTION, EFFICIENT_ATTENTION, FLASH_ATTENTION

SDPA_OPS = frozenset({FLASH_ATTENTION.default, CPU_ATTENTION.default, EFFICIENT_ATTENTION.default})


def scaled_dot_product(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Compute scaled dot-product attention, [b, H, n, K] in the dtype of v; causal without a mask.

    `q`: [b, H, n, K]. `k`, `v`: [b, G, n, K].

    On a CPU float32 is faster than bfloat16 for documents below a thousand positions, so it computes widened.
    """
    with torch.autocast(q.device.type, enabled=False):
        dtype = torch.promote_types(q.dtype, torch.float32) if q.device.type == "cpu" else v.dtype
        q, k, values = (x.to(dtype) for x in (q, k, v))
        causal, grouped = mask is None, q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, values, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
    return out.to(v.dtype)
