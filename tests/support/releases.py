"""What differs between the releases of Temporal's server, as the tests assert it."""

from scripts.environment.server import Server


def names_native_callers(server: Server) -> bool:
    """Whether the callback of a native call names the calling namespace. From 1.31 it is `temporal://system`.

    A native call then belongs to no known caller. It attaches only to an operation that is `attach_across_callers`.
    """
    return server.release < (1, 31)


def keeps_json_metadata(server: Server) -> bool:
    """Whether native Nexus carries metadata of json/plain payloads other than the encoding."""
    return server.release >= (1, 32)
