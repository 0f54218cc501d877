"""Lists the kinds of raw recordings that can be prepared."""

from mmoe.config.registry import Kinds
from mmoe.preparation.sources.base import Source

_BUILT_IN = (
    "text",
    "chat",
    "image_caption",
    "audio_text",
    "webdataset",
    "video",
    "donkeycar",
    "comma2k19",
    "nuscenes",
    "bridge",
    "lerobot",
    "rlds",
    "simulated_drive",
)

SOURCES: Kinds[Source] = Kinds(
    "source", "mmoe.sources", Source, {kind: f"{__name__}.{kind}:SOURCE" for kind in _BUILT_IN}
)
