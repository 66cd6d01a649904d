"""What Temporal's own UI and CLI show of a call: who called, which workflow carries it out, and how it ended."""

import json
from typing import Any

import pytest
from temporalio.api.sdk.v1 import WorkflowMetadata
from temporalio.client import WorkflowFailureError, WorkflowHandle

from caller.waiting.started_operation import StartedOperation
from handler.delivery.records import MEMO_KEY
from scripts.environment.server import Server
from tests.support.callers import CallPlan
from tests.support.helpers import CALLER, HANDLER
from tests.support.targets import Ask
from tests.support.world import World, running_world

UI = "http://127.0.0.1:8233"
PAYMENTS_UI = "https://payments-ui.example"


def with_uis(world: World) -> None:
    world.peer_options = {"ui_url": UI}
    keys = {"start_keys": world.keys.start, "completion_keys": world.keys.completion}
    world.caller_options = {"handlers": {HANDLER: {**keys, "ui_url": PAYMENTS_UI + "/"}}}


async def current_details(handle: WorkflowHandle[Any, Any]) -> str:
    """What the tab User Metadata of Temporal's UI queries."""
    metadata = await handle.query("__temporal_workflow_metadata", result_type=WorkflowMetadata)
    return str(metadata.current_details)


async def test_both_workflows_link_to_each_other(server: Server) -> None:
    """From the order to the payment and back by links, while the call waits and after both have closed."""
    async with running_world(server, prepare=with_uis) as world:
        ask = Ask(key=world.key(), behaviour="wait")
        handle = await world.call(ask, CallPlan(first_lease=1))
        target = await world.until_started(ask)
        described = await target.describe()
        caller_page = f"{UI}/namespaces/{CALLER}/workflows/{handle.id}/{handle.first_execution_run_id}/history"
        target_page = f"{PAYMENTS_UI}/namespaces/{HANDLER}/workflows/{target.id}/{described.run_id}/history"
        assert await described.memo_value("caller") == f"{CALLER}/{handle.id}: ProbeService/probe {caller_page}"
        assert await described.static_summary() == f"called by `{CALLER}/{handle.id}`: `ProbeService/probe`"
        assert f"- caller: [`{CALLER}/{handle.id}`]({caller_page})" in (await described.static_details() or "")

        await world.until_attempt(handle, 2, in_backoff=True)
        activity = await world.pending(handle)
        assert (
            activity.last_failure.message
            == f"still running: {HANDLER}/{target.id} (run {described.run_id}) {target_page}"
        )
        assert activity.last_failure.stack_trace == ""
        details = json.loads(activity.heartbeat_details.payloads[0].data)
        assert list(details) == ["link", "started_ms", "target", "token_packed", "transport"]
        assert details["link"] == target_page
        assert await current_details(handle) == (
            f"Calls, the newest first:\n\n"
            f"- `payments: ProbeService/probe` waiting: "
            f"[`{HANDLER}/{target.id} (run {described.run_id})`]({target_page})"
        )

        await target.signal("say", "done")
        await handle.result()
        closed = f"- `payments: ProbeService/probe` succeeded: [`{HANDLER}/{target.id}`]({target_page})"
        assert closed in await current_details(handle)
        # Another worker, which never saw the call, shows the same: it reads the history.
        await world.stop_worker("caller")
        await world.start_worker("caller")
        assert closed in await current_details(handle)


async def test_no_record_shows_a_token(world: World) -> None:
    """Memo, attach signal and heartbeat details have neither the callback URL nor the operation token as text."""
    ask = Ask(key=world.key(), behaviour="wait")
    first = await world.call(ask, CallPlan(first_lease=1))
    target = await world.until_started(ask)
    second = await world.call(ask, CallPlan(first_lease=1))
    for each in (first, second):
        await world.until_attempt(each, 2, in_backoff=True)
    seen = [each.SerializeToString() for each in (await target.fetch_history()).events]
    seen.append((await target.describe()).raw_description.SerializeToString())
    for handle in (first, second):
        seen.append((await handle.describe()).raw_description.SerializeToString())
        token = StartedOperation.from_details(
            [json.loads((await world.pending(handle)).heartbeat_details.payloads[0].data)]
        )
        assert token is not None
        assert token.operation_token
        assert not any(token.operation_token.encode() in each for each in seen)
    assert not any(b"sig=" in each or world.receiver.url.encode() in each for each in seen)
    await target.signal("say", "done")
    await first.result()
    await second.result()


async def test_a_failed_call_names_its_target_without_a_link(world: World) -> None:
    """Without the setting `ui_url`, ids are shown."""
    ask = Ask(key=world.key(), behaviour="fail")
    handle = await world.call(ask)
    with pytest.raises(WorkflowFailureError):
        await handle.result()
    described = await world.target(ask).describe()
    caller = f"{CALLER}/{handle.id}: ProbeService/probe (run {handle.first_execution_run_id})"
    assert await described.memo_value("caller") == caller
    assert await current_details(handle) == (
        f"Calls, the newest first:\n\n- `payments: ProbeService/probe` failed: `{HANDLER}/probe-{ask.key}`"
    )


async def test_the_details_of_the_workflows_author_stay(world: World) -> None:
    """The bridge shows its calls only in a workflow that sets no details of its own."""
    ask = Ask(key=world.key(), behaviour="wait")
    handle = await world.call(ask, CallPlan(details="my own words"))
    await world.until_started(ask)
    assert await current_details(handle) == "my own words"
    await handle.terminate()


HOSTILE = "](https://evil.example) `x` <script>\x1b[2J\n# www.evil.example"


async def test_ids_inject_nothing(world: World) -> None:
    """A workflow id may hold any character. It is shown as a code span, on one line, without control characters."""
    ask = Ask(key=world.key(HOSTILE), behaviour="wait")
    handle = await world.call(ask)
    target = await world.until_started(ask)
    described = await target.describe()
    assert described.raw_info.memo.fields.keys() >= {"caller", MEMO_KEY}
    texts = [
        await described.memo_value("caller"),
        await described.static_summary() or "",
        await described.static_details() or "",
        await current_details(handle),
    ]
    shown = f"`{CALLER}/calling-{world.id}-](https://evil.example) 'x' <script>\ufffd[2J # www.evil.example"
    assert shown in texts[1]
    await target.signal("say", "done")
    await handle.result()
    shown = shown.replace(f"{CALLER}/calling", f"{HANDLER}/probe")
    assert shown in await current_details(handle)
    for text in [*texts, await current_details(handle)]:
        assert "\x1b" not in text
