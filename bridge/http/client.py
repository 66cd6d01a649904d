"""The HTTP client of a process: it keeps connections alive, limits and guards them, and follows no redirects.

Destinations share nothing: each has its own connections, places for requests, address guard and name look-ups. A
destination that is slow therefore delays only its own requests, and a connection that was opened under the networks of
one entry of the settings serves no other entry.

tenacity repeats a request that did not reach the peer, within one second. Later repeats are Temporal's retries, which
people can see. No exception of aiohttp leaves this module, because its text may hold a signed URL.
"""

import asyncio
import io
import random
import socket
import ssl
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import NamedTuple

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from multidict import CIMultiDict, CIMultiDictProxy
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, stop_after_delay, wait_random
from yarl import URL

import bridge
from bridge.errors import DestinationBusyError, DestinationRefusedError, RemoteProtocolError, TransportError
from bridge.http.route import Route
from bridge.security.egress import ConnectGuard, RefusedAddressError

REQUEST_TIMEOUT = timedelta(seconds=10)
CONNECT_TIMEOUT = timedelta(seconds=3)
"""Includes the look-up of the name."""
REQUESTS_PER_DESTINATION = 20
"""Maximum number of requests in flight to one peer at one scheme, host and port."""
PATIENCE = timedelta(seconds=1)
"""Maximum wait for a busy destination. A healthy destination is free again within milliseconds."""
_LARGE_BODY_BYTES = 1024 * 1024
_MAX_ANSWER_FIELD = 16 * 1024


class HttpAnswer(NamedTuple):
    """A whole answer, with any status."""

    status: int
    """HTTP status."""
    headers: CIMultiDictProxy[str]
    """All headers, as received."""
    body: bytes
    """The body, as received."""


class _NotConnectedError(TransportError):
    """The peer has not acted on the request, or the request may safely be repeated at once."""


