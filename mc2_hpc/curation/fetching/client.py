"""One HTTP request for an image, within bounds on time and size: a body, a redirect, a request to wait, or a drop."""

import asyncio
import email.utils
import time
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from urllib.parse import urlsplit

import aiohttp
import yarl

from mc2_hpc.curation.fetching.addresses import AddressPolicy, AddressRefused
from mc2_hpc.curation.fetching.options import FetchOptions
from mc2_hpc.curation.fetching.robots import opts_out
from mc2_hpc.curation.pool.urls import absolute_url
from mc2_hpc.drops import Drop, Dropped

_REDIRECTS = (301, 302, 303, 307, 308)
_GONE = (404, 410)
_BUSY = (429, 503)
_IDLE_S = 5.0
"""How long a connection stays open for the next image of its host. Pools name hundreds of hosts per second, and every
open connection is a file descriptor."""
_DNS_S = 300
_DNS_HOSTS = 100_000
_DNS_THREADS = 64
"""Look-ups at a time: one may take seconds, and asyncio's default is a few threads."""


@dataclass(frozen=True)
class Moved:
    """The server redirects to ``url``."""

    url: str


@dataclass(frozen=True)
class Busy:
    """The server asks to wait."""

    wait_s: float | None
    """As told by Retry-After."""


class Client:
    """Sends requests: ``async with Client(options) as client``."""

    def __init__(self, options: FetchOptions) -> None:
        self._options = options
        self._agent = options.user_agent.partition("/")[0].strip()
        self._policy = AddressPolicy(options.allow_addresses)

    async def __aenter__(self) -> "Client":
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_DNS_THREADS, "look-up"))
        options = self._options
        connector = aiohttp.TCPConnector(
            limit=0,  # the caller limits connections
            keepalive_timeout=_IDLE_S,
            ttl_dns_cache=_DNS_S,
            dns_cache_max_size=_DNS_HOSTS,
            socket_factory=self._policy.open_socket,
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            # Images are compressed already; an encoded body is unpacked here, within the limit on its size.
            headers={"User-Agent": options.user_agent, "Accept": "image/*,*/*;q=0.5", "Accept-Encoding": "identity"},
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(total=None, connect=options.connect_timeout),
            trust_env=False,  # a proxy would connect for us, to any address
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def request(self, url: str) -> bytes | Moved | Busy:
        """What the server answers to a GET of an address from :func:`~mc2_hpc.curation.pool.urls.absolute_url`.

        Raises:
            Dropped: there is no image, or it may not be used; the reason is one of those under "Fetching an image" in
                :mod:`mc2_hpc.drops`, or ``url_invalid``.
        """
        try:
            async with asyncio.timeout(self._options.timeout):
                async with self._session.get(yarl.URL(url, encoded=True), allow_redirects=False) as response:
                    return await self._answer(response, url)
        except Dropped:
            raise
        except TimeoutError as error:
            raise Dropped(Drop.TIMEOUT, str(error)) from None
        except aiohttp.ClientConnectorError as error:
            refused = isinstance(error.os_error, AddressRefused)
            raise Dropped(Drop.ADDRESS_REFUSED if refused else Drop.HOST_UNREACHABLE, str(error)) from None
        except (aiohttp.InvalidURL, UnicodeError) as error:  # a label of the host may be too long
            raise Dropped(Drop.URL_INVALID, str(error)) from None
        except (aiohttp.ClientError, OSError) as error:
            raise Dropped(Drop.RESPONSE_BROKEN, str(error)) from None
        except ValueError as error:  # yarl's, of an address, or aiohttp's, of a header
            raise Dropped(Drop.URL_INVALID, str(error)) from None

    async def _answer(self, response: aiohttp.ClientResponse, url: str) -> bytes | Moved | Busy:
        status, headers = response.status, response.headers
        if status in _REDIRECTS:
            return Moved(absolute_url(headers.get("Location", ""), url))
        if status in _BUSY:
            return Busy(retry_after(headers.get("Retry-After", "")))
        if status != 200:
            raise Dropped(Drop.HTTP_404 if status in _GONE else Drop.HTTP_ERROR, str(status))
        if opts_out(headers.getall("X-Robots-Tag", ()), self._options.opt_out, self._agent):
            raise Dropped(Drop.OPTED_OUT)
        return await self._body(response, headers)

    async def _body(self, response: aiohttp.ClientResponse, headers: Mapping[str, str]) -> bytes:
        most = self._options.max_bytes
        if (response.content_length or 0) > most:
            raise Dropped(Drop.TOO_LARGE, f"{response.content_length:,} bytes announced")
        pieces, size = [], 0
        async for piece in response.content.iter_any():
            pieces.append(piece)
            size += len(piece)
            if size > most:
                raise Dropped(Drop.TOO_LARGE, f"more than {most:,} bytes")
        body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        encoding = headers.get("Content-Encoding", "").strip().lower()
        return unpacked(body, most) if encoding in ("gzip", "x-gzip", "deflate") else body


def host_of(url: str) -> str:
    """Whom to be polite to: the host and port of an absolute address."""
    return urlsplit(url).netloc.lower()


def unpacked(body: bytes, most: int) -> bytes:
    """A gzip or zlib body's content; never unpacks more than ``most`` + 1 bytes.

    Raises:
        Dropped: ``too_large``, or ``response_broken`` (damaged or truncated).
    """
    unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # either header
    try:
        content = unpacker.decompress(body, most + 1)
    except zlib.error as error:
        raise Dropped(Drop.RESPONSE_BROKEN, str(error)) from None
    if len(content) > most:
        raise Dropped(Drop.TOO_LARGE, f"unpacks to more than {most:,} bytes")
    if not unpacker.eof:
        raise Dropped(Drop.RESPONSE_BROKEN, "its compressed data ends early")
    return content


def retry_after(header: str) -> float | None:
    """Seconds to wait from a ``Retry-After`` header: a number or a date; None if it is neither."""
    header = header.strip()
    if header.isascii() and header.isdigit():
        return float(header[:12])
    try:
        then = email.utils.parsedate_to_datetime(header)
        return max(0.0, then.timestamp() - time.time())
    except (ValueError, TypeError, OverflowError, OSError):
        return None
