"""Makes texts of peers safe to show in a log line, in a history and on a terminal."""

import re

_SECRET = re.compile("(:|%(25)*3A)(/|%(25)*2F){2}|(callback|sig)(=|%(25)*3D)", re.IGNORECASE)
"""Parts of a callback URL, percent-encoded any number of times. Many gateways quote the request in an error."""
_COMMAND = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that control a terminal, change the reading direction or are lone surrogates."""


_LIKE_A_KEY = re.compile(r"(?<![A-Za-z0-9+/=_-])[A-Za-z0-9+=_-][A-Za-z0-9+/=_-]{31,}")
"""A word as long as a key in base64 or hexadecimal form. It is not an absolute path, which an error may name."""
_TASK_TOKEN = re.compile(r"(task_?token)(?:\([^)]*\)?|\W{1,4}(?:b?\"[^\"]*\"?|\[[^\]]*\]?))", re.IGNORECASE)
"""Task tokens as the SDK's core spells them. With a task token an activity can be completed."""


def without_task_tokens(text: str) -> str:
    """*text* of the SDK's core with `…` in place of task tokens."""
    return _TASK_TOKEN.sub(r"\1…", text)


def without_keys(text: str) -> str:
    """*text* with `…` in place of every word that may be a key. A user may have swapped a key and its name."""
    return _LIKE_A_KEY.sub("…", text)


def readable(text: str, limit: int) -> str:
    """At most *limit* characters of *text*, with U+FFFD in place of characters that control a terminal."""
    return _COMMAND.sub("\ufffd", text[:limit])


def one_line(text: str, limit: int) -> str:
    """The result of `readable` with every run of white space replaced by one space."""
    return " ".join(readable(text, limit).split())


def markdown_code(text: str, limit: int = 300) -> str:
    """*text* as a code span of Markdown, in which neither markup nor an address has an effect."""
    return f"`{one_line(text, limit).replace('`', chr(39)) or '-'}`"


def plain(text: str) -> str:
    """Return foreign text as one bounded line, safe for a terminal. URLs are removed, because ours hold tokens."""
    return " ".join(redacted(text, 1000).split())


def redacted(text: str, limit: int) -> str:
    """The result of `readable`, with `…` in place of words that may hold a callback URL."""
    return re.sub(r"\S+", lambda word: "…" if _SECRET.search(word[0]) else word[0], readable(text, limit))
