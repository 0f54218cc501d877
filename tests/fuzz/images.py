"""Images of every format that is opened, with and without EXIF, and of some that are not."""

import io
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from mmoe.data.load.media import image_size, load_image
from tests.fuzz.mutate import damage


def build(_: Path) -> Callable[[random.Random], bytes]:
    image = Image.fromarray((np.indices((20, 40)).sum(0) * 4).astype(np.uint8)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    seeds = []
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "TGA", "DDS", "ICO", "EPS"):
        for mode in ("RGB", "L", "RGBA", "P", "I;16", "CMYK", "1"):
            buffer = io.BytesIO()
            try:
                options = {"exif": exif} if kind in ("JPEG", "PNG", "WEBP", "TIFF") else {}
                image.convert("L" if mode == "I;16" else mode).convert(mode).save(buffer, kind, **options)
            except (OSError, ValueError, KeyError):
                continue  # the format has no such mode
            seeds.append(buffer.getvalue())
    return lambda rng: damage(rng.choice(seeds), seeds, rng)


def run(data: bytes, _: Path) -> None:
    size = image_size(data, "p.png")
    assert load_image(data, "p.png").shape == (*size, 3)
    load_image(data, "p.png", least=(2, 2))
