"""A payload codec that behaves like encryption: the bytes differ every time, and foreign bytes are an error."""

import os
from collections.abc import Sequence

from temporalio.api.common.v1 import Payload
from temporalio.converter import PayloadCodec


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
