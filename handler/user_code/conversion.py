"""Conversion between the payloads of the wire and the values of the team's functions.

An input reaches `check`, `workflow_id` or the handler of a sync operation only as an instance of the contract's type.
The data converter alone does not ensure this: for some encodings it returns bytes, None or a message for any type.
Errors name the fields of an input and never quote its values, because histories keep error texts.
"""

import asyncio
import dataclasses
import json
import re
import types
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import Annotated, Any, Literal, Union, get_args, get_origin, is_typeddict

from pydantic import ValidationError
from temporalio.api.common.v1 import Payload
from temporalio.common import RawValue
from temporalio.converter import DataConverter, DefaultPayloadConverter

from bridge.errors import UnavailableError, bad_request
from bridge.runtime.event_log import event_logger

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]")
_MAX_FIELDS = 10
_MAX_ERRORS = 1000
_SMALL_BYTES = 4096

_log = event_logger(__name__)


class Conversion:
    """Converts with the handler's data converter."""

    def __init__(self, data_converter: DataConverter) -> None:
        self._payload_converter = data_converter.payload_converter
        # For codec and external storage only, because the team's own payload converter may not support `RawValue`.
        self._transfer = dataclasses.replace(data_converter, payload_converter_class=DefaultPayloadConverter)
        self._turns = defaultdict[Executor, asyncio.Lock](asyncio.Lock)

    async def open(self, payload: Payload) -> Payload:
        """Return *payload* as it was before the codec encoded it.

        Raises:
            nexusrpc.HandlerError: UNAVAILABLE, the codec or the storage failed; BAD_REQUEST, the payload is a reference
                and no external storage is configured here.
        """
        if payload.external_payloads and self._transfer.external_storage is None:
            message = "the input is a reference to an external storage that this caller does not share with the handler"
            raise bad_request(message)
        with _available("decode"):
            [raw] = await self._transfer.decode([payload], [RawValue])
            opened: Payload = raw.payload
            return opened

    async def read(self, opened: Payload, kind: Any, executor: Executor) -> Any:
        """Return `value`. A large input is converted in a thread of *executor*, one at a time for each executor.

        Some types take 10 ms for each kB, and 2 MB of empty values would block the event loop for many seconds. Several
        conversions at a time would slow the event loop down.

        Raises:
            nexusrpc.HandlerError: UNAVAILABLE, no thread is free; else as `value`.
        """
        if len(opened.data) <= _SMALL_BYTES:
            return self.value(opened, kind)
        async with self._turns[executor]:
            return await asyncio.get_running_loop().run_in_executor(executor, self.value, opened, kind)

    def value(self, opened: Payload, kind: Any) -> Any:
        """Return the input in *opened* as an instance of *kind*, the contract's type. If *kind* is None, any type fits.

        Raises:
            nexusrpc.HandlerError: BAD_REQUEST, the input is not an instance or not readable. The text names the fields.
        """
        try:
            # A raw value is passed on as it is.
            wrong = "" if kind is None or kind is RawValue else _not_unicode(opened)
            [value] = self._payload_converter.from_payloads([opened], None if kind is None else [kind])
            if not wrong and kind is not None and not _accepts(kind, value):
                wrong = f"it is {'null' if value is None else type(value).__name__}"
        except Exception as error:  # noqa: BLE001 - any error of the team's own converter over foreign bytes
            wrong, value = reasons(error), None
        if wrong:
            name = "value of its encoding" if kind is None else getattr(kind, "__name__", kind)
            message = f"the input is not a {name}: {wrong}"
            raise bad_request(message)
        return value

    def payload(self, value: Any) -> Payload:
        """Return *value* as a payload that the codec has not encoded yet. Raises what the payload converter raises."""
        return self._payload_converter.to_payloads([value])[0]

    async def close(self, opened: Payload) -> Payload:
        """Return *opened* as it is sent: encoded by the codec, or a reference to external storage.

        Raises:
            nexusrpc.HandlerError: UNAVAILABLE, the codec or the storage failed.
        """
        with _available("encode"):
            return (await self._transfer.encode([RawValue(opened)]))[0]


@contextmanager
def _available(verb: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # noqa: BLE001 - any error of the team's own codec: its keys may be unavailable
        _log.warning("bridge.codec_failed", extra={"bridge.error": type(error).__name__})
        message = f"the handler cannot {verb} payloads at the moment"
        raise UnavailableError(message) from None


def _accepts(hint: Any, value: object) -> bool:
    """Whether *value* is an instance of *hint*, by its outermost type. True if this cannot be checked."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        # A pydantic validator in the metadata may return another type.
        return _accepts(args[0], value) or any(hasattr(each, "func") for each in args[1:])
    if origin in {Union, types.UnionType}:
        return any(_accepts(each, value) for each in args)
    if origin is Literal:
        return any(value == each for each in args)
    if supertype := getattr(hint, "__supertype__", None):
        return _accepts(supertype, value)
    kind = dict if is_typeddict(hint) else types.NoneType if hint is None else origin or hint
    if isinstance(value, bytes):
        # In Python, bytes are also a Sequence, but no contract means bytes by Sequence.
        return kind in {bytes, object, Any}
    try:
        return isinstance(value, kind) or (kind is float and isinstance(value, int))
    except TypeError:
        return True


def _not_unicode(payload: Payload) -> str:
    """Return the first field with a lone surrogate, which JSON can spell but UTF-8 cannot; else an empty text."""
    if not payload.metadata.get("encoding", b"").startswith(b"json/") or not _SURROGATE.search(payload.data):
        return ""
    field = next(_surrogates(json.loads(payload.data), ()), None)
    return "" if field is None else f"{_path(field)} (not valid Unicode)"


def _surrogates(value: Any, path: tuple[str | int, ...]) -> Iterator[tuple[str | int, ...]]:
    if isinstance(value, str) and any("\ud800" <= each <= "\udfff" for each in value):
        yield path
    for key, each in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from _surrogates(key, (*path, key))
        yield from _surrogates(each, (*path, key))


def reasons(error: BaseException) -> str:
    """Return the fields that *error* names, as pydantic or the SDK's converter do, with the kind of each error."""
    path: list[str | int] = []
    while True:
        if isinstance(error, ValidationError) and (count := error.error_count()) > _MAX_ERRORS:
            # pydantic makes an object of each error.
            return f"{count} errors"
        if isinstance(error, ValidationError):
            found = error.errors(include_url=False, include_context=False, include_input=False)[:_MAX_FIELDS]
            return ", ".join(f"{_path((*path, *each['loc']))} ({each['type']})" for each in found)
        text = str(error)
        if step := re.match(r"Failed converting (?:field (\w+) on |value for key |.* index (\d+)$)", text, re.DOTALL):
            path.append(step[1] or step[2] or "")
        if missing := re.search(r"__init__\(\) missing \d+ required .*arguments?: (.*)$", text):
            names = re.findall(r"'(\w+)'", missing[1])[:_MAX_FIELDS]
            return ", ".join(f"{_path((*path, name))} (missing)" for name in names)
        if error.__cause__ is None:
            kind = type(error).__name__
            return f"{_path(tuple(path))} ({kind})" if path else kind
        error = error.__cause__


def _path(location: tuple[str | int, ...]) -> str:
    # A key of a mapping is part of the input. Show only parts that can be a field's name or an index.
    parts = (str(each) if re.fullmatch(r"[A-Za-z_]\w{0,63}|\d{1,9}", str(each)) else "…" for each in location)
    return ".".join(parts) or "the whole"
