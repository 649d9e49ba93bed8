"""Pictures of every kind become pixels; every file that is none is refused, at once, by name."""

from __future__ import annotations

import io
import os
import struct
import time
import zlib
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from serve.engine.pictures.decoding import MAX_JPEG_SCANS, MAX_PIXELS, decode_picture
from serve.errors import UnusablePicture

RED, BLUE = (255, 0, 0), (0, 0, 255)


def encoded(image: Image.Image, image_format: str = "png", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def halves(mode: str = "RGB", size: tuple[int, int] = (64, 32)) -> Image.Image:
    """The left half red, the right half blue."""
    image = Image.new("RGB", size, RED)
    image.paste(BLUE, (size[0] // 2, 0, *size))
    return image.convert(mode)


def decode(data: bytes, width: int = 64, height: int = 32) -> np.ndarray[Any, Any]:
    pixels: np.ndarray[Any, Any] = decode_picture(data, width, height)
    assert pixels.shape == (height, width, 3)
    assert pixels.dtype == np.uint8
    return pixels


def refused(data: bytes) -> str:
    began = time.monotonic()
    with pytest.raises(UnusablePicture) as caught:
        decode_picture(data, 64, 32)
    assert time.monotonic() - began < 2
    (problem,) = caught.value.problems
    assert problem.location == ("body", "image_url")
    return problem.kind


@pytest.mark.parametrize(
    ("image", "image_format", "options"),
    [
        (halves(), "png", {}),
        (halves(), "jpeg", {"quality": 95, "subsampling": 0}),
        (halves(), "webp", {"lossless": True}),
        (halves("P"), "png", {}),
        (halves("RGBA"), "png", {}),
        (halves("CMYK"), "jpeg", {"quality": 95}),
        (halves(), "jpeg", {"progressive": True, "quality": 95}),
    ],
)
def test_every_kind_of_file_gives_the_same_picture(
    image: Image.Image, image_format: str, options: dict[str, Any]
) -> None:
    pixels = decode(encoded(image, image_format, **options)).astype(int)
    assert np.abs(pixels[:, :28] - RED).max() <= 8
    assert np.abs(pixels[:, 36:] - BLUE).max() <= 8


def test_grey_of_one_eight_and_sixteen_bits() -> None:
    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (32, 1))
    eight = (ramp >> 8).astype(np.uint8)
    grey = decode(encoded(Image.fromarray(eight)))
    assert np.array_equal(grey[..., 0], eight)
    assert np.array_equal(grey, decode(encoded(Image.fromarray(ramp))))
    assert set(np.unique(decode(encoded(Image.fromarray(eight > 127))))) == {0, 255}


def test_transparent_parts_become_white() -> None:
    clear = Image.new("RGBA", (64, 32), (255, 0, 0, 0))
    assert (decode(encoded(clear)) == 255).all()
    palette = halves("P")
    index = palette.getpixel((0, 0))
    pixels = decode(encoded(palette, transparency=index))
    assert (pixels[:, :28] == 255).all()
    assert (decode(encoded(Image.new("LA", (64, 32), (0, 0)))) == 255).all()


def test_the_transparent_grey_of_sixteen_bits_becomes_white() -> None:
    grey = np.full((32, 64), 0x1000, np.uint16)
    grey[:, 32:] = 0x1001  # the same in eight bits
    png = encoded(Image.fromarray(grey))
    assert np.all(decode(png) == 0x10)
    pixels = decode(with_chunk(png, chunk(b"tRNS", b"\x10\x00")))
    assert np.all(pixels[:, :28] == 255)
    assert np.all(pixels[:, 36:] == 0x10)


def test_a_photograph_is_turned_as_its_camera_says() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise
    pixels = decode(encoded(halves(), "jpeg", exif=exif, quality=95), width=32, height=64)
    assert pixels[2, 16, 0] > 240  # the left half is on top
    assert pixels[61, 16, 2] > 240


def chunk(name: bytes, content: bytes) -> bytes:
    whole = name + content
    return struct.pack(">I", len(content)) + whole + struct.pack(">I", zlib.crc32(whole))


def with_chunk(png: bytes, added: bytes) -> bytes:
    """A PNG with a chunk before its pixels."""
    at = png.index(b"IDAT") - 4
    return png[:at] + added + png[at:]


@pytest.mark.parametrize(
    "damaged",
    [
        chunk(b"eXIf", b"nonsense"),
        chunk(b"eXIf", b"MM"),
        chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 8\nnonsense\n"),
    ],
    ids=["nonsense", "cut-off", "no-hexadecimal"],
)
def test_damaged_exif_is_passed_over(damaged: bytes) -> None:
    png = encoded(halves())
    assert np.array_equal(decode(with_chunk(png, damaged)), decode(png))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_beside_a_damaged_field(orientation: int) -> None:
    # A compression of -1, which no reader can write again.
    fields = ((0x0112, 3, 1, orientation << 16), (0x0103, 6, 1, 0xFF << 24))
    entries = b"".join(struct.pack(">HHII", *field) for field in fields)
    exif = b"Exif\0\0MM\0\x2a\0\0\0\x08" + struct.pack(">H", 2) + entries + bytes(4)
    jpeg = encoded(halves(), "jpeg", quality=95)
    segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    size = (64, 32) if orientation < 5 else (32, 64)
    pixels = decode(jpeg[:2] + segment + jpeg[2:], *size).astype(int)

    of_camera = Image.Exif()
    of_camera[0x0112] = orientation
    whole = encoded(halves(), "jpeg", exif=of_camera, quality=95)
    with Image.open(io.BytesIO(whole)) as opened:
        turned = ImageOps.exif_transpose(opened)
    assert np.array_equal(pixels, np.asarray(turned, int))


def test_the_picture_covers_the_size_and_is_cropped_about_its_centre() -> None:
    """Nothing is distorted: a circle stays one."""
    wide = Image.new("RGB", (300, 100), "white")
    wide.paste((0, 0, 0), (100, 0, 200, 100))
    assert decode(encoded(wide), 64, 64).max() < 60
    tall = decode(encoded(wide.rotate(90, expand=True)), 64, 128).astype(int)
    assert tall[:, :, 0].min() < 10
    assert tall[0].min() > 200
    assert tall[64].max() < 60
    assert decode(encoded(Image.new("RGB", (1, 1), RED)), 64, 32)[0, 0].tolist() == [255, 0, 0]


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header declares a size; its data is a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = (b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"0" * 99)))
    return b"".join(parts) + chunk(b"IEND", b"")


