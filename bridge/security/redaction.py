"""Makes texts of others fit to be shown: in a log line, in a history, on a terminal."""

import re

_SECRET = re.compile("://|%3A%2F%2F|callback=|sig=|sig%3D", re.IGNORECASE)
"""What a callback URL holds: gateways like to quote the request."""
_COMMAND = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What a terminal could obey, or what reverses the reading direction."""


def readable(text: str, limit: int) -> str:
    """At most *limit* characters of *text*, with what a terminal could obey replaced by U+FFFD."""
    return _COMMAND.sub("\ufffd", text[:limit])


def redacted(text: str, limit: int) -> str:
    """As `readable`, without the words that may hold a callback URL."""
    return re.sub(r"\S+", lambda word: "…" if _SECRET.search(word[0]) else word[0], readable(text, limit))
