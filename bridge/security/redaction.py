"""Makes texts of others fit to be shown: in a log line, in a history, on a terminal."""

import re

_SECRET = re.compile(r"\S*(?:://|%3A%2F%2F|callback=|sig=|sig%3D)\S*", re.IGNORECASE)
"""What may be a callback URL: gateways like to quote the request."""
_COMMAND = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What a terminal could obey, or what reverses the reading direction."""


def readable(text: str, limit: int) -> str:
    """At most *limit* characters of *text*, with what a terminal could obey replaced by U+FFFD."""
    return _COMMAND.sub("\ufffd", text[:limit])


def redacted(text: str, limit: int) -> str:
    """As `readable`, with everything cut out that may hold a callback URL."""
    return _SECRET.sub("…", readable(text, limit))
