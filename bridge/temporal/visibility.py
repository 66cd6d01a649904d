"""Values in visibility queries. Pure, and workflow-safe."""


def quoted(text: str) -> str:
    """Return *text* as a string of a visibility query.

    Raises:
        ValueError: No query can contain *text*.
    """
    # Server 1.29.1 finds no run by a name with one of these characters, with any form of escape.
    if not text.isprintable() or '"' in text or "\\" in text:
        characters = "a double quote, a backslash or a control character"
        message = f"no visibility query finds a name with {characters}: {text!r}"
        raise ValueError(message)
    return "'" + text.replace("'", "''") + "'"
