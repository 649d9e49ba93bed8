"""From the bytes of a JPEG, PNG or WebP to pixels of the size that a run needs.

The file may be anything at all. Only these three decoders of Pillow see it. Its size is read from
its header and checked before anything is decoded, and what fails is refused by one sentence.
"""

from __future__ import annotations

import io
import re
import warnings
from typing import Any

from PIL import Image, ImageOps

from serve.errors import UnusablePicture

MAX_PIXELS = 4096 * 4096
"""About 17 million; the cameras of most phones make 12."""

MAX_JPEG_SCANS = 200
"""A progressive JPEG has about ten scans. Each passes over the whole picture, so a small file of
many scans would be decoded for minutes."""

MAX_SCANNED_PIXELS = 32 * MAX_PIXELS
"""Scans times pixels of a JPEG. At the largest size a scan takes 14 ms."""

_SCAN = b"\xff\xda"
"""The marker of a JPEG's scan. It cannot be within a scan's own data."""

_MARKER = re.compile(rb"\xff([^\x00\xff])", re.DOTALL)
_START_OF_SCAN, _FRAMES = 0xDA, {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_WITHOUT_LENGTH = {0x01, *range(0xD0, 0xDA)}
_HUFFMAN_CODED = {0xC0, 0xC1, 0xC2}
"""The frames of baseline, extended and progressive JPEGs. An arithmetic decoder, which no browser
has, works on a scan of no bytes as if it had as many as it needs."""

_FORMATS = ("JPEG", "PNG", "WEBP")
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What each orientation of EXIF asks for."""

# Pillow warns of a size that is far above ours. The warning becomes an error, which is caught.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


def decode_picture(data: bytes, width: int, height: int) -> Any:
    """Decode a picture and bring it to a size: (height, width, 3) uint8.

    It is turned as its EXIF orientation says, scaled until it covers the size, and cropped about
    its centre: no part of it is distorted. Transparent parts become white. Palettes, grey, CMYK and
    16 bits a channel become RGB of 8 bits; a colour profile is ignored.

    Raises:
        UnusablePicture: it is none of the three formats, has too many pixels, moves, or is damaged.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_many_pixels() from None
    except Exception:  # noqa: BLE001 - Pillow raises many types for a damaged header
        raise UnusablePicture("is not a JPEG, PNG or WebP", "not_an_image") from None
    with image:
        if image.width * image.height > MAX_PIXELS:
            raise _too_many_pixels()
        if image.format in ("JPEG", "MPO"):
            _check_coding(data, image.width * image.height)
        # A photograph with a second picture in it, as telephones make, does not move.
        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
            raise UnusablePicture("is animated; one still picture is needed", "animated")
        try:
            return _pixels(image, width, height)
        except Exception:  # noqa: BLE001 - Pillow raises many types for damaged data
            raise UnusablePicture("is damaged or incomplete", "damaged") from None


def _check_coding(jpeg: bytes, pixels: int) -> None:
    """Raises `UnusablePicture` for a JPEG that would take long to decode."""
    if _frame(jpeg) not in _HUFFMAN_CODED:
        raise UnusablePicture(
            "is a JPEG that is neither baseline nor progressive with Huffman coding", "jpeg_coding"
        )
    most = min(MAX_JPEG_SCANS, MAX_SCANNED_PIXELS // pixels)
    if jpeg.count(_SCAN) > most:
        raise UnusablePicture(
            f"is a JPEG of more than {most} scans, which is all that its size allows",
            "too_many_scans",
        )


def _frame(jpeg: bytes) -> int | None:
    """The marker of a JPEG's frame, found as its decoder finds it; None: there is none."""
    at = 2
    while (found := _MARKER.search(jpeg, at)) is not None:
        marker, at = found[1][0], found.end()
        if marker in _FRAMES:
            return marker
        if marker == _START_OF_SCAN:
            return None
        if marker not in _WITHOUT_LENGTH:
            at += int.from_bytes(jpeg[at : at + 2])
    return None


def _pixels(image: Image.Image, width: int, height: int) -> Any:
    import numpy as np  # the gateway has neither numpy nor a model

    image.load()
    turn = _turn(image)
    picture = image if turn is None else image.transpose(turn)
    if picture.mode.startswith("I"):  # grey of 16 bits; Pillow's own conversion would clip it
        grey = np.asarray(picture).astype(np.uint32)
        transparent_grey = picture.info.get("transparency")
        picture = Image.fromarray((grey >> 8).clip(0, 255).astype(np.uint8))
        if transparent_grey is not None:
            picture.putalpha(Image.fromarray(np.uint8(255) * (grey != transparent_grey)))
    transparent = "A" in picture.getbands() or "transparency" in picture.info
    picture = picture.convert("RGBA" if transparent else "RGB")
    picture = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
    if transparent:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture).convert("RGB")
    return np.array(picture)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """How the EXIF of a picture says that it is turned; None: not at all, or the EXIF is damaged.

    Pillow's own `exif_transpose` also writes the rest of the EXIF anew, and fails where that is
    damaged.
    """
    try:
        return _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # noqa: BLE001 - Pillow raises many types; the pixels are whole
        return None


def _too_many_pixels() -> UnusablePicture:
    return UnusablePicture(f"has more than the {MAX_PIXELS} pixels allowed", "too_many_pixels")
