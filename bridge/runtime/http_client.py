"""The HTTP session of a process: it keeps connections alive, limits and guards them, and follows no redirects.

tenacity repeats a request that did not reach the peer, within one second. Later repeats are Temporal's retries, which
people can see. No exception of aiohttp leaves this module, because its text may hold a signed URL.
"""

import asyncio
import io
from datetime import timedelta
from typing import NamedTuple

import aiohttp
from multidict import CIMultiDict, CIMultiDictProxy
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, stop_after_delay, wait_random
from yarl import URL

from bridge.errors import DestinationRefusedError, RemoteProtocolError, TransportError
from bridge.security.egress import ConnectGuard, Network, RefusedAddressError

REQUEST_TIMEOUT = timedelta(seconds=10)
CONNECT_TIMEOUT = timedelta(seconds=3)
_CONNECTIONS_PER_HOST = 100
_LARGE = 1024 * 1024


class HttpAnswer(NamedTuple):
    """A whole answer, with any status."""

    status: int
    """HTTP status."""
    headers: CIMultiDictProxy[str]
    """All headers, as received."""
    body: bytes
    """As received."""


class _NotConnectedError(Exception):
    """The peer has not acted on the request, or the request may safely be repeated at once."""


class HttpClient:
    """Sends messages. Close it with `aclose`."""

    def __init__(self, *, user_agent: str, connections_per_host: int = _CONNECTIONS_PER_HOST) -> None:
        self._user_agent = user_agent
        self._connections_per_host = connections_per_host
        self._guard = ConnectGuard()
        self._session: aiohttp.ClientSession | None = None

    async def aclose(self) -> None:
        """Close all connections. A later `post` opens new ones."""
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
        timeout: timedelta = REQUEST_TIMEOUT,  # noqa: ASYNC109 - it covers the repeats inside this method
        max_answer_bytes: int,
    ) -> HttpAnswer:
        """POST *body* to exactly *url* and read the answer.

        Args:
            url: Sent as spelled, because it may be signed.
            headers: Sent as given; no `Content-Type` is added.
            body: Sent as given.
            networks: Non-public networks that the host may resolve to.
            timeout: For the request and all its repeats together.
            max_answer_bytes: Largest body of an answer. A longer answer is an error.

        Raises:
            TransportError: No answer arrived in time.
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
                # aiohttp writes large bytes in one piece and warns about it. It writes a stream in parts.
                data=io.BytesIO(body) if len(body) > _LARGE else body,
                headers=headers,
                skip_auto_headers=("Content-Type",),
                allow_redirects=False,
            ) as response:
                answer = await _read(response, max_answer_bytes)
                return HttpAnswer(status=response.status, headers=response.headers, body=answer)
        except aiohttp.ClientConnectorError as error:
            # If one address was allowed, the destination is not refused: that address may only be down for a while.
            if RefusedAddressError.TEXT in str(error.os_error) and not self._guard.has_opened:
                message = (
                    "destination address refused: a network that is not public has to be in `networks` of its entry"
                )
                raise DestinationRefusedError(message) from None
            message = f"cannot connect: {type(error.os_error).__name__}"
            raise _NotConnectedError(message) from None
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
            # Usually the peer closed a kept-alive connection during the write. A repeat is safe, because every message
            # of the protocol carries the id by which it is deduplicated.
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
                # `post` limits the total time, because a held start may take longer than other requests.
                timeout=aiohttp.ClientTimeout(total=None, connect=CONNECT_TIMEOUT.total_seconds()),
                # A cookie of one host must not be sent with another caller's callback. A proxy from the environment
                # would bypass the guard. A compressed answer could be larger than the limit.
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
