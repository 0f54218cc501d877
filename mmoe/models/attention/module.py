"""Defines the attention of a block: projections and rotary positions around what the backend attends.

Shape suffixes: B sequences, L positions, D model width.
"""

from torch import Tensor, nn

from mmoe.models.attention.backend import BatchAttention
from mmoe.models.layers import RMSNorm
from mmoe.models.rotary import RotaryTables


class Attention(nn.Module):
    """Applies grouped-query attention (Ainslie et al. 2023), with RMS-normalized queries and keys where `qk_norm`.

    Query head h reads key/value head ``h // (heads / kv_heads)``.
    """

    def __init__(self, size: int, heads: int, kv_heads: int, head_dim: int, qk_norm: bool, eps: float) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.query = nn.Linear(size, heads * head_dim, bias=False)
        self.key = nn.Linear(size, kv_heads * head_dim, bias=False)
        self.value = nn.Linear(size, kv_heads * head_dim, bias=False)
        self.output = nn.Linear(heads * head_dim, size, bias=False)
        self.query_norm = RMSNorm(head_dim, eps) if qk_norm else nn.Identity()
        self.key_norm = RMSNorm(head_dim, eps) if qk_norm else nn.Identity()

    def forward(self, x_BLD: Tensor, rotary: RotaryTables, batch: BatchAttention) -> Tensor:
        """Attend from every position of x under the rule of `batch`, [B, L, D] -> [B, L, D]; zeros at padding."""
        q, k, v = (project(x_BLD).unflatten(-1, (-1, self.head_dim)) for project in (self.query, self.key, self.value))
        q, k = rotary.rotate(self.query_norm(q)), rotary.rotate(self.key_norm(k))
        return self.output(batch.attend(q, k, v).flatten(2))
