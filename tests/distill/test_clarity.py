"""Clarity: worse pictures of one scene score lower, each by the measurement that it fails."""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from r1v_rl.distill.clarity import clarity


@pytest.fixture(scope="module")
def sharp():
    """A checkerboard of 8-pixel squares."""
    board = (np.indices((64, 64)) // 8).sum(axis=0) % 2 * 255
    return Image.fromarray(board.astype(np.uint8)).convert("RGB")


def measured(image, *, num_tiles=1, tile_side=64):
    return clarity(image, num_tiles=num_tiles, tile_side=tile_side)


def test_a_laplacian_worked_by_hand():
    """One white pixel of 255 in black, 5 x 5: inner values -1020, four 255, four 0; mean 0, variance 144500."""
    pixels = np.zeros((5, 5), np.uint8)
    pixels[2, 2] = 255
    found = measured(Image.fromarray(pixels).convert("RGB"), tile_side=5)
    assert found.sharpness == pytest.approx(144500 / 144600)
    assert found.contrast == pytest.approx(255 * (24 / 625) ** 0.5 / 64)  # std of one in 25
    assert found.resolution == found.detail == 1.0


def test_blur_lowers_sharpness(sharp):
    scores = [measured(sharp.filter(ImageFilter.GaussianBlur(radius))).sharpness for radius in (0, 2, 4, 8)]
    assert scores == sorted(scores, reverse=True) and scores[0] > 0.99 and scores[-1] < 0.1


def test_a_blank_picture_has_no_clarity(sharp):
    assert measured(Image.new("RGB", (64, 64), "grey")).score == 0.0
    assert measured(sharp).score > 0.99


def test_contrast_resolution_and_detail(sharp):
    pale = sharp.point(lambda value: 120 + value // 16)
    assert measured(pale).contrast < 0.2 < measured(sharp).contrast
    small = sharp.resize((16, 32), Image.Resampling.NEAREST)
    assert measured(small).resolution == 0.25
    large = sharp.resize((256, 256), Image.Resampling.NEAREST)
    assert measured(large, num_tiles=1).detail == 1 / 16
    assert measured(large, num_tiles=5).detail == 4 / 16  # four tiles and a thumbnail
    assert measured(large, num_tiles=17).detail == 1.0


def test_a_picture_of_two_pixels_is_measured():
    assert measured(Image.new("RGB", (2, 2))).score == 0.0
