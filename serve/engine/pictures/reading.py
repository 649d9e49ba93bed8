"""From a request's `image_url` to the pixels that its run begins with.

Fetching is on the event loop, decoding on threads of this module. What a client sends is bounded
before it costs anything: the length of a data URI, the bytes and the seconds of a fetch, the pixels
that a file's header declares.
"""

from __future__ import annotations

import asyncio
import binascii
import re
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from kernels_warmup.shapes import CompiledShape
from serve.engine.pictures.decoding import decode_picture
from serve.engine.pictures.fetching import TOO_LARGE, fetch_picture
from serve.errors import MAX_PICTURE_BYTES, UnusablePicture

DECODED_AT_ONCE = 2
"""How many pictures are decoded at once. The largest takes 130 MB of memory while it is decoded."""

_HEAD = re.compile(r"data:image/(jpeg|jpg|png|webp)(;[\w.+-]+=[\w.+-]*)*;base64", re.IGNORECASE)
_LONGEST_HEAD = 200


class PictureReader:
    """Reads the pictures of requests.

    Args:
        hosts: the hosts that pictures may be fetched from, as `SDXL_IMAGE_HOSTS`.
    """

    def __init__(self, hosts: Collection[str]) -> None:
        self._hosts = tuple(hosts)
        self._threads = ThreadPoolExecutor(DECODED_AT_ONCE, thread_name_prefix="picture")
        self._decoding: set[Future[Any]] = set()

    async def read(self, url: str, shape: CompiledShape) -> Any:
        """The picture at a URL, (height, width, 3) uint8 of the given shape.

        Raises:
            UnusablePicture: the URL is not allowed, or leads to no picture that can be used.
        """
        if url[:5].lower() == "data:":
            return await self._on_thread(_decode_data_uri, url, shape)
        data = await fetch_picture(url, self._hosts)
        return await self._on_thread(decode_picture, data, shape.width, shape.height)

    def close(self) -> bool:
        """Begin no further decoding. Returns whether none is left on its thread, which cannot be
        interrupted."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        return not self._decoding

    async def _on_thread(self, work: Any, *arguments: Any) -> Any:
        decoding = self._threads.submit(work, *arguments)
        self._decoding.add(decoding)
        decoding.add_done_callback(self._decoding.discard)
        return await asyncio.wrap_future(decoding)


def _decode_data_uri(uri: str, shape: CompiledShape) -> Any:
    return decode_picture(data_uri_bytes(uri), shape.width, shape.height)


def data_uri_bytes(uri: str) -> bytes:
    """The bytes of a data URI in base64 whose type is a JPEG's, a PNG's or a WebP's.

    Raises:
        UnusablePicture: it is no such data URI, or is too large.
    """
    comma = uri.find(",", 0, _LONGEST_HEAD)
    if comma < 0 or not _HEAD.fullmatch(uri[:comma]):
        raise UnusablePicture(
            "must begin with data:image/jpeg;base64, or the same with png or webp", "data_uri"
        )
    if (len(uri) - comma - 1) // 4 * 3 > MAX_PICTURE_BYTES + 2:
        raise UnusablePicture(TOO_LARGE, "too_large")
    try:
        data = binascii.a2b_base64(uri[comma + 1 :], strict_mode=True)
    except ValueError:
        raise UnusablePicture(
            "must be base64 after its comma: A-Z, a-z, 0-9, + and /, padded with =", "base64"
        ) from None
    if len(data) > MAX_PICTURE_BYTES:
        raise UnusablePicture(TOO_LARGE, "too_large")
    return data


def grey_picture(shape: CompiledShape) -> Any:
    """What the warm-up begins with."""
    import numpy as np  # the gateway has neither numpy nor a model

    return np.full((shape.height, shape.width, 3), 128, np.uint8)