class HttpClient:
    """Sends messages. Close it with `aclose`."""

    def __init__(self, *, requests_per_destination: int = REQUESTS_PER_DESTINATION) -> None:
        self._limit = requests_per_destination
        # The settings bound the number of entries: every URL is below one of their base URLs.
        self._destinations: dict[tuple[str, URL, Route], _Destination] = {}

    async def aclose(self) -> None:
        """Close all connections. A later `post` opens new ones."""
        destinations, self._destinations = self._destinations, {}
        for each in destinations.values():
            await each.session.close()

    def is_half_full(self, url: str, route: Route, *, peer: str) -> bool:
        """Whether half of the places for requests to *peer* at the destination of *url* are taken."""
        return self._destination(URL(url, encoded=True), route, peer).is_half_full

    async def post(
        self,
        url: str,
        headers: CIMultiDict[str],
        body: bytes,
        *,
        peer: str,
        route: Route = Route(),  # noqa: B008 - frozen
        context: ssl.SSLContext | None = None,
        patience: timedelta = PATIENCE,
        timeout: timedelta = REQUEST_TIMEOUT,  # noqa: ASYNC109 - it covers the repeats inside this method
        max_answer_bytes: int,
    ) -> HttpAnswer:
        """POST *body* to exactly *url* and read the answer.

        Args:
            url: Sent as spelled, because it may be signed.
            headers: Sent as given; no `Content-Type` is added.
            body: Sent as given.
            peer: Whose places are taken. Several peers may be behind one gateway.
            route: The way to the destination.
            context: Made of the files of `route.tls`; None if the route has none.
            patience: Maximum wait for a place, if the maximum number of requests is in flight to the destination.
            timeout: For the wait, the request and all its repeats together.
            max_answer_bytes: Largest body of an answer. A longer answer is an error.

        Raises:
            DestinationBusyError: No place became free.
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
                target = URL(url, encoded=True)
                destination = self._destination(target, route, peer)
                async with destination.place(patience):
                    return await retrying(destination.post, target, headers, body, context, max_answer_bytes)
        except TimeoutError:
            message = "no answer in time"
            raise TransportError(message) from None
        except ValueError:
            message = "the URL or a header cannot be sent"
            raise TransportError(message) from None

    def _destination(self, url: URL, route: Route, peer: str) -> "_Destination":
        key = peer, url.origin(), route
        if (found := self._destinations.get(key)) is None:
            found = self._destinations[key] = _Destination(route, limit=self._limit)
        return found


class _Destination:
    """One peer at one scheme, host and port, as one entry of the settings allows it."""

    def __init__(self, route: Route, *, limit: int) -> None:
        self.in_flight = 0
        self._limit = limit
        self._places = asyncio.Semaphore(limit)
        self._is_stuck = False
        self._guard = ConnectGuard(route.networks)
        self._proxy = route.proxy
        self.session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, resolver=_Resolver(), socket_factory=self._guard.open_socket),
            # `HttpClient.post` limits the total time, because a held start may take longer than other requests.
            timeout=aiohttp.ClientTimeout(total=None, connect=CONNECT_TIMEOUT.total_seconds()),
            # A cookie of one caller must not be sent with another caller's callback. A proxy from the environment
            # would bypass the guard. A compressed answer could be larger than the limit.
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            auto_decompress=False,
            headers={"User-Agent": f"callback-bridge/{bridge.__version__}", "Accept-Encoding": "identity"},
            requote_redirect_url=False,
            # A proxy may add a long header, which is neither signed nor read.
            max_field_size=_MAX_ANSWER_FIELD,
        )

    @property
    def is_half_full(self) -> bool:
        """Whether half of the places are taken."""
        return self.in_flight * 2 >= self._limit

    @asynccontextmanager
    async def place(self, patience: timedelta) -> AsyncIterator[None]:
        """Take a place for one request.

        Once a wait was in vain, no request waits until an answer comes and leaves half of the places.

        Raises:
            DestinationBusyError: No place became free within *patience*.
        """
        try:
            async with asyncio.timeout(0 if self._is_stuck else patience.total_seconds()):
                await self._places.acquire()
        except TimeoutError:
            self._is_stuck = self._is_stuck or patience > timedelta(0)
            message = "too many requests in flight to the destination"
            error = DestinationBusyError(message)
            if self._is_stuck:
                # A place becomes free when a request times out. Requests that come back sooner are work for nothing.
                error.retry_after = REQUEST_TIMEOUT * (0.5 + random.random())  # noqa: S311 - spreads load
            raise error from None
        self.in_flight += 1
        has_answered = False
        try:
            yield
            has_answered = True
        finally:
            self.in_flight -= 1
            # A slow destination frees a place now and then, and one that hangs frees all when its requests time out.
            # Requests that wait for it would hold slots of the worker.
            self._is_stuck = self._is_stuck and (self.is_half_full or not has_answered)
            self._places.release()

    async def post(
        self, url: URL, headers: CIMultiDict[str], body: bytes, context: ssl.SSLContext | None, max_answer_bytes: int
    ) -> HttpAnswer:
        """Make one attempt. A connection that was opened with another *context* is not used."""
        opened = self._guard.opened
        try:
            async with self.session.post(
                url,
                # aiohttp writes large bytes in one piece and warns about it. It writes a stream in parts.
                data=io.BytesIO(body) if len(body) > _LARGE_BODY_BYTES else body,
                headers=headers,
                skip_auto_headers=("Content-Type",),
                allow_redirects=False,
                ssl=context or True,
                proxy=self._proxy,
            ) as response:
                answer_body = await _read(response, max_answer_bytes)
                return HttpAnswer(status=response.status, headers=response.headers, body=answer_body)
        except aiohttp.ClientConnectorError as error:
            # If one address was allowed, the destination is not refused: that address may only be down for a while.
            if isinstance(error.os_error, RefusedAddressError) and self._guard.opened == opened:
                message = (
                    "destination address refused: a network that is not public has to be in `networks` of its entry"
                )
                raise DestinationRefusedError(message) from None
            proxy = " to the egress proxy" if isinstance(error, aiohttp.ClientProxyConnectionError) else ""
            layer = "address" if isinstance(error, aiohttp.ClientConnectorDNSError) else "connection"
            layer = "TLS" if isinstance(error, aiohttp.ClientSSLError) else layer
            message = f"cannot connect{proxy}: {_reason(error.os_error)}"
            raise _NotConnectedError(message, layer=layer) from None
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
            # Usually the peer closed a kept-alive connection during the write. A repeat is safe, because every message
            # of the protocol carries the id by which it is deduplicated.
            message = f"connection lost: {_reason(error)}"
            raise _NotConnectedError(message, layer="connection") from None
        except aiohttp.ClientHttpProxyError as error:
            message = f"the egress proxy answered {error.status}"
            raise TransportError(message, layer="connection") from None
        except aiohttp.ClientError as error:
            message = type(error).__name__
            layer = "connection" if isinstance(error, aiohttp.ServerTimeoutError) else "signed answer"
            raise TransportError(message, layer=layer) from None


def _reason(error: BaseException) -> str:
    """Why a connection failed, without the text of *error*: it may hold a signed URL."""
    match error if isinstance(error, ssl.SSLError) else error.__cause__:
        case ssl.SSLCertVerificationError(verify_message=found):
            return f"the certificate is not accepted ({found}): its authority has to be in tls.ca_file of its entry"
        case ssl.SSLError(reason=found):
            return f"TLS failed: {found}"
        case _:
            return type(error).__name__


class _Resolver(AbstractResolver):
    """Looks a name up in a thread of its own: a name server that hangs must not fill the event loop's thread pool.

    aiohttp runs one look-up of a name at a time, also if a request has stopped waiting for it.
    """

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Return the addresses of *host*. Raises OSError if the look-up fails."""
        thread, loop = ThreadPoolExecutor(1), asyncio.get_running_loop()
        try:
            found = await loop.run_in_executor(
                thread, lambda: socket.getaddrinfo(host, port, family=family, type=socket.SOCK_STREAM)
            )
        finally:
            thread.shutdown(wait=False)
        return [
            ResolveResult(
                hostname=host, host=str(address[0]), port=port, family=kind, proto=protocol, flags=socket.AI_NUMERICHOST
            )
            for kind, _, protocol, _, address in found
        ]

    async def close(self) -> None:
        """Do nothing: a look-up that still runs ends by itself."""


async def _read(response: aiohttp.ClientResponse, limit: int) -> bytes:
    chunks = bytearray()
    async for chunk in response.content.iter_chunked(65536):
        chunks += chunk
        if len(chunks) > limit:
            response.close()
            message = "answer too long"
            raise RemoteProtocolError(message)
    return bytes(chunks)
