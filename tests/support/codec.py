"""A codec that behaves like encryption: the bytes differ every time. A converter that needs type hints."""

import json
import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from temporalio.api.common.v1 import Payload
from temporalio.converter import CompositePayloadConverter, DefaultPayloadConverter, PayloadCodec
from temporalio.converter import JSONPlainPayloadConverter as JSONConverter


class Scrambler(PayloadCodec):
    """XOR with a random nonce. It keeps no secret, but fails in the same cases as a real cipher."""

    async def encode(self, payloads: Sequence[Payload]) -> list[Payload]:
        encoded = []
        for payload in payloads:
            plain, nonce = payload.SerializeToString(), os.urandom(16)
            encoded.append(Payload(metadata={"encoding": b"binary/scrambled", "nonce": nonce}, data=_xor(plain, nonce)))
        return encoded

    async def decode(self, payloads: Sequence[Payload]) -> list[Payload]:
        for payload in payloads:
            if payload.metadata.get("encoding") != b"binary/scrambled":
                message = f"not scrambled: {dict(payload.metadata)}"
                raise ValueError(message)
        return [Payload.FromString(_xor(each.data, each.metadata["nonce"])) for each in payloads]


def _xor(data: bytes, nonce: bytes) -> bytes:
    return bytes(byte ^ nonce[index % len(nonce)] for index, byte in enumerate(data))


class _TaggedJson(JSONConverter):
    """Returns objects for values without a type hint, as converters do that write the type into the JSON."""

    def from_payload(self, payload: Payload, type_hint: type | None = None) -> Any:
        if type_hint is None:
            return json.loads(payload.data, object_hook=lambda fields: SimpleNamespace(**fields))
        return super().from_payload(payload, type_hint)


class Tagged(CompositePayloadConverter):
    def __init__(self) -> None:
        super().__init__(
            *(
                each
                for each in DefaultPayloadConverter.default_encoding_payload_converters
                if not isinstance(each, JSONConverter)
            ),
            _TaggedJson(),
        )
