"""A request from a peer, as both services read it: signature, headers, then the body within size and time.

Reading decides which answers are signed. An answer that a changed copy of a valid request can cause must not be
signed, because the signature would also be valid for the original request.
"""

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TypeVar

from aiohttp import ClientPayloadError, HttpVersion11, web
from nexusrpc import HandlerError, HandlerErrorType
from pydantic import SecretStr

from bridge.errors import UntrustedError, bad_request
from bridge.protocol.headers import LINK
from bridge.protocol.payload import MAX_BODY_BYTES
from bridge.security.keys import KeySet, new_key
from bridge.security.signatures import ABSOLUTE_FORM, MessageKind, MessageVerifier, RequestProof, Verified

BODY_TIMEOUT = timedelta(seconds=10)
LIVE = "/livez"
Facts = dict[str, str | int]
FACTS: web.RequestKey[Facts] = web.RequestKey("facts", dict)
"""Fields of the request's line in the access log: ids and labels, never a token or a URL."""
PROOF: web.RequestKey[RequestProof | None] = web.RequestKey("proof", RequestProof)
"""Set while the answer depends on nothing but the signed parts of the request. The answer is then signed."""

_PeerT = TypeVar("_PeerT")


_NO_PEER = MessageVerifier(KeySet(signing="none", keys={"none": SecretStr(new_key())}), public_base="http://localhost")


def known_peer(peers: Mapping[str, _PeerT], name: str, kind: MessageKind, request: web.Request) -> _PeerT:
    """Return the peer *name* of the settings, which is said to have sent *request*.

    Raises:
        UntrustedError: There is no such peer.
    """
    if (peer := peers.get(name)) is None:
        # Do the same work as for a known name, so that timing does not reveal the names in the settings.
        with contextlib.suppress(UntrustedError):
            IncomingMessage(request, kind, _NO_PEER)
        reason = "no such peer in the settings"
        raise UntrustedError(reason)
    return peer


class IncomingMessage:
    """A request of an authenticated peer. If the peer signs, its headers are the signed ones, and no others exist."""

    def __init__(self, request: web.Request, kind: MessageKind, verifier: MessageVerifier | None) -> None:
        """Verify the headers of *request*. *verifier* is None if the peer does not sign.

        Raises:
            UntrustedError: The signature is missing or invalid.
            nexusrpc.HandlerError: BAD_REQUEST, a header is not part of the protocol or can be read in two ways.
        """
        self._request = request
        self._verified: Verified | None = None
        self.headers: Mapping[str, str] = request.headers
        self.links: Sequence[str] = request.headers.getall(LINK, [])
        if verifier is None:
            _refuse_ambiguous_headers(request)
        else:
            self._verified = verifier.verify(
                kind, method=request.method, raw_path=_path_below_mount(request), headers=request.headers
            )
            request[PROOF] = self._verified.proof
            request[FACTS] |= {"bridge.key_id": self._verified.proof.key_id, "bridge.skew_s": self._verified.skew_s}
            self.headers = self._verified.headers
            self.links = [self.headers[LINK]] if LINK in self.headers else []
        if "Content-Encoding" in self.headers:
            message = "Content-Encoding is not supported: send the body uncompressed"
            raise bad_request(message)

    async def body(self) -> bytes:
        """Read the whole body, and compare it with the signed digest.

        An error is answered unsigned, because the body may differ from the signed one.

        Raises:
            nexusrpc.HandlerError: The body is too large or incomplete (400), or too slow (408, REQUEST_TIMEOUT).
            UntrustedError: The body is not the signed one.
        """
        self._request[PROOF] = None
        body = await _read(self._request)
        if self._verified is not None:
            self._verified.check_body(body)
            self._request[PROOF] = self._verified.proof
        return body


def _path_below_mount(request: web.Request) -> str:
    """The request's raw path without the prefix under which our application is mounted.

    The path that a peer signs ends with the result.
    """
    mount = str(request.app.router["livez"].url_for()).removesuffix(LIVE)
    return ABSOLUTE_FORM.sub("", request.raw_path).removeprefix(mount)


def _refuse_ambiguous_headers(request: web.Request) -> None:
    """Refuse repeated and non-ASCII headers of an unsigned request. A verifier refuses them in a signed one."""
    lower = [name.lower() for name in request.headers]
    for name, value in request.headers.items():
        if not value.isascii():
            message = f"header {name.lower()} is not ASCII" if name.isascii() else "a header is not ASCII"
            raise bad_request(message)
    for name in set(lower):
        is_ours = name.startswith(("nexus-", "content-", "bridge-")) and name != LINK.lower()
        if is_ours and lower.count(name) > 1:
            message = f"header {name} is repeated"
            raise bad_request(message)


async def _read(request: web.Request) -> bytes:
    try:
        async with asyncio.timeout(BODY_TIMEOUT.total_seconds()):
            if request.headers.get("Expect", "").lower() == "100-continue" and request.version >= HttpVersion11:
                await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                # aiohttp counts what is written as a part of the answer's body.
                request.writer.output_size = 0
            # The application that ours is mounted in has its own limit, and may have read the body already.
            own = request.clone(client_max_size=MAX_BODY_BYTES) if request.can_read_body else request
            return await own.read()
    except TimeoutError:
        message = "the body did not arrive in time"
        raise HandlerError(message, type=HandlerErrorType.REQUEST_TIMEOUT) from None
    except (ConnectionError, ClientPayloadError):
        # The sender is gone and does not read the answer. It is its fault, therefore the log must not show our error.
        message = "the body broke off"
        raise bad_request(message) from None
    except web.HTTPRequestEntityTooLarge:
        message = f"the body is over {MAX_BODY_BYTES} bytes"
        raise bad_request(message) from None
