"""Fetching a picture over https, from the hosts that the operator allows and no other.

A caller chooses the URL, so it could aim at machines that only this one reaches. Three things
prevent that. The host and port must be one that `SDXL_IMAGE_HOSTS` names, exactly. A redirect is
not followed. And the host must prove by its certificate that it has the name in the URL: if a name
leads to another machine, whatever its address, nothing is asked of that machine.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Collection
from functools import lru_cache

import httpx

from serve.errors import MAX_PICTURE_BYTES, UnusablePicture

FETCH_SECONDS = 10.0
"""From looking up the host's address to the last byte."""

MAX_URL_CHARACTERS = 4096
TOO_LARGE = f"has more than the {MAX_PICTURE_BYTES} bytes allowed"

_HEADERS = {
    "Accept": "image/jpeg, image/png, image/webp",
    "Accept-Encoding": "identity",  # so that what is sent is as large as what is read
    "User-Agent": "stepspan",
}


async def fetch_picture(url: str, hosts: Collection[str]) -> bytes:
    """The bytes at an https URL, unchecked.

    Args:
        hosts: the allowed hosts, lower case, each with its port unless that is 443.

    Raises:
        UnusablePicture: the URL is not allowed, or its host does not answer with at most
            `MAX_PICTURE_BYTES` within `FETCH_SECONDS`. Never repeats the URL.
    """
    _require_allowed(url, hosts)
    try:
        async with asyncio.timeout(FETCH_SECONDS):
            return await _get(url)
    except TimeoutError:
        raise UnusablePicture(f"was not fetched within {FETCH_SECONDS:g} s", "fetch") from None
    except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL, OSError, UnicodeError):
        raise UnusablePicture("could not be fetched: its host does not answer", "fetch") from None


def _require_allowed(url: str, hosts: Collection[str]) -> None:
    allowed = "must be a data URI"
    if hosts:
        allowed += f", or an https URL at {' or '.join(hosts)}"
    try:
        parsed = httpx.URL(url[: MAX_URL_CHARACTERS + 1])
        place, scheme = parsed.netloc.decode("ascii"), parsed.scheme
    except (httpx.InvalidURL, UnicodeError, ValueError, TypeError):
        raise UnusablePicture(allowed, "image_url") from None
    if scheme != "https" or place not in hosts or parsed.userinfo:
        raise UnusablePicture(allowed, "image_url")
    if len(url) > MAX_URL_CHARACTERS:
        raise UnusablePicture(f"has more than {MAX_URL_CHARACTERS} characters", "image_url")


async def _get(url: str) -> bytes:
    async with (
        httpx.AsyncClient(
            headers=_HEADERS,
            verify=_trusted(),
            timeout=None,  # noqa: S113 - the caller limits the whole fetch
            follow_redirects=False,
        ) as client,
        client.stream("GET", url) as response,
    ):
        if response.is_redirect:
            raise UnusablePicture("leads to a redirect, which is not followed", "fetch")
        if response.status_code != 200:
            raise UnusablePicture(f"was answered with {response.status_code}, not 200", "fetch")
        declared = response.headers.get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > MAX_PICTURE_BYTES:
            raise UnusablePicture(TOO_LARGE, "too_large")
        data = bytearray()
        async for chunk in response.aiter_raw():
            data += chunk
            if len(data) > MAX_PICTURE_BYTES:
                raise UnusablePicture(TOO_LARGE, "too_large")
        return bytes(data)


@lru_cache(maxsize=1)
def _trusted() -> ssl.SSLContext:
    """The certificate authorities, read once: those of `SSL_CERT_FILE`, else of certifi."""
    return httpx.create_ssl_context()
