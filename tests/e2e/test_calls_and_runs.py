"""`callback-bridge calls` and `runs`: one call as each side sees it, by people without access to the other side."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from aiohttp import web
from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.workflowservice.v1 import DeleteWorkflowExecutionRequest
from temporalio.client import WorkflowFailureError

from bridge.admin.command import CommandError
from bridge.admin.output import details, table
from bridge.temporal.executions import describe, list_runs
from caller.admin.calls import calls
from caller.reports.calls import CallReport, Calls
from handler.admin.runs import runs
from tests.support.callers import CallPlan
from tests.support.helpers import CALLER, HANDLER, assert_eventually
from tests.support.targets import Ask
from tests.support.world import World

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


class Shell:
    """Runs commands as a user of one namespace would, in this process."""

    def __init__(self, world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setenv("TEMPORAL_ADDRESS", world.server.address)
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    async def run(self, *words: str) -> str:
        """The output of `callback-bridge …`: of `calls` in the caller's namespace, of `runs` in the handler's."""
        app = {"calls": calls, "runs": runs}[words[0]]
        self._monkeypatch.setenv("TEMPORAL_NAMESPACE", CALLER if app is calls else HANDLER)
        function, bound, _ = app.parse_args(words[1:], exit_on_error=False, print_error=False)
        await function(*bound.args, **bound.kwargs)
        out, err = self._capsys.readouterr()
        return out + err


@pytest.fixture
def shell(world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(world, monkeypatch, capsys)


def lines(text: str) -> dict[str, str]:
    """The fields that `show` prints, by name."""
    return {line[:20].strip(): line[20:] for line in text.splitlines()}


async def test_a_waiting_call_is_seen_from_both_sides(world: World, shell: Shell) -> None:
    """Each side lists it and shows the other workflow, the attempts and the next try; later it is not listed."""
    ask = Ask(key=world.key(), behaviour="wait")
    handle = await world.call(ask, CallPlan(first_lease=1))
    await world.until_attempt(handle, 2, in_backoff=True)
    query = f'WorkflowId = "{handle.id}"'

    async def listed() -> dict[str, Any]:
        # Visibility follows a little later.
        found = json.loads(await shell.run("calls", "list", "--query", query, "--json"))
        assert len(found) == 1
        return dict(found[0])

    call = await assert_eventually(listed)
    described = await world.target(ask).describe()
    assert (call["state"], call["endpoint"], call["operation"]) == ("waiting", "payments", "ProbeService/probe")
    assert call["target"] == f"{HANDLER}/probe-{ask.key} (run {described.run_id})"
    shown = lines(await shell.run("calls", "show", handle.id, "--request-id", call["request_id"]))
    assert shown["last error"].startswith("bridge.StillRunning: still running: ")
    assert (shown["state"], int(shown["attempts"]) >= 1) == ("waiting", True)
    names = list(shown)
    assert names.index("closed") < names.index("scheduled") < names.index("started") < names.index("deadline")

    query = f'WorkflowId = "probe-{ask.key}"'
    [run] = json.loads(await shell.run("runs", "list", "--query", query, "--json"))
    assert (run["state"], run["caller"], run["called_by"]) == ("running", CALLER, f"{CALLER}/{handle.id}")
    assert run["request_id"] == call["request_id"]
    text = await shell.run("runs", "list", "--query", query, "--limit", "1")
    assert f"probe-{ask.key}  running  ProbeService/probe" in text
    assert "read the first 1 runs" in text
    assert await shell.run("runs", "list", "--query", query, "--caller", "other") == (
        f"nothing found in namespace {HANDLER} by {query}\n"
    )
    assert "no delivery workflow" in await shell.run("runs", "show", f"probe-{ask.key}")

    await world.target(ask).signal("say", "done")
    await handle.result()
    query = f'WorkflowId = "{handle.id}"'
    assert await shell.run("calls", "list", "--query", query) == (f"nothing found in namespace {CALLER} by {query}\n")
    shown = lines(await shell.run("calls", "show", handle.id))
    assert (shown["state"], shown["target"]) == ("succeeded", f"{HANDLER}/probe-{ask.key}")
    for wrong, says in (((handle.id, "--request-id", "x"), "no such call"), (("no-such-workflow",), "NOT_FOUND")):
        with pytest.raises(CommandError, match=says):
            await shell.run("calls", "show", *wrong)


async def test_a_workflow_that_was_deleted_meanwhile_is_left_out(world: World) -> None:
    """Visibility lists a run before it is read, and retention or an operator may delete it in between."""
    client, ids = world.caller_client, [f"{each}-{world.key()}" for each in ("first", "second")]
    for each in ids:
        await client.start_workflow("Unknown", id=each, task_queue="no-worker")

    class Slow(Calls):
        async def of_run(self, workflow_id: str, run_id: str = "") -> list[CallReport]:
            other = WorkflowExecution(workflow_id=next(each for each in ids if each != workflow_id))
            if not deleted:
                deleted.append(other.workflow_id)
                request = DeleteWorkflowExecutionRequest(namespace=CALLER, workflow_execution=other)
                await client.workflow_service.delete_workflow_execution(request)

                async def gone() -> None:
                    assert await describe(client, other.workflow_id) is None

                await assert_eventually(gone)
            return await super().of_run(workflow_id, run_id)

    query, deleted = f'WorkflowId IN ("{ids[0]}", "{ids[1]}")', list[str]()

    async def listed() -> None:
        assert len([each async for each in list_runs(client, query)]) == 2

    await assert_eventually(listed)
    assert await Slow(client=client, settings=None).waiting(query, limit=10) == (2, [])
    assert deleted


async def test_a_setting_adds_links(world: World) -> None:
    """With `ui_url` of the handler, a call shows the page of its target."""
    ask = Ask(key=world.key())
    handle = await world.call(ask)
    await handle.result()
    described = await world.target(ask).describe()
    settings = world.caller_settings
    handlers = {
        name: each.model_copy(update={"ui_url": "https://ui.example"}) for name, each in settings.handlers.items()
    }
    with_ui = settings.model_copy(update={"handlers": handlers})
    [report] = await Calls(client=world.caller_client, settings=with_ui).of_run(handle.id)
    page = f"https://ui.example/namespaces/{HANDLER}/workflows/probe-{ask.key}/{described.run_id}/history"
    assert report.link == page
    assert page in details(report, now=report.scheduled)


async def test_a_failed_call_shows_why(world: World, shell: Shell) -> None:
    """And a call whose deadline passed says so."""
    ask = Ask(key=world.key(), behaviour="fail", text="card\ndeclined \x1b[2J")
    handle = await world.call(ask)
    with pytest.raises(WorkflowFailureError):
        await handle.result()
    shown = lines(await shell.run("calls", "show", handle.id))
    assert (shown["state"], shown["last error"]) == ("failed", "Outer: card declined \ufffd[2J")
    late = await world.call(Ask(key=world.key(), behaviour="wait"), CallPlan(deadline=2))
    with pytest.raises(WorkflowFailureError):
        await late.result()
    [report] = await Calls(client=world.caller_client, settings=None).of_run(late.id)
    assert report.state in {"timed out", "stopped"}
    assert report.closed is not None


async def test_a_run_shows_its_delivery(world: World, shell: Shell) -> None:
    """The last error and the next try of the delivery workflow."""

    async def refuse(request: web.Request) -> web.StreamResponse:
        return world.signed_response(request, 503)

    world.receiver.before = refuse
    ask = Ask(key=world.key())
    handle = await world.call(ask, CallPlan(first_lease=600))
    await world.until_started(ask)

    async def delivered() -> dict[str, Any]:
        shown = json.loads(await shell.run("runs", "show", f"probe-{ask.key}", "--json"))
        assert shown["delivery"] is not None
        assert shown["delivery"]["last_error"] is not None
        return dict(shown)

    shown = await assert_eventually(delivered)
    assert shown["run"]["state"] == "completed"
    assert shown["delivery"]["state"] == "running"
    assert shown["delivery"]["last_error"] == "bridge.ReceiverNotReady: the receiver is not ready"
    world.receiver.before = None
    await handle.result()


def test_foreign_text_in_a_table_stays_in_its_cell() -> None:
    """A workflow id controls no terminal and begins no line; an unknown fact is a question mark."""
    report = CallReport(
        workflow_id="order\x1b[2J\n7",
        run_id="r",
        request_id="q",
        state="status 8",
        scheduled=NOW,
        target="https://evil.example/?sig=x",
    )
    heading, row = table([report], "workflow_id state operation scheduled", now=NOW).splitlines()
    assert heading.split("  ")[0] == "WORKFLOW ID"
    assert row.split() == ["order\ufffd[2J", "7", "status", "8", "?", "0s", "ago"]
    assert len(details(report, now=NOW).splitlines()) == len(CallReport.__dataclass_fields__)
    assert "evil" not in details(report, now=NOW)
