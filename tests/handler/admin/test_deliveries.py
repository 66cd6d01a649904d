"""The deliveries as an operator sees them: which are listed, which can be run again, and what is never shown."""

import asyncio
import json
import subprocess
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from aiohttp import web
from temporalio.client import Client, WorkflowHandle
from temporalio.service import RPCError

from bridge.admin.output import details, table, to_json
from bridge.security.redaction import plain
from handler.delivery.records import MEMO_KEY, CallMemo, Delivery, packed_reply
from handler.delivery.workflow import DELIVERY_WORKFLOW
from handler.reports.deliveries import (
    COLUMNS,
    Deliveries,
    DeliveryDetails,
    DeliveryError,
    DeliveryReport,
    DeliveryState,
)
from scripts.environment.server import Server
from scripts.environment.stack import ROOT
from tests.support.callers import CallingWorkflow, CallPlan
from tests.support.codec import Scrambler
from tests.support.commands import run
from tests.support.helpers import CALLER, HANDLER, assert_eventually
from tests.support.targets import Ask, Reply
from tests.support.world import World, running_world, with_codec

LONG = CallPlan(first_lease=600)
REFUSED = "bridge.CompletionRefused: the receiver refused the completion"
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


async def handed_over(world: World, status: int, text: str = "") -> tuple[WorkflowHandle[CallingWorkflow, Reply], str]:
    """A call whose receiver answers *status*, and the id of its delivery."""

    async def before(request: web.Request) -> web.StreamResponse:
        return world.signed_response(request, status, {"Retry-After": "3"} if status == 503 else {})

    world.receiver.before = before
    ask = Ask(key=world.key(), text=text)
    handle = await world.call(ask, LONG)
    target = await world.until_started(ask)
    await target.result()
    described = await target.describe()
    delivery_id = f"bridge-delivery-{CALLER}:{(await described.memo_value('bridge'))['request_id']}-{described.run_id}"

    async def started() -> None:
        try:
            await world.handler_client.get_workflow_handle(delivery_id).describe()
        except RPCError as error:
            raise AssertionError from error

    await assert_eventually(started)
    return handle, delivery_id


async def until_listed(deliveries: Deliveries, delivery_id: str, state: DeliveryState, **facts: Any) -> DeliveryDetails:
    """Wait until it is listed with *state*, once, and described with *facts*."""

    async def check() -> DeliveryDetails:
        listed = [each for each in await deliveries.read_all([state]) if each.id == delivery_id]
        assert len(listed) == 1, "not listed"
        report = await deliveries.read(delivery_id)
        assert report.run_id == listed[0].run_id
        assert {name: getattr(report, name) for name in facts} == facts
        return report

    return await assert_eventually(check)


async def console(*arguments: str, server: Server, **environment: str) -> "subprocess.CompletedProcess[str]":
    """`callback-bridge deliveries …` as a user runs it, without settings."""
    named = {"TEMPORAL_ADDRESS": server.address, "TEMPORAL_NAMESPACE": HANDLER, **environment}
    return await asyncio.to_thread(run, "deliveries", *arguments, cwd=ROOT, **named)


async def test_a_running_delivery_is_listed_with_its_attempts_and_next_try(world: World) -> None:
    """An operator sees whether a delivery still runs, what its last error was, and when the next attempt begins."""
    handle, delivery_id = await handed_over(world, 503)
    deliveries = Deliveries(client=world.handler_client)

    async def between_attempts() -> DeliveryDetails:
        report = await until_listed(deliveries, delivery_id, DeliveryState.RUNNING)
        assert report.next_try is not None
        return report

    report = await assert_eventually(between_attempts)
    assert (report.attempts or 0) >= 1
    assert report.last_error == "bridge.ReceiverNotReady: the receiver is not ready"
    assert report.next_try is not None
    assert report.closed is None
    assert report.caller == CALLER
    assert delivery_id == f"bridge-delivery-{CALLER}:{report.request_id}-{report.target_run_id}"
    assert report.operation == "ProbeService/probe"
    assert (report.caller_namespace, report.caller_workflow_id) == (CALLER, handle.id)
    with pytest.raises(DeliveryError, match="still running"):
        await deliveries.redeliver(delivery_id)
    world.receiver.before = None
    await handle.result()
    await until_listed(deliveries, delivery_id, DeliveryState.DELIVERED, last_error=None, next_try=None)


