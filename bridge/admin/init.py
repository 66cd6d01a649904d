"""Settings with new keys for both sides on one machine: `callback-bridge init`.

A developer starts with the two files. Each file holds only the secrets of its side; the two shared key sets are in both
files. All addresses in the files are on the loopback, with plain http.
"""

import json
from pathlib import Path

from bridge.admin.output import JsonOutput
from bridge.admin.pair import Pair, checked, write_new


def local_settings(
    *,
    receiver_url: str = "http://127.0.0.1:8080",
    service_url: str = "http://127.0.0.1:8081",
    receiver_port: int = 8080,
    service_port: int = 8081,
    handler: str = "payment-prod",
    endpoint: str = "payments",
    task_queue: str = "payment-queue",
    operations: str = "PaymentService/*",
) -> dict[str, str]:
    """The text of `caller.toml` and of `handler.toml` for one machine, by file name, with new keys."""
    pair = Pair.with_new_keys(
        caller="order-prod",
        handler=handler,
        endpoint=endpoint,
        receiver_url=receiver_url,
        service_url=service_url,
        operations=[operations],
    )
    return {
        "caller.toml": pair.settings("caller", port=receiver_port),
        "handler.toml": pair.settings("handler", port=service_port, task_queue=task_queue),
    }


def init(
    folder: Path = Path(),
    *,
    handler: str = "payment-prod",
    endpoint: str = "payments",
    task_queue: str = "payment-queue",
    operations: str = "PaymentService/*",
    as_json: JsonOutput = False,
) -> None:
    """Write `caller.toml` and `handler.toml` with new keys, for both sides on one machine.

    Args:
        folder: Where to write the files. By default the current folder.
        handler: Name and Temporal namespace of the handler's side. The caller's side is `order-prod`.
        endpoint: Name that the caller's workflows pass to `bridge.create_client`.
        task_queue: Task queue on which the handler's workflows run.
        operations: Operations that the caller may start: `Service/operation`, or `Service/*`.
        as_json: Print the names of the files as JSON.
    """
    settings = checked(
        lambda: local_settings(handler=handler, endpoint=endpoint, task_queue=task_queue, operations=operations)
    )
    write_new(folder, settings)
    written = [str(folder / name) for name in settings]
    if as_json:
        print(json.dumps({"written": written}))
    else:
        print(f"written: {', '.join(written)}")
        print("BRIDGE_CONFIG names the file of a side. Both sides listen on this machine only.")
        print("For two teams on several machines: callback-bridge pair make --help")
