"""The ladder of `doctor`: what a side needs, in order. The rungs above one that does not hold are not checked."""

import os
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import TypeVar

from temporalio.api.workflowservice.v1 import GetSystemInfoRequest
from temporalio.client import Client
from temporalio.service import RPCError, RPCStatusCode

from bridge.admin.command import CommandError
from bridge.admin.output import cell, print_list
from bridge.http.peer_check import EchoProbe, Finding, check_peers
from bridge.runtime.settings import CONFIG_VARIABLE, BridgeSettings, SettingsError, load
from bridge.temporal.connection import connect, describe_namespace
from bridge.temporal.pollers import workers_seen
from bridge.temporal.rpc_status import refusal
from bridge.workflow.call import MAX_INPUT_BYTES

_RUNGS = ("settings", "Temporal", "namespace", "limits", "workers")
_REFUSED = frozenset({RPCStatusCode.PERMISSION_DENIED, RPCStatusCode.UNAUTHENTICATED})

SettingsT = TypeVar("SettingsT", bound=BridgeSettings)


async def examine(
    model: type[SettingsT],
    *,
    queues: Callable[[SettingsT], Mapping[str, str | None]],
    probes: Callable[[SettingsT, str | None], Iterable[EchoProbe]],
    as_json: bool,
) -> None:
    """Check a side and its peers, and print what was found.

    Args:
        model: The settings of the side.
        queues: Returns the task queues of the side's workers, with the plugin that they need.
        probes: Returns the echos for the side's peers. Its second argument is the namespace, if it is known.
        as_json: Print JSON.

    Raises:
        CommandError: A rung does not hold.
    """
    findings, settings, client = await _check_side(model, queues)
    if settings is not None:
        namespace = settings.namespace if client is None else client.namespace
        asked = list(probes(settings, namespace))
        findings += await check_peers(asked, clock=lambda: datetime.now(UTC))
        if not asked:
            findings.append(Finding("wrong", "peer", "the settings have no such peer: correct its name"))
    print_list(findings, "state rung found", as_json=as_json)
    if wrong := sum(each.state == "wrong" for each in findings):
        message = f"{wrong} of the checks failed"
        raise CommandError(message)


async def _check_side(
    model: type[SettingsT], queues: Callable[[SettingsT], Mapping[str, str | None]]
) -> tuple[list[Finding], SettingsT | None, Client | None]:
    settings, client, problem = None, None, None
    seen: list[Finding] = []
    try:
        settings = load(model)
        seen.append(Finding("ok", "settings", os.environ.get(CONFIG_VARIABLE) or "variables only"))
        client = await connect(settings)
        system = await client.workflow_service.get_system_info(GetSystemInfoRequest())
        where = client.service_client.config.target_host
        seen.append(Finding("ok", "Temporal", f"{where}, server {system.server_version}"))
        described = await describe_namespace(client)
        kept = described.config.workflow_execution_retention_ttl.ToTimedelta()
        seen.append(
            Finding("ok", "namespace", f"{client.namespace}, keeps closed runs for {kept.total_seconds() / 3600:.0f} h")
        )
        seen.append(_limits(described.namespace_info.limits.blob_size_limit_error))
        polled = []
        for queue, plugin in queues(settings).items():
            problem, last = await workers_seen(client, queue, plugin)
            if problem is not None:
                break
            polled.append(f"{queue} (last seen {cell(last, datetime.now(UTC))})")
        else:
            found = "poll " + ", ".join(polled) if polled else "--task-queue names the task queue to check"
            seen.append(Finding("ok" if polled else "not known", "workers", found))
    except SettingsError as error:
        problem = str(error)
    except RPCError as error:
        cure = ": the credentials of this process need the right to read this" if error.status in _REFUSED else ""
        problem = refusal(error) + cure
    if problem is not None:
        seen.append(Finding("wrong", _RUNGS[len(seen)], problem))
    return [*seen, *(Finding("not checked", each) for each in _RUNGS[len(seen) :])], settings, client


def _limits(largest: int) -> Finding:
    if not largest:
        return Finding("not known", "limits", "this server does not name limit.blobSize.error, 2 MiB by default")
    effect = ": larger inputs are refused, and larger outcomes fail" if largest < MAX_INPUT_BYTES else ""
    return Finding("ok", "limits", f"a value may have {largest} bytes (limit.blobSize.error){effect}")
