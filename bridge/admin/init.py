"""Settings with new keys for both sides on one machine: `callback-bridge init`.

A developer starts with the two files. Each file holds only the secrets of its side; the two shared key sets are in both
files. All addresses in the files are on the loopback, with plain http.
"""

import json
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter, validators

from bridge.admin.output import JsonOutput
from bridge.admin.pair import Pair, checked, write_new

Port = Annotated[int, Parameter(validator=validators.Number(gte=1, lte=65535))]


def local_settings(
    *,
    receiver_url: str = "http://127.0.0.1:8080",
    service_url: str = "http://127.0.0.1:8081",
    receiver_port: int = 8080,
    service_port: int = 8081,
    caller: str = "order-prod",
    handler: str = "payment-prod",
    endpoint: str = "payments",
    task_queue: str = "payment-queue",
    operations: str = "PaymentService/*",
) -> dict[str, str]:
    """The text of `caller.toml` and of `handler.toml` for one machine, by file name, with new keys."""
    pair = Pair.with_new_keys(
        caller=caller,
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
    caller: str = "order-prod",
    handler: str = "payment-prod",
    endpoint: str = "payments",
    task_queue: str = "payment-queue",
    operations: str = "PaymentService/*",
    receiver_port: Port = 8080,
    service_port: Port = 8081,
    as_json: JsonOutput = False,
) -> None:
    """Write `caller.toml` and `handler.toml` with new keys, for both sides on one machine.

    Args:
        folder: Where to write the files. By default the current folder.
        caller: Name and Temporal namespace of the caller's side.
        handler: Name and Temporal namespace of the handler's side.
        endpoint: Name that the caller's workflows pass to `bridge.create_client`.
        task_queue: Task queue on which the handler's workflows run.
        operations: Operations that the caller may start: `Service/operation`, or `Service/*`.
        receiver_port: Port on which the receiver listens.
        service_port: Port on which the handler service listens.
        as_json: Print the names of the files as JSON.
    """
    settings = checked(
        lambda: local_settings(
            receiver_url=f"http://127.0.0.1:{receiver_port}",
            service_url=f"http://127.0.0.1:{service_port}",
            receiver_port=receiver_port,
            service_port=service_port,
            caller=caller,
            handler=handler,
            endpoint=endpoint,
            task_queue=task_queue,
            operations=operations,
        )
    )
    write_new(folder, settings)
    written = [str(folder / name) for name in settings]
    if as_json:
        print(json.dumps({"written": written}))
    else:
        print(f"written: {', '.join(written)}")
        print("BRIDGE_CONFIG names the file of a side. Both sides listen on this machine only.")
        print("For two teams on several machines: callback-bridge pair make --help")