async def test_a_refused_delivery_stays_listed_until_it_is_run_again(world: World) -> None:
    """After the receiver is repaired, the same delivery completes the waiting call."""
    handle, delivery_id = await handed_over(world, 400, text="late but whole")
    deliveries = Deliveries(client=world.handler_client)
    refused = await until_listed(deliveries, delivery_id, DeliveryState.FAILED, last_error=REFUSED)
    world.receiver.before = None
    run_id = await deliveries.redeliver(delivery_id)
    assert run_id != refused.run_id
    assert await handle.result() == Reply("late but whole")
    delivered = await until_listed(deliveries, delivery_id, DeliveryState.DELIVERED, run_id=run_id, last_error=None)
    assert delivered.request_id == refused.request_id
    # The first run of the delivery workflow stays failed; the delivery itself is delivered.
    assert delivery_id not in [each.id for each in await deliveries.read_all([DeliveryState.FAILED])]
    with pytest.raises(DeliveryError, match="already delivered"):
        await deliveries.redeliver(delivery_id)


async def test_a_delivery_refused_again_can_be_run_again(world: World) -> None:
    """An operator may repeat this. The delivery is listed once."""
    handle, delivery_id = await handed_over(world, 400)
    deliveries = Deliveries(client=world.handler_client)
    await until_listed(deliveries, delivery_id, DeliveryState.FAILED)
    for _ in range(2):
        run_id = await deliveries.redeliver(delivery_id)
        await until_listed(deliveries, delivery_id, DeliveryState.FAILED, run_id=run_id, last_error=REFUSED)
    await handle.terminate()


async def test_a_terminated_delivery_counts_as_failed(world: World) -> None:
    """The completion is not delivered. The delivery therefore stays listed, with the reason."""
    handle, delivery_id = await handed_over(world, 503)
    deliveries = Deliveries(client=world.handler_client)

    async def tried() -> None:
        assert (await deliveries.read(delivery_id)).attempts

    await assert_eventually(tried)
    await world.handler_client.get_workflow_handle(delivery_id).terminate(reason="see\nhttp://x/?sig=1")
    report = await until_listed(deliveries, delivery_id, DeliveryState.FAILED)
    assert (report.last_error or "").startswith("terminated by ")
    assert (report.last_error or "").endswith(": see …")
    assert report.next_try is None
    world.receiver.before = None
    await deliveries.redeliver(delivery_id)
    assert await handle.result() == Reply("")


async def test_payloads_are_passed_on_unread(server: Server) -> None:
    """A client without the codec cannot read a delivery, but can run it again."""
    converters = (with_codec(Scrambler()), with_codec(Scrambler()))
    async with running_world(server, converters=converters) as world:
        handle, delivery_id = await handed_over(world, 400, text="scrambled")
        report = await until_listed(Deliveries(client=world.handler_client), delivery_id, DeliveryState.FAILED)
        assert report.caller == CALLER
        assert report.caller_workflow_id == handle.id
        strangers = Deliveries(client=await Client.connect(server.address, namespace=HANDLER))
        unread = await until_listed(strangers, delivery_id, DeliveryState.FAILED, last_error=REFUSED)
        assert unread.caller is None
        world.receiver.before = None
        await strangers.redeliver(delivery_id)
        assert await handle.result() == Reply("scrambled")


