"""Inertial readings: vectors in place of their placeholder."""

from mmoe.modalities.vectors import VectorSpec
from mmoe.schema.modality import Modality
from mmoe.tokenizers.vocabulary import Placeholder


class InertialSpec(VectorSpec):
    """Embeds the last reading before the reference time."""

    name = "INERTIAL"
    kind = Modality.INERTIAL
    token = Placeholder.INERTIAL
    refused_as = "unusable inertial table"


SPEC = InertialSpec()
