"""Makes one vector a segment of INERTIAL and STATE: the last row of its table, normalized by source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from mmoe.schema.modality import Modality, ModalitySpec, Payload, Planned

if TYPE_CHECKING:
    from mmoe.modalities.document import DocumentBuilder
    from mmoe.schema.manifest import SegmentGroup, SourceManifest
    from mmoe.tokenizers.bundle import Tokenizers


class VectorSpec(ModalitySpec):
    """Gives a segment one position, without any structure token around it."""

    kind: Modality
    token: int  # that it stands on

    def vector_size(self, tokenizers: Tokenizers, manifests: Mapping[str, SourceManifest]) -> int:
        """Count the dimensions of all sources together."""
        return tokenizers.dims[self.kind].size

    def planned(self, segments: np.ndarray, tokenizers: Tokenizers, source: str) -> Planned:
        """Plan one position each."""
        return Planned.without_targets(np.ones(len(segments), np.int64))

    def positions(self, group: SegmentGroup, tokenizers: Tokenizers, source: str) -> int:
        """Count the segments."""
        return group.count

    def encode(self, payload: Payload, tokenizers: Tokenizers) -> np.ndarray:
        """Normalize the reading, f32 [dimensions of all sources]; zeros where there is none."""
        dims = tokenizers.dims[self.kind]
        value = np.zeros(dims.size, np.float32)
        if payload.shown is not None:
            reading = payload.table()[payload.shown["stop"] - 1]
            value[dims.columns[payload.source]] = tokenizers.normalizers[payload.source, self.kind](reading)
        return value

    def layout(self, builder: DocumentBuilder, encoded: np.ndarray, payload: Payload) -> None:
        """Append the vector."""
        builder.vectors(self.kind, self.token, encoded[None], offset_ns=int(payload.segment["offset_ns"]))
