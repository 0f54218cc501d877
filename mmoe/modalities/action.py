"""Action chunks: continuous targets read at one token, or ids of bins with a token each; ids of named values."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mmoe.schema.modality import Modality, ModalitySpec, Payload, Planned

if TYPE_CHECKING:
    from mmoe.modalities.document import DocumentBuilder
    from mmoe.schema.manifest import SegmentGroup
    from mmoe.tokenizers.bundle import Tokenizers


class ActionSpec(ModalitySpec):
    """Makes targets of the steps of a chunk that lie inside the recording; none enters the input."""

    name = "ACTION"
    count_columns = ("action_elements",)
    refused_as = "unusable action table"

    def planned(self, segments: np.ndarray, tokenizers: Tokenizers, source: str) -> Planned:
        """Plan the tokens of a chunk, and the elements of its steps inside the recording."""
        tokenizer = tokenizers.actions[source]
        steps = np.clip(segments["stop"] - segments["start"], 0, tokenizers.config.action.chunk)
        elements, named = (steps.astype(np.int64) * n for n in (tokenizer.dims, len(tokenizer.categories)))
        tokens = np.full(len(segments), tokenizer.tokens, np.int64)
        plan = Planned.without_targets(tokens, 1, action_elements=elements)  # action_end
        if not tokenizers.discrete_actions:
            return Planned(plan.tokens, plan.around, named, plan.closing, plan.columns)
        columns = {"action_elements": np.zeros_like(elements)}
        return Planned(plan.tokens, plan.around, elements + named, plan.closing, columns)

    def positions(self, group: SegmentGroup, tokenizers: Tokenizers, source: str) -> int:
        """Count the tokens of the chunks."""
        return group.count * (tokenizers.actions[source].tokens + 1)

    def encode(self, payload: Payload, tokenizers: Tokenizers) -> tuple[np.ndarray, ...]:
        """Turn the chunk into ids, IGNORE outside the recording; behind target and mask [steps, dimensions] if any."""
        from mmoe.schema.batch import IGNORE

        tokenizer, dims = tokenizers.actions[payload.source], tokenizers.dims[Modality.ACTION]
        segment, columns = payload.segment, dims.columns[payload.source]
        place = payload.table(), int(segment["start"]), int(segment["stop"])
        rows, mask = tokenizer.chunk_of(*place)
        numbers = tokenizer.categories_of(*place)
        named = np.full(numbers.shape, IGNORE, np.int64)
        for column, (name, values) in enumerate(tokenizer.categories.items()):
            inside = numbers[:, column] >= 0
            named[inside, column] = tokenizers.category_ids(name, values)[numbers[inside, column]]
        if tokenizers.discrete_actions:
            ids = tokenizers.vocabulary.ranges["action"].start + tokenizer.encode(rows)
            return (np.r_[np.where(mask, ids, IGNORE).reshape(-1), named.reshape(-1)],)
        target = np.zeros((len(rows), dims.size), np.float32)
        present = np.zeros((len(rows), dims.size), bool)
        target[:, columns], present[:, columns] = tokenizer.normalize(rows), mask
        return np.where(present, target, 0.0), present, named.reshape(-1)

    def layout(self, builder: DocumentBuilder, encoded: tuple[np.ndarray, ...], payload: Payload) -> None:
        """Append the chunk."""
        offset_ns = int(payload.segment["offset_ns"])
        if len(encoded) == 3:
            builder.action(*encoded, offset_ns)
        else:
            builder.action_ids(encoded[0], offset_ns)


SPEC = ActionSpec()
