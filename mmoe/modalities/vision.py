"""Makes a modality of images: patch vectors in place of placeholders, of stills and of the frames of videos."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from mmoe.schema.modality import ModalitySpec, Payload, Planned

if TYPE_CHECKING:
    from mmoe.modalities.document import DocumentBuilder
    from mmoe.schema.manifest import SegmentGroup, SourceManifest
    from mmoe.tokenizers.bundle import Tokenizers


class VisionSpec(ModalitySpec):
    """Puts a still between its structure tokens, and a frame of a slice behind its camera's."""

    name = "VISION"
    count_columns = ("patches",)
    refused_as = "unreadable image or video"

    def vector_size(self, tokenizers: Tokenizers, manifests: Mapping[str, SourceManifest]) -> int:
        """Count the numbers of a patch and its coordinates."""
        held = any(split.segments(self.name) for m in manifests.values() for split in m.splits.values())
        return tokenizers.vision.vector_dim if held else 0

    def planned(self, segments: np.ndarray, tokenizers: Tokenizers, source: str) -> Planned:
        """Plan the patches of all tubelets."""
        tubelets = (segments["stop"] - segments["start"]).astype(np.int64) // tokenizers.config.vision.tubelet
        tokens = tubelets * tokenizers.vision.num_tokens(segments["height"], segments["width"])
        sliced = segments["slice"] >= 0
        around = np.where(sliced, segments["camera"] >= 0, 2)  # cam_*, or image_start and image_end
        return Planned.without_targets(tokens, around, patches=tokens)

    def positions(self, group: SegmentGroup, tokenizers: Tokenizers, source: str) -> int:
        """Count the patches and what stands around each image."""
        patches = int(tokenizers.vision.num_tokens(np.array(group.height), np.array(group.width)))
        around = group.count * (int(group.camera) if group.sliced else 2)
        return group.span // tokenizers.config.vision.tubelet * patches + around

    def encode(self, payload: Payload, tokenizers: Tokenizers) -> tuple[np.ndarray, np.ndarray]:
        """Cut what is shown into as many patches as were planned: their vectors [n, size] and positions [n, 3]."""
        vision, segment = tokenizers.vision, payload.segment
        rows, columns = vision.grid(int(segment["height"]), int(segment["width"]))
        tubelets = int(segment["stop"] - segment["start"]) // vision.config.tubelet
        if payload.shown is None:
            vectors = vision.blank(rows, columns, tubelets)
        else:
            least = rows * vision.config.patch, columns * vision.config.patch
            vectors = vision.encode(payload.images(least), rows, columns)
        return vectors, vision.positions(rows, columns, tubelets)

    def layout(self, builder: DocumentBuilder, encoded: tuple[np.ndarray, np.ndarray], payload: Payload) -> None:
        """Append a frame of the open slice, or a still."""
        if payload.segment["slice"] >= 0:
            builder.frame(*encoded, payload.camera(), int(payload.segment["offset_ns"]), payload.pair)
        else:
            builder.image(*encoded, payload.pair)


SPEC = VisionSpec()
