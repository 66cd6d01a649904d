"""The one HTTP session of a process: kept alive, bounded, guarded, without redirects.

tenacity repeats a request that never got through, within a second; everything slower is left to Temporal's retries,
where people can see it. No exception of aiohttp leaves this module, because their texts may hold a signed URL.
"""

import asyncio
import io
import ipaddress
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Self

import aiohttp
from multidict import CIMultiDict, CIMultiDictProxy
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, stop_after_delay, wait_random
from yarl import URL

from bridge.errors import DestinationRefusedError, RemoteProtocolError, TransportError
from bridge.security.egress import ConnectGuard, RefusedAddressError

REQUEST_TIMEOUT = timedelta(seconds=10)
CONNECT_TIMEOUT = timedelta(seconds=3)
_CONNECTIONS_PER_HOST = 100
_LARGE = 1024 * 1024

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, kw_only=True)
class HttpAnswer:
    """A whole answer, whatever its status."""

    status: int
    headers: CIMultiDictProxy[str]
    body: bytes


class _NotConnectedError(Exception):
    """The request cannot have been acted upon, or may safely be repeated at once."""


class HttpClient:
    """Sends messages. Use as an async context manager, or close it."""

    def __init__(self, *, user_agent: str, connections_per_host: int = _CONNECTIONS_PER_HOST) -> None:
        self._user_agent = user_agent
        self._connections_per_host = connections_per_host
        self._guard = ConnectGuard()
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        if self._session is not None:
            session, self._session = self._session, None
            await session.close()

    async def post(
        self,
        url: str,
        headers: CIMultiDict[str],
        body: bytes,
        *,
        networks: tuple[Network, ...] = (),
        timeout: timedelta = REQUEST_TIMEOUT,  # noqa: ASYNC109 - handed to aiohttp, which bounds each phase
        max_answer_bytes: int = 16384,
    ) -> HttpAnswer:
        """POST *body* to exactly *url* and read the answer.

        Args:
            url: Sent as spelled, because it may be signed.
            headers: Sent as given; no `Content-Type` is added.
            networks: Non-public networks that the host may resolve to.
            timeout: For everything, repeats included.
            max_answer_bytes: A longer answer is an error.

        Raises:
            TransportError: No answer, or not in time.
            DestinationRefusedError: The host resolves to addresses that are not allowed.
            RemoteProtocolError: The answer is too long.
        """
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(_NotConnectedError),
            stop=stop_after_attempt(3) | stop_after_delay(1),
            wait=wait_random(0.05, 0.3),
            reraise=True,
        )
        try:
            async with asyncio.timeout(timeout.total_seconds()):
                with self._guard.allowing(networks):
                    return await retrying(self._post_once, url, headers, body, max_answer_bytes)
        except TimeoutError:
            message = "no answer in time"
            raise TransportError(message) from None
        except _NotConnectedError as error:
            raise TransportError(str(error)) from None

    async def _post_once(self, url: str, headers: CIMultiDict[str], body: bytes, max_answer_bytes: int) -> HttpAnswer:
        try:
            async with self._open().post(
                URL(url, encoded=True),
                # aiohttp writes large bytes in one piece, and warns of it; a stream it writes in turns.
                data=io.BytesIO(body) if len(body) > _LARGE else body,
                headers=headers,
                skip_auto_headers=("Content-Type",),
                allow_redirects=False,
            ) as response:
                answer = await _read(response, max_answer_bytes)
                return HttpAnswer(status=response.status, headers=response.headers, body=answer)
        except aiohttp.ClientConnectorError as error:
            # Of several addresses one may be refused and another be down for a while: then it is no refusal.
            if RefusedAddressError.TEXT in str(error.os_error) and not self._guard.has_opened:
                message = "destination address refused"
                raise DestinationRefusedError(message) from None
            message = f"cannot connect: {type(error.os_error).__name__}"
            raise _NotConnectedError(message) from None
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
            # Often a kept-alive connection that the peer closed as we wrote. Repeating is safe: every message of the
            # protocol carries the id by which it is deduplicated.
            message = f"connection lost: {type(error).__name__}"
            raise _NotConnectedError(message) from None
        except (aiohttp.ClientError, ValueError) as error:
            message = type(error).__name__
            raise TransportError(message) from None

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    limit_per_host=self._connections_per_host, socket_factory=self._guard.open_socket
                ),
                # The whole is bounded by each call: a start may be held for longer than others may take.
                timeout=aiohttp.ClientTimeout(total=None, connect=CONNECT_TIMEOUT.total_seconds()),
                # One host's cookie must not ride on another caller's callback; a proxy variable must not bypass the
                # guard; a compressed answer could be larger than it looks.
                cookie_jar=aiohttp.DummyCookieJar(),
                trust_env=False,
                auto_decompress=False,
                headers={"User-Agent": self._user_agent, "Accept-Encoding": "identity"},
                requote_redirect_url=False,
            )
        return self._session


async def _read(response: aiohttp.ClientResponse, limit: int) -> bytes:
    chunks = bytearray()
    async for chunk in response.content.iter_chunked(65536):
        chunks += chunk
        if len(chunks) > limit:
            response.close()
            message = "answer too long"
            raise RemoteProtocolError(message)
    return bytes(chunks)