async def test_a_delivery_that_no_worker_has_taken_up_can_be_shown_and_not_repeated(world: World) -> None:
    """Its task queue has no worker. After it is stopped, it has no workflow task to reset to."""
    call = CallMemo(
        caller=CALLER,
        request_id=world.key(),
        input_hash="",
        service="S",
        operation="o",
        reply=packed_reply(operation_token="t", callback_url="http://x/?sig=1"),
        deadline_ms=0,
    )
    waiting = Delivery(call=call, workflow_id="target", run_id="run", start_time_ms=0)
    handle = await world.handler_client.start_workflow(
        DELIVERY_WORKFLOW,
        waiting,
        id=waiting.key,
        task_queue=f"unserved-{world.id}",
        memo={MEMO_KEY: waiting.memo},
    )
    deliveries = Deliveries(client=world.handler_client)
    report = await deliveries.read(handle.id)
    assert (report.state, report.attempts, report.next_try) == (DeliveryState.RUNNING, 0, None)
    assert (report.request_id, report.operation, report.target_workflow_id) == (call.request_id, "S/o", "target")
    assert report.caller_workflow_id is None
    await handle.terminate()
    with pytest.raises(DeliveryError, match="cannot be reset"):
        await deliveries.redeliver(handle.id)


async def test_only_deliveries_are_known(world: World) -> None:
    """Neither an unused id nor the id of another workflow names a delivery."""
    ask = Ask(key=world.key())
    await (await world.call(ask)).result()
    deliveries = Deliveries(client=world.handler_client)
    for each in ("unknown-id", f"probe-{ask.key}"):
        with pytest.raises(DeliveryError, match=f"no delivery {each} in namespace {HANDLER}"):
            await deliveries.read(each)
        with pytest.raises(DeliveryError, match=f"no delivery {each}"):
            await deliveries.redeliver(each)


async def test_the_command_lists_shows_and_redelivers(world: World, server: Server) -> None:
    """The command needs only a connection. Its output has no URL, token or key."""
    handle, delivery_id = await handed_over(world, 400, text="by command")
    await until_listed(Deliveries(client=world.handler_client), delivery_id, DeliveryState.FAILED)
    printed = []

    async def run(*arguments: str, code: int = 0) -> "subprocess.CompletedProcess[str]":
        done = await console(*arguments, server=server)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        printed.append(done.stdout + done.stderr)
        return done

    listed = [each for each in json.loads((await run("list", "--json")).stdout) if each["id"] == delivery_id]
    assert len(listed) == 1
    assert set(listed[0]) == set(DeliveryReport.__dataclass_fields__)
    assert (listed[0]["state"], listed[0]["operation"]) == ("failed", "ProbeService/probe")
    assert datetime.fromisoformat(listed[0]["deadline"]) > datetime.now(UTC)
    [line] = [line for line in (await run("list")).stdout.splitlines() if line.startswith(delivery_id)]
    assert "ProbeService/probe" in line
    shown = json.loads((await run("show", delivery_id, "--json")).stdout)
    assert shown.pop("last_error") == REFUSED
    assert shown == listed[0] | {"attempts": None, "next_try": None}
    assert f"{CALLER}\n" in (await run("show", delivery_id)).stdout
    unknown = (await run("show", "unknown-id", code=1)).stderr
    assert f"no delivery unknown-id in namespace {HANDLER}; `deliveries list --state all` shows" in unknown

    world.receiver.before = None
    again = await run("redeliver", delivery_id, "unknown-id", "--json", code=1)
    results = json.loads(again.stdout)
    assert [(each["id"], each["error"] is None) for each in results] == [(delivery_id, True), ("unknown-id", False)]
    assert "no delivery unknown-id" in again.stderr
    assert await handle.result() == Reply("by command")
    await until_listed(Deliveries(client=world.handler_client), delivery_id, DeliveryState.DELIVERED)
    assert "already delivered" in (await run("redeliver", delivery_id, code=1)).stderr

    key_sets = (world.keys.callback, world.keys.start, world.keys.completion)
    secrets = [world.keys.hash, *(key_set.keys["k1"].get_secret_value() for key_set in key_sets)]
    for text in printed:
        for secret in ("sig=", "http://", world.receiver.url, *secrets):
            assert secret not in text


async def test_all_that_failed_run_again_at_once(world: World, server: Server) -> None:
    """`--failed` also repeats other deliveries of the namespace. The test checks only its own."""
    handle, delivery_id = await handed_over(world, 400, text="one of many")
    await until_listed(Deliveries(client=world.handler_client), delivery_id, DeliveryState.FAILED)
    world.receiver.before = None
    # The deliveries of other tests in this namespace may not be repeatable, which its exit code says.
    done = await console("redeliver", "--failed", server=server)
    assert f"{delivery_id} runs again, as run " in done.stdout
    assert await handle.result() == Reply("one of many")


