"""Patches: grids within the budget, lossless cutting, and a resize that agrees with Pillow's."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmoe.tokenizers.vision import COORDINATES, VisionConfig, VisionTokenizer

sides = st.integers(1, 3000)
tokenizers = st.builds(
    lambda patch, budget, tubelet: VisionTokenizer(VisionConfig(patch=patch, max_patches=budget, tubelet=tubelet)),
    st.integers(1, 20),
    st.integers(1, 100),
    st.integers(1, 3),
)


@given(tokenizers, sides, sides)
@settings(max_examples=200)
def test_grids_keep_to_the_budget_and_never_upscale(tokenizer, height, width):
    rows, columns = tokenizer.grid(height, width)
    patch = tokenizer.config.patch
    assert 1 <= rows <= -(-height // patch) and 1 <= columns <= -(-width // patch)
    assert rows * columns <= tokenizer.config.max_patches
    assert tokenizer.num_tokens(height, width) == rows * columns


@given(tokenizers, sides, sides)
def test_turning_the_image_turns_the_grid(tokenizer, height, width):
    rows, columns = tokenizer.grid(height, width)
    turned = tokenizer.grid(width, height)
    assert turned == (columns, rows) or height == width or rows * columns == turned[0] * turned[1]


@given(tokenizers, st.integers(1, 10), st.integers(1, 10))
def test_whole_patches_within_the_budget_are_kept(tokenizer, rows, columns):
    patch = tokenizer.config.patch
    if rows * columns <= tokenizer.config.max_patches:
        assert tokenizer.grid(rows * patch, columns * patch) == (rows, columns)


@given(tokenizers, st.lists(st.tuples(sides, sides), min_size=1, max_size=20))
def test_arrays_give_what_single_images_give(tokenizer, sizes):
    height, width = np.array(sizes).T
    rows, columns = tokenizer.grid(height, width)
    assert list(zip(rows.tolist(), columns.tolist())) == [tokenizer.grid(*size) for size in sizes]
    assert tokenizer.num_tokens(height, width).tolist() == [tokenizer.num_tokens(*size) for size in sizes]


def test_large_images_keep_their_shape_and_use_the_budget():
    tokenizer = VisionTokenizer(VisionConfig(patch=16, max_patches=64))
    random = np.random.default_rng(0)
    width = random.integers(800, 4000, 2000)
    height = np.clip((width * np.exp(random.uniform(-1.2, 1.2, 2000))).astype(int), 800, None)
    rows, columns = tokenizer.grid(height, width)
    distortion = np.abs(np.log(rows / columns * width / height))
    assert distortion.max() < np.log(1.18) and np.median(distortion) < np.log(1.05)
    assert (rows * columns).min() >= 44 and np.median(rows * columns) >= 60
    assert tokenizer.grid(1000, 1000) == (8, 8) and tokenizer.grid(120, 160) == (7, 9)
    assert tokenizer.grid(10, 100_000) == (1, 64)
    assert tuple(part.shape for part in tokenizer.grid(np.zeros(0), np.zeros(0))) == ((0,), (0,))
    with pytest.raises(ValueError, match="no patches"):
        tokenizer.grid(0, 10)


@given(tokenizers, st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**32 - 1))
@settings(max_examples=50)
def test_cutting_is_lossless_without_resize(tokenizer, rows, columns, tubelets, seed):
    patch, tubelet = tokenizer.config.patch, tokenizer.config.tubelet
    shape = (tubelets * tubelet, rows * patch, columns * patch, 3)
    frames = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    patches = tokenizer.encode(frames, rows, columns)
    assert patches.dtype == np.float32 and patches.shape == (tubelets * rows * columns, tokenizer.vector_dim)
    assert patches.min() >= -1 and patches.max() <= 1
    assert (patches[:, tokenizer.patch_dim :] == tokenizer.coordinates(rows, columns, tubelets)).all()
    assert (tokenizer.decode(patches, rows, columns) == frames).all()


@given(tokenizers, st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
@settings(max_examples=50)
def test_positions_say_where_a_patch_was(tokenizer, rows, columns, tubelets):
    patch, tubelet = tokenizer.config.patch, tokenizer.config.tubelet
    # Color every pixel by the tubelet, row and column of patches it belongs to.
    places = np.stack(np.indices((tubelets, rows, columns)), axis=-1)
    frames = places.repeat(tubelet, 0).repeat(patch, 1).repeat(patch, 2).astype(np.uint8)
    pixels = tokenizer.encode(frames, rows, columns)[:, : tokenizer.patch_dim]
    colors = np.rint((pixels + 1) * 127.5).reshape(-1, tubelet * patch**2, 3)
    positions = tokenizer.positions(rows, columns, tubelets)
    assert (colors == positions[:, None]).all()


@pytest.mark.parametrize("size", [(97, 301), (480, 640), (40, 30)])
def test_the_resize_agrees_with_pillow(size):
    tokenizer = VisionTokenizer(VisionConfig(patch=8))
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    ours = tokenizer.decode(tokenizer.encode(image[None], 4, 6), 4, 6)[0]
    theirs = np.asarray(Image.fromarray(image).resize((48, 32), Image.Resampling.BILINEAR))
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1


def test_frames_must_fill_tubelets():
    tokenizer = VisionTokenizer(VisionConfig(patch=4, tubelet=2))
    with pytest.raises(ValueError, match="3 frames are not whole tubelets of 2"):
        tokenizer.encode(np.zeros((3, 8, 8, 3), np.uint8), 2, 2)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3))
def test_coordinates_tell_every_place_apart_and_repeat_over_time(rows, columns, tubelets):
    places = VisionTokenizer(VisionConfig()).coordinates(rows, columns, tubelets)
    assert places.shape == (tubelets * rows * columns, COORDINATES) and np.abs(places).max() <= 1
    assert len(np.unique(places, axis=0)) == rows * columns
    assert np.array_equal(places[: rows * columns], places[-rows * columns :])
    assert places[0, 0] == pytest.approx(-places[-1, 0]) and places[0, 1] == pytest.approx(-places[-1, 1])
