"""Packs tokens for records that people read: memos, signals and heartbeat details.

UI and CLI then show no token and no callback URL that could be copied by accident. Packing is not encryption: every
reader of the record can unpack them. A payload codec encrypts the whole record. Only the standard library is imported,
because workflow code imports this module.
"""

import base64
import json
import zlib
from typing import Any


def packed(value: Any) -> str:
    """Return *value*, which is made of JSON values, as text without readable parts."""
    return base64.urlsafe_b64encode(zlib.compress(json.dumps(value).encode())).decode()


def unpacked(text: str) -> Any:
    """Return the value that `packed` made *text* from.

    Raises:
        ValueError: *text* was not made by `packed`.
    """
    try:
        return json.loads(zlib.decompress(base64.urlsafe_b64decode(text)))
    except (zlib.error, RecursionError):
        message = "not a packed value"
        raise ValueError(message) from None
