"""Makes a sample of an image with a caption, which several kinds of raw data hold."""

from mmoe.data.load.media import image_size
from mmoe.preparation.sources import jsonl
from mmoe.schema.modality import Modality
from mmoe.schema.sample import Sample, Segment


def captioned(key: str, recording: str, image: bytes, suffix: str, file: str, caption: str, where: str) -> Sample:
    """Make a sample of an image and its caption, the two sides of a pair.

    `image` is the bytes of `file`, whose name ends in `suffix`; `where` names the place of the caption in messages.
    """
    height, width = image_size(image, file)
    member = f"image{suffix.lower()}"
    return Sample(
        key,
        recording,
        {member: image, "txt": jsonl.encode_text(caption, where)},
        [
            Segment(Modality.VISION, member, height=height, width=width, pair=0),
            Segment(Modality.TEXT, "txt", pair=0, text=caption),
        ],
    )
