"""Image files of every kind, and the way back from what the network sees to what is stored."""

import os
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from PIL.ExifTags import Base
from voc.dataset.errors import DataError
from voc.dataset.images import read_image
from voc.inference.pictures import Picture, read_picture, reduced_size

ALL = 10**6  # more pixels than any of these images has


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"])
@pytest.mark.parametrize("size", [(1, 1), (7, 4)])
def test_modes(mode: str, size: tuple[int, int], tmp_path: Path) -> None:
    image = Image.fromarray(noise(size[1], size[0])).convert("RGBA" if mode == "PA" else "RGB").convert(mode)
    path = tmp_path / ("image.tif" if mode in ("PA", "CMYK", "YCbCr") else "image.png")
    image.save(path)
    picture = read_picture(path, ALL)
    np.testing.assert_array_equal(picture.pixels, np.asarray(image.convert("RGB")))
    assert picture.stored_size == size
    assert (picture.tensor() == read_image(path)).all()


@pytest.mark.filterwarnings("error")
def test_a_palette_with_transparency(tmp_path: Path) -> None:
    image = Image.fromarray(noise(4, 5)).quantize(7)
    image.save(tmp_path / "image.png", transparency=bytes(range(7)))
    np.testing.assert_array_equal(read_picture(tmp_path / "image.png", ALL).pixels, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bits_are_not_clipped(suffix: str, tmp_path: Path) -> None:
    values = np.array([[0, 255, 256], [32768, 65279, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"image.{suffix}")
    pixels = read_picture(tmp_path / f"image.{suffix}", ALL).pixels
    np.testing.assert_array_equal(pixels, np.repeat([[[0], [0], [1]], [[128], [254], [255]]], 3, axis=2))


@pytest.mark.parametrize("orientation", range(10))  # 0 and 9 are invalid
def test_orientation(orientation: int, tmp_path: Path) -> None:
    stored = Image.fromarray(noise(4, 6))
    exif = Image.Exif()
    exif[Base.Orientation] = orientation
    stored.save(tmp_path / "image.png", exif=exif)
    picture = read_picture(tmp_path / "image.png", ALL)
    with Image.open(tmp_path / "image.png") as image:
        np.testing.assert_array_equal(picture.pixels, np.asarray(ImageOps.exif_transpose(image)))
    assert picture.stored_size == (6, 4)
    mask = picture.as_stored(picture.pixels[..., 0].copy())
    np.testing.assert_array_equal(mask, np.asarray(stored)[..., 0])


def test_a_large_image_is_reduced_and_its_mask_enlarged(tmp_path: Path) -> None:
    values = np.zeros((60, 80, 3), np.uint8)
    values[:, 40:] = 200
    exif = Image.Exif()
    exif[Base.Orientation] = 6
    Image.fromarray(values).save(tmp_path / "image.png", exif=exif)
    picture = read_picture(tmp_path / "image.png", 300)
    assert picture.pixels.shape == (20, 15, 3)
    mask = picture.as_stored((picture.pixels[..., 0] > 100).astype(np.uint8))
    np.testing.assert_array_equal(mask, values[..., 0] // 200)


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.integers(1, 10**7))
@example(1, 10**6, 100)
@example(10**6, 1, 1)
def test_reduced_size(width: int, height: int, max_pixels: int) -> None:
    size = reduced_size((width, height), max_pixels)
    assert min(size) >= 1
    assert size[0] * size[1] <= max_pixels
    if width * height <= max_pixels:
        assert size == (width, height)
    elif min(size) >= 100:
        assert size[0] * size[1] > 0.97 * max_pixels
        assert size[0] / size[1] == pytest.approx(width / height, rel=0.03)


def bomb() -> bytes:
    """Return a PNG of few bytes whose header says 60000 x 60000."""
    chunks = {b"IHDR": struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0), b"IDAT": zlib.compress(bytes(1000))}
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks.items()
    )


BROKEN = {
    "empty.jpg": (b"", "no image of a known format"),
    "text.jpg": (b"this is no picture\n", "no image of a known format"),
    "postscript.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image of a known format"),
    "bomb.png": (bomb(), "decompression bomb"),
    "header.png": (b"\x89PNG\r\n\x1a\n\x00\x00\x00\x0dIHDR", "cannot be read"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken(name: str, tmp_path: Path) -> None:
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read_picture(tmp_path / name, ALL)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_damaged_exif(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(noise(5, 6)).save(path, exif=b"Exif\0\0II*\0")
    with pytest.raises(DataError, match="cannot be read"):
        read_picture(path, ALL)
    with pytest.raises(DataError, match="cannot read image"):
        read_image(path)


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "bmp", "webp", "tif"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_truncated(suffix: str, part: float, tmp_path: Path) -> None:
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(noise(50, 60)).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(DataError):
        read_picture(path, ALL)


def test_floating_point(tmp_path: Path) -> None:
    Image.fromarray(np.ones((3, 3), np.float32)).save(tmp_path / "image.tif")
    with pytest.raises(DataError, match="floating-point"):
        read_picture(tmp_path / "image.tif", ALL)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no named pipes")
def test_paths_that_are_not_files(tmp_path: Path) -> None:
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "link.jpg").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.jpg")
    for name, message in {"folder": "is a folder", "link": "not found", "pipe": "is no regular file"}.items():
        with pytest.raises(DataError, match=message):
            read_picture(tmp_path / f"{name}.jpg", ALL)


def test_upright_picture_is_unchanged() -> None:
    pixels = noise(3, 5)
    mask = Picture(pixels, (5, 3), None).as_stored(pixels[..., 1].copy())
    np.testing.assert_array_equal(mask, pixels[..., 1])
