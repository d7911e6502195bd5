"""Every kind of image becomes RGB, upright; what cannot be read is said by the file's name."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch

from energyreg.images import reading
from energyreg.images.reading import ImageFileError, decode, read_rgb

Image = pytest.importorskip("PIL.Image")


def broken(path: Path, kind: str) -> None:
    if kind == "cut":
        noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("This is no image.")
    else:
        Image.fromarray(np.full((3, 3), {"float": 2.0, "nan": np.nan}[kind], np.float32)).save(path, "TIFF")


def picture(mode: str) -> "Image.Image":
    """An image of the colour (200, 200, 200), or what a mode makes of it."""
    grey = {
        "RGB": (200, 200, 200), "RGBA": (200, 200, 200, 255), "L": 200, "LA": (200, 255), "CMYK": (0, 0, 0, 55),
        "1": 1, "YCbCr": (200, 128, 128),
    }  # fmt: skip
    if mode == "P":
        return picture("RGB").quantize(4)
    if mode == "I;16":
        return Image.fromarray(np.full((5, 7), 200 * 257, np.uint16))
    if mode == "F":
        return Image.fromarray(np.full((5, 7), 200 / 255, np.float32))
    return Image.new(mode, (7, 5), grey[mode])


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("RGB", "png"), ("RGB", "jpg"), ("RGB", "gif"), ("RGB", "bmp"), ("RGB", "webp"), ("RGBA", "png"), ("L", "png"),
        ("L", "jpg"), ("LA", "png"), ("P", "png"), ("CMYK", "jpg"), ("CMYK", "tif"), ("I;16", "png"), ("I;16", "tif"),
        ("F", "tif"), ("YCbCr", "jpg"),
    ],
)  # fmt: skip
def test_every_kind_of_image_becomes_rgb(tmp_path: Path, mode: str, suffix: str) -> None:
    picture(mode).save(tmp_path / f"image.{suffix}")
    image = read_rgb(tmp_path / f"image.{suffix}", 6)
    assert image.shape == (3, 6, 6) and image.dtype == torch.uint8
    assert (image.int() - 200).abs().max() <= 2  # JPEG


def test_what_is_transparent_lies_on_white(tmp_path: Path) -> None:
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[:, 2:] = 10, 20, 30, 255
    Image.fromarray(pixels).save(tmp_path / "image.png")
    image = read_rgb(tmp_path / "image.png", 4)
    assert image[:, 0, 0].tolist() == [255, 255, 255] and image[:, 0, 3].tolist() == [10, 20, 30]


SIDES = {
    1: ("top", "left"), 2: ("top", "right"), 3: ("bottom", "right"), 4: ("bottom", "left"),
    5: ("left", "top"), 6: ("right", "top"), 7: ("right", "bottom"), 8: ("left", "bottom"),
}  # fmt: skip
"""Where the first row and the first column of the stored pixels are seen, by the Orientation tag of Exif 2.3."""


@pytest.mark.parametrize("suffix", ["png", "tif", "webp", "jpg"])
@pytest.mark.parametrize("orientation", SIDES)
def test_a_turned_photograph_is_turned_back_pixel_by_pixel(tmp_path: Path, orientation: int, suffix: str) -> None:
    upright = np.random.default_rng(0).integers(0, 256, (5, 8, 3), np.uint8)
    if suffix == "jpg":  # blocks of one colour, which the compression keeps
        upright = upright.repeat(16, 0).repeat(16, 1)
    height, width = upright.shape[:2]
    row, column = SIDES[orientation]
    if row in ("top", "bottom"):
        rows, columns = np.arange(height)[:, None], np.arange(width)[None]
        stored = upright[
            rows if row == "top" else height - 1 - rows, columns if column == "left" else width - 1 - columns
        ]
    else:
        columns, rows = np.arange(width)[:, None], np.arange(height)[None]
        stored = upright[
            rows if column == "top" else height - 1 - rows, columns if row == "left" else width - 1 - columns
        ]
    exif = Image.Exif()
    exif[0x0112] = orientation
    settings = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(suffix, {})
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif, **settings)
    found = np.asarray(decode(path)).astype(int)
    assert found.shape == upright.shape
    assert np.abs(found - upright).max() <= (4 if suffix == "jpg" else 0)
    small = read_rgb(path, 8).permute(1, 2, 0).numpy().astype(int)
    expected = np.asarray(Image.fromarray(upright).resize((8, 8), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(small - expected).max() <= (4 if suffix == "jpg" else 0)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "CMYK", "1", "I;16", "F"])
def test_an_image_in_strips_is_the_same(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    if mode in ("I;16", "F"):
        high, kind = (65_535, np.uint16) if mode == "I;16" else (1.0, np.float32)
        image = Image.fromarray((rng.random((30, 7)) * high).astype(kind))
    else:
        image = Image.fromarray(rng.integers(0, 256, (30, 7, 4), np.uint8)).convert("RGB" if mode == "P" else mode)
        image = image.quantize(9) if mode == "P" else image
    buffer = io.BytesIO()
    image.save(buffer, "TIFF")
    whole = np.asarray(decode(buffer))
    monkeypatch.setattr(reading, "STRIP", 21)
    assert np.array_equal(np.asarray(decode(buffer)), whole)


def test_the_smallest_image_and_the_longest(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), (9, 8, 7)).save(tmp_path / "one.png")
    Image.new("RGB", (3000, 1), (9, 8, 7)).save(tmp_path / "long.png")
    for name in ("one.png", "long.png"):
        for resize in ("squash", "crop"):
            image = read_rgb(tmp_path / name, 5, resize)
            assert image.flatten(1).unique(dim=1)[:, 0].tolist() == [9, 8, 7]


def test_crop_keeps_the_middle_and_squash_the_whole(tmp_path: Path) -> None:
    pixels = np.zeros((8, 24), np.uint8)
    pixels[:, 8:16] = 255
    Image.fromarray(pixels).save(tmp_path / "image.png")
    assert (read_rgb(tmp_path / "image.png", 8, "crop") == 255).all()
    squashed = read_rgb(tmp_path / "image.png", 9)[0, 0].tolist()
    assert squashed[0] == squashed[8] == 0 and squashed[4] == 255


def test_a_large_photograph_is_read_in_part_but_alike(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 640).astype(np.uint8)
    Image.fromarray(np.stack([np.tile(ramp, (640, 1))] * 3, -1)).save(tmp_path / "image.jpg", quality=95)
    row = read_rgb(tmp_path / "image.jpg", 32)[0, 16].float()
    expected = torch.linspace(0, 255, 640).reshape(32, 20).mean(1)
    assert (row - expected).abs().max() < 4


@pytest.mark.parametrize("kind", ["cut", "empty", "text", "float", "nan"])
def test_a_broken_image_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("image.tif" if kind in ("float", "nan") else "image.jpg")
    broken(path, kind)
    with pytest.raises(ImageFileError) as error:
        read_rgb(path, 8)
    assert str(error.value).startswith(f"{path} cannot be read as an image: ")
    assert str(error.value).endswith('. Replace or remove it, or pass on_error="skip".')


@pytest.mark.parametrize("size", ["9000 9000", "150000 150000"])
def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(size: str, tmp_path: Path) -> None:
    (tmp_path / "bomb.pgm").write_bytes(f"P5 {size} 255\n0".encode())
    with pytest.raises(ImageFileError, match=r"bomb.pgm cannot be read as an image: .*\d pixels"):
        read_rgb(tmp_path / "bomb.pgm", 8)


def test_a_jpeg_may_be_larger_as_it_is_decoded_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (640, 640), (200, 0, 0)).save(tmp_path / "image.jpg")
    Image.new("RGB", (640, 640), (200, 0, 0)).save(tmp_path / "progressive.jpg", progressive=True)
    monkeypatch.setattr(reading, "MOST_PIXELS", 100_000)
    assert read_rgb(tmp_path / "image.jpg", 8).shape == (3, 8, 8)
    for name, size in (("progressive.jpg", 8), ("image.jpg", 400)):
        with pytest.raises(ImageFileError, match=r"it has 640 x 640 pixels, where at most 100,000 are read"):
            read_rgb(tmp_path / name, size)


def test_other_formats_are_not_opened_whatever_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an EPS file Pillow would start Ghostscript."""
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a programme was started"))
    (tmp_path / "a.jpg").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n%%EOF\n"
    )
    Image.new("RGB", (4, 4)).save(tmp_path / "b.jpg", "PCX")
    for name in ("a.jpg", "b.jpg"):
        with pytest.raises(ImageFileError, match=r"cannot identify it as JPEG, PNG, BMP, GIF, TIFF, WEBP or PPM"):
            read_rgb(tmp_path / name, 8)


@pytest.mark.parametrize(("kind", "suffix"), [(np.uint16, "png"), (np.uint16, "tif"), (np.int32, "tif")])
def test_fewer_bits_than_the_file_says_are_no_black_image(kind: type, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"image.{suffix}"
    for highest in (1, 255, 4095):
        Image.fromarray(np.linspace(0, highest, 64).astype(kind).reshape(8, 8)).save(path)
        with pytest.raises(ImageFileError, match=rf"its values end at {highest}, where 65535 is white"):
            read_rgb(path, 8)
    for highest in (0, 5000, 65_535):
        Image.fromarray(np.linspace(0, highest, 64).astype(kind).reshape(8, 8)).save(path)
        assert read_rgb(path, 8).max() == round(highest / 257)
