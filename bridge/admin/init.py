"""Settings with new keys for both sides on one machine: `callback-bridge init`.

A developer starts with the two files. Each file holds only the secrets of its side; the two shared key sets are in both
files. All addresses in the files are on the loopback, with plain http.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from bridge.admin.command import CommandError
from bridge.security.keys import new_key


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The names and addresses in the settings of one machine."""

    receiver_url: str = "http://127.0.0.1:8080"
    """The receiver's URL for the handler."""
    service_url: str = "http://127.0.0.1:8081"
    """The handler service's URL for the caller."""
    receiver_port: int = 8080
    """Port on which the receiver listens."""
    service_port: int = 8081
    """Port on which the handler service listens."""
    caller: str = "order-prod"
    """Name of the caller in the handler's settings, and its Temporal namespace."""
    handler: str = "payment-prod"
    """Name of the handler in the caller's settings, and its Temporal namespace."""
    endpoint: str = "payments"
    """Name that the caller's workflows pass to `bridge.create_client`."""
    task_queue: str = "payment-queue"
    """Task queue on which the handler's workflows run."""
    operations: str = "PaymentService/*"
    """Operations that the caller may start: `Service/operation`, or `Service/*`."""


def new_settings(machine: Machine) -> dict[str, str]:
    """The text of `caller.toml` and of `handler.toml`, by file name, with new keys."""
    start, completion = _key_set(), _key_set()
    caller = f"""\
# Settings of the caller's side, for its worker and its receiver. Keep this file secret.
name = "{machine.caller}"
namespace = "{machine.caller}"
callback_keys = {_key_set()}

[receiver]
url = "{machine.receiver_url}"
port = {machine.receiver_port}
allow_insecure = true            # plain http: on one machine only

[handlers.{machine.handler}]
start_keys = {start}
completion_keys = {completion}

[endpoints.{machine.endpoint}]
url = "{machine.service_url}/c/{machine.caller}"
handler = "{machine.handler}"
networks = ["127.0.0.0/8"]       # non-public networks to which requests may go
allow_insecure = true
"""
    handler = f"""\
# Settings of the handler's side, for its worker and its service. Keep this file secret.
name = "{machine.handler}"
namespace = "{machine.handler}"
task_queue = "{machine.task_queue}"
hash_key = "{new_key()}"

[service]
url = "{machine.service_url}"
port = {machine.service_port}
allow_insecure = true            # plain http: on one machine only

[callers.{machine.caller}]
operations = ["{machine.operations}"]
start_keys = {start}
completion_keys = {completion}
callbacks = [{{ url = "{machine.receiver_url}/callbacks", networks = ["127.0.0.0/8"], allow_insecure = true }}]
"""
    return {"caller.toml": caller, "handler.toml": handler}


def write_settings(folder: Path, settings: dict[str, str]) -> None:
    """Write each text of *settings* into *folder*. Only the owner may read the files.

    Raises:
        FileExistsError: One of the files exists. Nothing is written.
    """
    for name in settings:
        if (folder / name).exists():
            raise FileExistsError(str(folder / name))
    for name, text in settings.items():
        with os.fdopen(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)


def init(
    folder: Path = Path(),
    *,
    task_queue: str = Machine.task_queue,
    operations: str = Machine.operations,
    as_json: Annotated[bool, Parameter(name="--json")] = False,
) -> None:
    """Write `caller.toml` and `handler.toml` with new keys, for both sides on one machine.

    Args:
        folder: Where to write the files. By default the current folder.
        task_queue: Task queue on which the handler's workflows run.
        operations: Operations that the caller may start: `Service/operation`, or `Service/*`.
        as_json: Print the names of the files as JSON.
    """
    try:
        write_settings(folder, new_settings(Machine(task_queue=task_queue, operations=operations)))
    except FileExistsError as error:
        message = f"{error} exists already and is not replaced: its keys may be in use"
        raise CommandError(message) from None
    written = [str(folder / name) for name in ("caller.toml", "handler.toml")]
    if as_json:
        print(json.dumps({"written": written}))
    else:
        print(f"written: {', '.join(written)}")
        print("BRIDGE_CONFIG names the file of a side. Both sides listen on this machine only.")


def _key_set() -> str:
    return f'{{ signing = "k1", keys = {{ k1 = "{new_key()}" }} }}'