@pytest.mark.parametrize(
    ("arguments", "environment", "code", "says"),
    [
        pytest.param(["redeliver"], {}, 2, "name the deliveries", id="nothing named"),
        pytest.param(["redeliver", "x", "--failed"], {}, 2, "name the deliveries", id="both"),
        pytest.param(["list", "--limit", "0"], {}, 2, "--limit", id="limit"),
        pytest.param(["list"], {"TEMPORAL_NAMESPACE": "no-such"}, 2, "no-such", id="namespace"),
        pytest.param(["list"], {"TEMPORAL_ADDRESS": "127.0.0.1:1"}, 2, "cannot connect to Temporal", id="no server"),
        pytest.param(["list"], {"BRIDGE_CONFIG": "/no/such.toml"}, 2, "no such file", id="settings"),
    ],
)
async def test_a_command_that_cannot_be_carried_out_says_why(
    server: Server, arguments: list[str], environment: dict[str, str], code: int, says: str
) -> None:
    """The output is one sentence, not a traceback."""
    done = await console(*arguments, server=server, **environment)
    assert done.returncode == code
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def report(**changes: Any) -> DeliveryDetails:
    facts: dict[str, Any] = {
        "id": "bridge-delivery-a-b",
        "run_id": "r",
        "state": DeliveryState.RUNNING,
        "attempts": 2,
        "last_error": "why",
        "next_try": NOW + timedelta(seconds=90),
        "started": NOW - timedelta(hours=2),
        "closed": None,
    }
    return DeliveryDetails(**facts | changes)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param({}, ["running", "?", "?", "?", "?", "2h ago", "?"], id="unreadable"),
        pytest.param(
            {
                "state": DeliveryState.FAILED,
                "closed": NOW,
                "operation": "PaymentService/process",
                "caller": "shop",
                "deadline": NOW + timedelta(days=3),
                "target_workflow_id": "pay\x1b-1\n",
                "target_run_id": "run",
            },
            ["failed", "PaymentService/process", "pay\ufffd-1", "run", "shop", "2h ago", "in 3d"],
            id="failed",
        ),
    ],
)
def test_a_delivery_is_one_line(changes: dict[str, Any], expected: list[str]) -> None:
    """Control characters in a workflow id are replaced."""
    heading, line = table([report(**changes)], COLUMNS, now=NOW).splitlines()
    assert heading.split()[:3] == ["ID", "STATE", "OPERATION"]
    assert [cell.strip() for cell in line.split("  ") if cell.strip()] == ["bridge-delivery-a-b", *expected]


@pytest.mark.parametrize(("status", "state"), [(1, "running"), (2, "delivered"), (5, "failed"), (8, "paused")])
def test_every_status_of_a_workflow_is_a_state(status: int, state: str) -> None:
    """8 is the paused workflow of server 1.32, which the SDK does not know. A later number must break no command."""
    assert DeliveryState.of(status) is DeliveryState(state)
    assert DeliveryState.of(99) is DeliveryState.PAUSED


def test_details_and_json_show_every_field() -> None:
    """A missing value is "-" in text and null in JSON."""
    lines = {line[:20].strip(): line[20:] for line in details(report(), now=NOW).splitlines()}
    assert len(lines) == len(DeliveryDetails.__dataclass_fields__)
    assert lines["id"] == "bridge-delivery-a-b"
    assert lines["caller"] == "-"
    assert lines["next try"] == "2026-01-02 03:05:35+00:00 (in 1m)"
    [shown] = json.loads(to_json([report()]))
    assert shown["next_try"] == "2026-01-02T03:05:35+00:00"
    assert shown["closed"] is None


def test_foreign_text_is_made_plain() -> None:
    """The text is one bounded line without control characters and URLs."""
    assert plain("a\n b\x1b[2J https://h/x?sig=1 c") == "a b\ufffd[2J … c"
    assert len(plain("x" * 5000)) == 1000