def webp_of_size(width: int, height: int) -> bytes:
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4)
    body += (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize("size", [(4097, 4096), (10_000, 9_000), (60_000, 60_000)])
def test_a_size_is_refused_from_the_header_alone(size: tuple[int, int]) -> None:
    """Below Pillow's own limit, above it, and where Pillow refuses by itself."""
    assert size[0] * size[1] > MAX_PIXELS
    assert refused(png_of_size(*size)) == "too_many_pixels"


def test_a_bomb_is_refused_without_being_decoded() -> None:
    """17 million pixels and one row in 50 kB; and a WebP of 268 million pixels in 30 bytes."""
    bomb = encoded(Image.new("L", (4096, 4097)), compress_level=9)
    assert len(bomb) < 50_000
    assert refused(bomb) == "too_many_pixels"
    assert refused(webp_of_size(16383, 16383)) in ("too_many_pixels", "not_an_image")


def test_the_largest_size_is_decoded() -> None:
    assert decode(encoded(Image.new("L", (4096, 4096), 7)), 64, 64).tolist()[0][0] == [7, 7, 7]


def test_a_jpeg_of_many_scans_is_refused() -> None:
    jpeg = encoded(halves(), "jpeg", progressive=True)
    assert jpeg.count(b"\xff\xda") < MAX_JPEG_SCANS / 10
    last = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    assert refused(jpeg[:-2] + last * MAX_JPEG_SCANS + jpeg[-2:]) == "too_many_scans"


def jpeg_of_scans(side: int, scans: int, frame: int = 0xC2, before: bytes = b"") -> bytes:
    """A grey JPEG whose scans have no data.

    Args:
        frame: the marker of its frame, which says how it is coded.
        before: bytes between its first marker and its tables.
    """

    def segment(marker: int, data: bytes) -> bytes:
        return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data

    table = segment(0xDB, bytes([0]) + bytes([1]) * 64)
    codes = segment(0xC4, bytes([0, 1, *bytes(15), 0])) if frame == 0xC2 else b""
    shape = segment(frame, struct.pack(">BHHBBBB", 8, side, side, 1, 1, 0x11, 0))
    first = segment(0xDA, bytes([1, 1, 0, 0, 0, 0x01]))
    finer = segment(0xDA, bytes([1, 1, 0, 0, 0, 0x10]))
    return b"\xff\xd8" + before + table + codes + shape + first + finer * (scans - 1) + b"\xff\xd9"


def test_a_large_jpeg_may_have_fewer_scans() -> None:
    """Scans times pixels are bounded, so no file is decoded for longer than the largest."""
    assert refused(jpeg_of_scans(4096, 33)) == "too_many_scans"
    decode(jpeg_of_scans(4096, 32))
    decode(jpeg_of_scans(512, MAX_JPEG_SCANS))
    assert refused(jpeg_of_scans(512, MAX_JPEG_SCANS + 1)) == "too_many_scans"


def test_a_progressive_jpeg_of_the_largest_size_is_decoded() -> None:
    jpeg = encoded(Image.new("L", (4096, 4096), 7), "jpeg", progressive=True)
    assert decode(jpeg, 64, 64).tolist()[0][0] == [7, 7, 7]


@pytest.mark.parametrize("frame", [0xC3, 0xC9, 0xCA])
@pytest.mark.parametrize("before", [b"", b"\xff\xe1\x00\x06\xff\xc0ab", b"junk\xff\xff\xff"])
def test_a_jpeg_without_huffman_coding_is_refused(frame: int, before: bytes) -> None:
    """Lossless and arithmetic ones, also where what is before their frame looks like another."""
    assert refused(jpeg_of_scans(64, 2, frame, before)) in ("jpeg_coding", "not_an_image")
    if not before:
        assert refused(jpeg_of_scans(64, 2, frame)) == "jpeg_coding"


def test_text_that_is_packed_into_a_file_is_not_unpacked() -> None:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("bomb", "0" * 20_000_000, zip=True)
    assert refused(encoded(halves(), pnginfo=info)) == "not_an_image"


@pytest.mark.parametrize("image_format", ["png", "webp"])
def test_an_animation_is_refused(image_format: str) -> None:
    frames = [halves(), halves().transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    data = encoded(frames[0], image_format, save_all=True, append_images=frames[1:])
    assert refused(data) == "animated"


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_a_truncated_file_is_refused(image_format: str) -> None:
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 255, (64, 64, 3), np.uint8))
    data = encoded(noise, image_format)
    assert refused(data[: len(data) // 2]) in ("damaged", "not_an_image")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xd8",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        encoded(halves(), "gif"),
        encoded(halves(), "tiff"),
        encoded(halves(), "bmp"),
        encoded(halves(), "ppm"),
    ],
)
def test_other_formats_are_refused(data: bytes) -> None:
    """Also those that Pillow could read."""
    assert refused(data) == "not_an_image"


@pytest.mark.parser
@given(st.data())
def test_damaged_files_are_decoded_or_refused(data: st.DataObject) -> None:
    """Whatever Pillow raises, the caller gets pixels or a sentence."""
    image_format = data.draw(st.sampled_from(["png", "jpeg", "webp"]))
    whole = bytearray(encoded(halves(), image_format))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    with suppress(UnusablePicture):
        decode(bytes(whole))


@pytest.mark.parametrize("size", [10, 1000])
def test_random_bytes_are_refused(size: int) -> None:
    assert refused(os.urandom(size)) == "not_an_image"
