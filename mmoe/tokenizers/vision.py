"""Images and video to patch vectors: a grid within a patch budget, a resize to it, patches of tubelets."""

from functools import lru_cache
from typing import Any, TypeVar, overload

import numpy as np
import torch
from einops import rearrange
from pydantic import Field
from torch.nn.functional import interpolate

from mmoe.config.base import Config

Count = TypeVar("Count", int, np.ndarray)
COORDINATES = 14  # features of a patch's place in its image
_MOST_KNOWN = 1 << 16  # image sizes whose grids are kept
DISTORTION_COST = 4.0  # of a squared log distortion, in squared log losses of area (`VisionTokenizer.grid`)


class VisionConfig(Config):
    """Says how images are cut into patches."""

    patch: int = Field(16, gt=0)  # pixels a side
    max_patches: int = Field(64, gt=0)  # most patches of one image
    tubelet: int = Field(1, gt=0)  # successive frames that share a patch vector


class VisionTokenizer:
    """Makes patch vectors f32 [vector_dim] in [-1, 1]: tubelet x patch x patch pixels of RGB, coordinates."""

    def __init__(self, config: VisionConfig) -> None:
        self.config = config
        self.patch_dim = config.tubelet * config.patch**2 * 3
        self.vector_dim = self.patch_dim + COORDINATES
        budget = config.max_patches
        self._grids = np.array([(r, c) for r in range(1, budget + 1) for c in range(1, budget // r + 1)])
        self._known: dict[int, np.ndarray] = {}  # size -> its grid, of the sizes met so far

    @overload
    def grid(self, height: int, width: int) -> tuple[int, int]: ...
    @overload
    def grid(self, height: np.ndarray, width: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...
    def grid(self, height: Any, width: Any) -> tuple[Any, Any]:
        """Rows and columns of patches for images of height x width pixels; elementwise over numpy arrays.

        Among the grids of at most `max_patches` that exceed neither ceil(height / patch) rows nor
        ceil(width / patch) columns, the one that minimizes 4 d**2 + a**2: d is the log of its aspect ratio
        over the image's, a the log of its patches over the most it could have. So an image of whole
        patches within the budget keeps its size, a larger one uses the budget, and shape goes before size.
        """
        if isinstance(height, int) and (known := self._known.get(height << 32 | width)) is not None:
            return int(known[0]), int(known[1])
        sizes = np.stack(np.broadcast_arrays(height, width), axis=-1).astype(np.int64)
        if (sizes < 1).any():
            raise ValueError(f"an image of {sizes.min()} pixels a side has no patches")
        # One number a size: sorting pairs is ten times slower, and a plan asks for millions.
        numbers, inverse = np.unique(sizes[..., 0] << 32 | sizes[..., 1], return_inverse=True)
        new = numbers[[number not in self._known for number in numbers.tolist()]]
        # 256 geometries at a time: the table of all candidate grids stays small for any number of images.
        for part in np.split(new, range(256, len(new), 256)):
            self._known.update(zip(part.tolist(), self._best(np.stack([part >> 32, part & 0xFFFFFFFF], axis=-1))))
        grids = np.array([self._known[number] for number in numbers.tolist()], np.int64).reshape(-1, 2)
        best = grids[inverse.reshape(-1)].reshape(sizes.shape)
        if len(self._known) > _MOST_KNOWN:
            self._known.clear()
        rows, columns = best[..., 0], best[..., 1]
        return (int(rows), int(columns)) if sizes.ndim == 1 else (rows, columns)

    def num_tokens(self, height: Count, width: Count) -> Count:
        """Patch vectors of one tubelet (with `tubelet` 1: of an image); elementwise over numpy arrays."""
        rows, columns = self.grid(height, width)
        return rows * columns

    def encode(self, frames: np.ndarray, rows: int, columns: int) -> np.ndarray:
        """Frames uint8 [T, H, W, 3], resized to the grid -> f32 [T / tubelet * rows * columns, vector_dim].

        Time-major, then row, then column; each vector is its pixels, then its `coordinates`. The resize is bilinear
        with antialiasing. Raises ValueError when `tubelet` does not divide T.
        """
        config = self.config
        if len(frames) % config.tubelet:
            raise ValueError(f"{len(frames)} frames are not whole tubelets of {config.tubelet}; pass a multiple")
        size = (rows * config.patch, columns * config.patch)
        pixels = torch.from_numpy(np.ascontiguousarray(frames))
        if pixels.shape[1:3] != size:
            # In bytes: the vectorised kernel is several times faster than in floats, and rounds by half a grey level.
            channels_first = pixels.permute(0, 3, 1, 2)
            pixels = interpolate(channels_first, size, mode="bilinear", antialias=True).permute(0, 2, 3, 1)
        # "(t s) (r p) (k q) c -> (t r k) (s p q c)" as two views, so that each pixel is read and written once.
        tubelets, s, p = len(frames) // config.tubelet, config.tubelet, config.patch
        patches = pixels.reshape(tubelets, s, rows, p, columns, p, 3).permute(0, 2, 4, 1, 3, 5, 6)
        vectors = self.blank(rows, columns, tubelets)
        values = torch.from_numpy(vectors)[:, : self.patch_dim]
        torch.mul(patches, 1 / 127.5, out=values.unflatten(1, (s, p, p, 3)).unflatten(0, (tubelets, rows, columns)))
        values.sub_(1.0)
        return vectors

    def blank(self, rows: int, columns: int, tubelets: int = 1) -> np.ndarray:
        """Make the vectors that `encode` gives, with zeros (grey) for the pixels."""
        coordinates = self.coordinates(rows, columns, tubelets)
        vectors = np.zeros((len(coordinates), self.vector_dim), np.float32)
        vectors[:, self.patch_dim :] = coordinates
        return vectors

    def positions(self, rows: int, columns: int, tubelets: int = 1) -> np.ndarray:
        """Return (time, row, column) i64 [tubelets * rows * columns, 3] of each vector of `encode`, from 0."""
        return _positions(rows, columns, tubelets)

    def coordinates(self, rows: int, columns: int, tubelets: int = 1) -> np.ndarray:
        """Say where in its image each vector of `encode` lies: f32 [n, COORDINATES].

        Row and column as y, x in (-1, 1), with the sines and cosines of their first harmonics. Rotary positions only
        say how far apart two positions are; with these a patch knows by itself that it shows the road ahead.
        """
        return _coordinates(rows, columns, tubelets)

    def decode(self, patches: np.ndarray, rows: int, columns: int) -> np.ndarray:
        """Frames uint8 [T, rows * patch, columns * patch, 3]; exact where `encode` resized nothing."""
        config = self.config
        frames = rearrange(
            patches[:, : self.patch_dim],
            "(t r k) (s p q c) -> (t s) (r p) (k q) c",
            r=rows,
            k=columns,
            s=config.tubelet,
            p=config.patch,
            q=config.patch,
        )
        return np.clip(np.rint((frames + 1.0) * 127.5), 0, 255).astype(np.uint8)

    def _best(self, sizes: np.ndarray) -> np.ndarray:
        """Grids [n, 2] for images of `sizes` [n, 2]."""
        native = -(-sizes // self.config.patch)
        most = np.minimum(native.prod(1), self.config.max_patches)
        aspect, area = np.log(self._grids[:, 0] / self._grids[:, 1]), np.log(self._grids.prod(1))
        distortion = aspect - np.log(sizes[:, 0] / sizes[:, 1])[:, None]
        cost = DISTORTION_COST * distortion**2 + (area - np.log(most)[:, None]) ** 2
        cost[(self._grids > native[:, None]).any(2)] = np.inf
        return self._grids[cost.argmin(1)]


# Every image of a camera has the same; the arrays are shared, so nobody may write to them.
@lru_cache(maxsize=256)
def _positions(rows: int, columns: int, tubelets: int) -> np.ndarray:
    positions = np.indices((tubelets, rows, columns)).reshape(3, -1).T
    positions.flags.writeable = False
    return positions


@lru_cache(maxsize=256)
def _coordinates(rows: int, columns: int, tubelets: int) -> np.ndarray:
    _, row, column = _positions(rows, columns, tubelets).T
    place = np.stack([(2 * row + 1) / rows - 1, (2 * column + 1) / columns - 1], axis=1)
    phases = np.concatenate([np.pi * harmonic * place for harmonic in (0.5, 1.0, 2.0)], axis=1)
    coordinates = np.concatenate([place, np.sin(phases), np.cos(phases)], axis=1).astype(np.float32)
    coordinates.flags.writeable = False
    return coordinates
