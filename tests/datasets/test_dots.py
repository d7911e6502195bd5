"""Dots are read from any image, and the counts of crops are right to the pixel."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from energyreg.datasets import count_dots, crops_with_counts, read_dots

Image = pytest.importorskip("PIL.Image")


def with_dots(dots: np.ndarray, height: int = 40, width: int = 50) -> np.ndarray:
    pixels = np.zeros((height, width), dtype=np.uint8)
    pixels[dots[:, 0], dots[:, 1]] = 255
    return pixels


DOTS = np.array([[0, 0], [3, 4], [3, 5], [4, 4], [39, 49]])


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "red", "RGBA", "LA", "P"])
def test_every_bright_pixel_of_a_png_is_a_dot_in_any_mode(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(with_dots(DOTS))
    if mode == "red":
        black = Image.new("L", image.size)
        image = Image.merge("RGB", (image, black, black))
    else:
        image = image.convert(mode)
    image.save(tmp_path / "dots.png")
    # Three of them touch: they are three.
    assert read_dots(tmp_path / "dots.png").tolist() == DOTS.tolist()
    assert count_dots(tmp_path / "dots.png") == 5


@pytest.mark.parametrize("quality", [75, 95])
def test_dots_apart_are_found_again_in_a_jpeg(tmp_path: Path, quality: int) -> None:
    rng = np.random.default_rng(0)
    grid = np.argwhere(np.ones((14, 14))) * 10 + 5
    dots = grid[rng.permutation(len(grid))[:100]] + rng.integers(-2, 3, (100, 2))  # at least 6 pixels apart
    dots = dots[np.lexsort((dots[:, 1], dots[:, 0]))]
    pixels = with_dots(dots, 150, 150)
    Image.fromarray(pixels).save(tmp_path / "dots.jpeg", quality=quality)
    assert read_dots(tmp_path / "dots.jpeg").tolist() == dots.tolist()


def test_a_smeared_dot_of_a_jpeg_is_one_dot(tmp_path: Path) -> None:
    dots = np.argwhere(np.ones((5, 6))) * 8 + 2
    pixels = np.zeros((40, 50), dtype=np.uint8)
    for row, column in dots:
        pixels[row - 1 : row + 2, column - 1 : column + 2] = 190
    pixels[dots[:, 0], dots[:, 1]] = 255
    Image.fromarray(pixels).save(tmp_path / "dots.jpg", quality=95)
    assert (np.asarray(Image.open(tmp_path / "dots.jpg")) >= 128).sum() > 5 * len(dots)
    assert read_dots(tmp_path / "dots.jpg").tolist() == dots.tolist()


def test_an_image_that_is_no_dots_is_named(tmp_path: Path) -> None:
    Image.new("L", (4, 4), 255).save(tmp_path / "white.png")
    with pytest.raises(ValueError, match=r"white\.png is bright in 100% of its pixels"):
        read_dots(tmp_path / "white.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"broken\.png cannot be read as an image of dots"):
        read_dots(tmp_path / "broken.png")
    with pytest.raises(FileNotFoundError, match=r"gone\.png does not exist"):
        read_dots(tmp_path / "gone.png")


@settings(deadline=None, max_examples=60)
@given(
    tiles=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    size=st.integers(1, 9),
    seed=st.integers(0, 1000),
    num_dots=st.integers(0, 40),
)
def test_counts_of_tiles_add_up_to_the_total(tiles: tuple[int, int], size: int, seed: int, num_dots: int) -> None:
    rng = np.random.default_rng(seed)
    height, width = tiles[0] * size, tiles[1] * size
    dots = np.stack([rng.integers(0, height, num_dots), rng.integers(0, width, num_dots)], axis=1)
    _, counts, _ = crops_with_counts(np.zeros((height, width)), dots, size)
    assert counts.shape == (tiles[0] * tiles[1], 1) and counts.sum() == num_dots


@settings(deadline=None, max_examples=60)
@given(size=st.integers(1, 12), stride=st.integers(1, 14), seed=st.integers(0, 1000), colour=st.booleans())
def test_each_crop_shows_the_dots_that_it_counts(size: int, stride: int, seed: int, colour: bool) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random((17, 13)) < 0.2
    image = np.repeat(mask[..., None], 3, axis=2) if colour else mask
    crops, counts, corners = crops_with_counts(image, np.argwhere(mask), size, stride)
    assert crops.shape == (len(counts), size, size, *((3,) if colour else ()))
    assert len(crops) == ((17 - size) // stride + 1) * ((13 - size) // stride + 1)
    for crop, count, (row, column) in zip(crops, counts[:, 0], corners, strict=True):
        shown = crop[..., 0] if colour else crop
        assert shown.sum() == count
        assert np.array_equal(shown, mask[row : row + size, column : column + size])


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ((np.zeros(4), DOTS, 2), r"image has shape \(4,\)"),
        ((np.zeros((9, 9)), np.zeros(3), 2), r"dots has shape \(3,\)"),
        ((np.zeros((9, 9)), np.array([[8, 9]]), 2), r"dots has \[8, 9\] in it"),
        ((np.zeros((9, 9)), np.array([[-1, 0]]), 2), r"dots has \[-1, 0\] in it"),
        ((np.zeros((9, 8)), DOTS[:1], 9), "size is 9 and stride 9, for 9 by 8 pixels"),
        ((np.zeros((9, 8)), DOTS[:1], 2, 0), "stride 0"),
    ],
)
def test_crops_that_cannot_be_cut_are_refused(arguments: tuple[object, ...], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        crops_with_counts(*arguments)  # type: ignore[arg-type]
