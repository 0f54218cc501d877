"""Makes a modality of the state of a vehicle or a robot: vectors added to their token's embedding."""

from mmoe.modalities.vectors import VectorSpec
from mmoe.schema.modality import Modality
from mmoe.tokenizers.vocabulary import Structure


class StateSpec(VectorSpec):
    """Embeds the last state before the reference time."""

    name = "STATE"
    kind = Modality.STATE
    token = Structure.STATE
    adds = True
    refused_as = "unusable state table"


SPEC = StateSpec()
