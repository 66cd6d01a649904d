"""Calls from outside of workflows: the same contract and the same errors, without a Temporal server of the caller."""

import asyncio
import json
import signal
import uuid
from collections.abc import AsyncIterator
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import nexusrpc
import pytest
import pytest_asyncio
from aiohttp import web
from nexusrpc import HandlerError, HandlerErrorType
from temporalio.client import WorkflowExecutionStatus
from temporalio.exceptions import ApplicationError, CancelledError, NexusOperationError
from temporalio.exceptions import TimeoutError as TemporalTimeoutError

import bridge
from bridge.protocol.outcome import Outcome
from bridge.protocol.start import Finished, Running
from caller.client import CallOptions, OperationClient, create_client
from scripts.environment.server import Server
from tests.support.codec import Scrambler
from tests.support.commands import BRIDGE
from tests.support.helpers import HANDLER, assert_eventually
from tests.support.peer import failure_body
from tests.support.services import Quotes, QuoteService
from tests.support.settings_files import toml
from tests.support.targets import Ask, ProbeService, Reply
from tests.support.world import World, running_world, with_codec


def serving(world: World) -> None:
    world.services = [Quotes()]
    world.endpoint_options = {"transport": "poll", "wait_s": 2, "poll_interval_s": 0.2}
    world.caller_options = {"receiver": None, "callback_keys": None}


@pytest_asyncio.fixture(loop_scope="session", name="world")
async def world_without_a_caller(server: Server) -> AsyncIterator[World]:
    """No receiver and no worker of the caller."""
    async with running_world(server, without=("receiver", "caller"), prepare=serving) as made:
        yield made


@pytest_asyncio.fixture(loop_scope="session")
async def client(world: World) -> AsyncIterator[OperationClient]:
    async with create_client(service=ProbeService, endpoint="payments", settings=world.caller_settings) as made:
        yield made


async def error_of(client: OperationClient, ask: Ask, **options: Any) -> BaseException:
    """The cause of the call's error."""
    with pytest.raises(NexusOperationError) as raised:
        await client.execute_operation(ProbeService.probe, ask, **options)
    assert (raised.value.endpoint, raised.value.service) == ("payments", "ProbeService")
    assert raised.value.__cause__ is not None
    return raised.value.__cause__


async def test_an_option_that_is_not_known_is_refused(client: OperationClient, world: World) -> None:
    """A request id under a misspelled name would start the operation twice. Client and workflow refuse alike."""
    ask, in_workflow = Ask(key=world.key()), bridge.create_client(service=ProbeService, endpoint="payments")
    misspelled: Any = {"request-id": "7", "schedule_to_close_timout": timedelta(seconds=1)}
    for start in (client.start_operation, in_workflow.start_operation):
        with pytest.raises(TypeError, match="unknown options: request-id, schedule_to_close_timout"):
            await start(ProbeService.probe, ask, **misspelled)
    assert world.service.requests == []


async def test_a_short_operation_takes_one_request(world: World, client: OperationClient) -> None:
    """The answer to the start holds the typed result."""
    result = await client.execute_operation(ProbeService.probe, Ask(key=world.key(), text="hello"))
    assert result == Reply("hello")
    assert await world.service.answered() == [200]


async def test_a_result_crosses_a_codec(server: Server) -> None:
    """The client has the converter and codec that the handler has."""
    converter = with_codec(Scrambler())
    async with (
        running_world(server, without=("receiver", "caller"), prepare=serving, converters=(converter,) * 2) as world,
        create_client(
            service=ProbeService, endpoint="payments", settings=world.caller_settings, data_converter=converter
        ) as client,
    ):
        ask = Ask(key=world.key(), text="secret")
        assert await client.execute_operation(ProbeService.probe, ask) == Reply("secret")
        failure = await error_of(client, Ask(key=world.key(), behaviour="fail"))
        assert isinstance(failure, ApplicationError)
        assert failure.details[1] == "two"


async def test_a_sync_operation_is_answered(world: World) -> None:
    """A service handler needs no workflow."""
    async with create_client(service=QuoteService, endpoint="payments", settings=world.caller_settings) as quotes:
        assert await quotes.execute_operation(QuoteService.quote, Ask(key="q", text="12.5")) == Reply("12.5")


async def test_an_operation_that_ended_without_a_value_has_the_result_none(client: OperationClient) -> None:
    """A workflow in Go that returns only an error. With a typed contract the SDK expects a value."""
    handle = client.prepare(ProbeService.probe, Ask(key="unused"))
    handle.answer = Finished(outcome=Outcome.succeeded(None), target=None)
    assert await handle.result() is None


async def test_errors_are_those_of_workflow_code(world: World, client: OperationClient) -> None:
    """The target's failure with its cause; a refused input; an unknown endpoint."""
    failure = await error_of(client, Ask(key=world.key(), behaviour="fail"))
    assert isinstance(failure, ApplicationError)
    assert (failure.type, failure.message) == ("Outer", "the outer reason")
    assert isinstance(failure.cause, ApplicationError)
    refusal = await error_of(client, Ask(key=world.key(), behaviour="refused"))
    assert isinstance(refusal, HandlerError)
    assert (refusal.type, "the check says no" in str(refusal)) == (HandlerErrorType.BAD_REQUEST, True)
    async with create_client(service=ProbeService, endpoint="elsewhere", settings=world.caller_settings) as stray:
        with pytest.raises(NexusOperationError) as raised:
            await stray.execute_operation(ProbeService.probe, Ask(key="x"))
    assert "no endpoint 'elsewhere' in the caller's settings (known: payments)" in str(raised.value.__cause__)


async def test_a_long_operation_is_waited_for_by_held_requests(world: World, client: OperationClient) -> None:
    """The handler is asked again, and the run is the one that the start named."""
    ask = Ask(key=world.key(), behaviour="wait")
    handle = await client.start_operation(ProbeService.probe, ask)
    assert handle.answer is not None
    assert handle.answer.target is not None
    assert handle.answer.target.workflow_id == f"probe-{ask.key}"
    waiting = asyncio.create_task(handle.result())

    async def asked_again() -> None:
        assert len(world.service.requests) >= 2

    await assert_eventually(asked_again)
    await world.target(ask).signal("say", "at last")
    assert await waiting == Reply("at last")


async def test_without_a_place_to_hold_the_client_polls(world: World) -> None:
    """A handler that holds no start is asked at a growing pace, up to the endpoint's interval."""
    world.handler_options = {"service": {"url": world.service.url, "allow_insecure": True, "held_starts": 0}}
    await world.service.stop()
    await world.service.start()
    async with create_client(service=ProbeService, endpoint="payments", settings=world.caller_settings) as client:
        ask = Ask(key=world.key(), behaviour="wait")
        waiting = asyncio.create_task(client.execute_operation(ProbeService.probe, ask))

        async def asked() -> None:
            assert len(world.service.requests) >= 4

        await assert_eventually(asked)
        assert set(world.service.statuses) == {201}
        await world.target(ask).signal("say", "polled")
        assert await waiting == Reply("polled")


async def test_the_same_request_id_finds_the_operation_of_an_earlier_process(
    world: World, client: OperationClient
) -> None:
    """Nothing starts twice, and the outcome is still there after the end."""
    ask, options = Ask(key=world.key(), text="once"), CallOptions(request_id=str(uuid.uuid4()))
    runs = []
    for _ in range(2):
        assert await client.execute_operation(ProbeService.probe, ask, **options) == Reply("once")
        runs.append((await world.target(ask).describe()).run_id)
    assert runs[0] == runs[1]


async def test_a_cancel_ends_the_target(world: World, client: OperationClient) -> None:
    """The result is then the cancellation, and the target has closed as canceled."""
    ask = Ask(key=world.key(), behaviour="cleanup")
    handle = await client.start_operation(ProbeService.probe, ask)
    await world.until_started(ask)
    await handle.cancel()
    with pytest.raises(NexusOperationError) as raised:
        await handle.result()
    assert isinstance(raised.value.__cause__, CancelledError)
    assert (await world.target(ask).describe()).status is WorkflowExecutionStatus.CANCELED
    await handle.cancel()


async def test_a_refused_cancel_is_an_error(client: OperationClient, world: World) -> None:
    """The handler does not know the operation. The cancel is not repeated until the deadline."""
    handle = await client.start_operation(ProbeService.probe, Ask(key=world.key(), behaviour="wait"))
    assert isinstance(handle.answer, Running)
    handle.answer = replace(handle.answer, operation_token="unknown")
    with pytest.raises(NexusOperationError) as raised:
        await handle.cancel()
    assert isinstance(raised.value.__cause__, HandlerError)


async def test_the_deadline_ends_the_wait_and_not_the_target(world: World, client: OperationClient) -> None:
    """The error is the timeout of production."""
    ask = Ask(key=world.key(), behaviour="wait")
    cause = await error_of(client, ask, schedule_to_close_timeout=timedelta(seconds=3))
    assert isinstance(cause, TemporalTimeoutError)
    assert (await world.target(ask).describe()).status is WorkflowExecutionStatus.RUNNING


async def test_a_deadline_beyond_every_clock_is_cut(world: World, client: OperationClient, command: Any) -> None:
    """As in workflow code, and on the command line."""
    handle = client.prepare(ProbeService.probe, Ask(key=world.key()), schedule_to_close_timeout=timedelta.max)
    assert handle.deadline.year > 2100
    for each in ("inf", "1e12", "nan"):
        running = await command("payments", "ProbeService/probe", json.dumps({"key": world.key()}), "--timeout", each)
        _, err = await running.communicate()
        assert b"Traceback" not in err
        assert (running.returncode == 0) is (each != "nan")


async def test_an_outage_of_the_handler_is_waited_out(world: World, client: OperationClient) -> None:
    """A proxy's page is no answer of the handler: the start is repeated. At the deadline the page is the cause."""
    pages = iter([404, 503])

    async def down(_: web.Request) -> web.Response | None:
        status = next(pages, None)
        return None if status is None else web.Response(status=status, text="maintenance")

    world.service.before = down
    assert await client.execute_operation(ProbeService.probe, Ask(key=world.key(), text="late")) == Reply("late")
    assert await world.service.answered() == [404, 503, 200]
    await world.service.stop()
    cause = await error_of(client, Ask(key="none"), schedule_to_close_timeout=timedelta(seconds=1))
    assert isinstance(cause, TemporalTimeoutError)
    assert cause.__cause__ is not None


async def test_a_callback_url_of_ones_own_gets_the_outcome(world: World, client: OperationClient) -> None:
    """The handler POSTs the signed outcome there."""
    got: list[bytes] = []

    async def own_receiver(request: web.Request) -> web.StreamResponse:
        assert request.path == "/callbacks/mine"
        got.append(await request.read())
        return world.signed_response(request, 200)

    world.caller_options = {}
    await world.receiver.start()
    world.receiver.before = own_receiver
    ask = Ask(key=world.key(), text="called back")
    await client.start_operation(ProbeService.probe, ask, callback_url=f"{world.receiver.url}/callbacks/mine")

    async def called_back() -> None:
        assert [json.loads(each) for each in got] == [asdict(Reply("called back"))]

    await assert_eventually(called_back)


@pytest.fixture(name="command")
def command_of(world: World, tmp_path: Path) -> Any:
    """Start `callback-bridge call` with the caller's settings."""
    settings = world.caller_settings
    tree = {
        "name": settings.name,
        "handlers": {
            HANDLER: {"start_keys": {"signing": "k1", "keys": {"k1": _secret(world.keys.start)}}},
        },
        "endpoints": {"payments": json.loads(settings.endpoints["payments"].model_dump_json(exclude_none=True))},
    }
    path = tmp_path / "caller.toml"
    path.write_text(toml(tree))

    async def run(*arguments: str, **variables: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *(*BRIDGE, "call", *arguments),
            env={"BRIDGE_CONFIG": str(path), "PATH": "", **variables},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )

    return run


def _secret(keys: Any) -> str:
    return str(next(iter(keys.keys.values())).get_secret_value())


async def test_the_command_prints_the_result(world: World, command: Any) -> None:
    """For people, and with --json for programs. Standard error names the target."""
    ask = Ask(key=world.key(), text="from the shell")
    for option, expected in ((), asdict(Reply(ask.text))), (("--json",), {"result": asdict(Reply(ask.text))}):
        running = await command("payments", "ProbeService/probe", json.dumps(asdict(ask)), *option)
        out, err = await running.communicate()
        assert (running.returncode, json.loads(out)) == (0, expected)
        assert f"probe-{ask.key}" in err.decode()


async def test_the_command_says_that_a_value_cannot_be_converted(command: Any) -> None:
    """The settings name a converter that refuses the input. The remedy is in the line, and no traceback."""
    converter = "temporalio.contrib.pydantic:pydantic_data_converter"
    running = await command("payments", "QuoteService/quote", '"\\ud800"', BRIDGE_DATA_CONVERTER=converter)
    _, err = await running.communicate()
    assert running.returncode == 1
    assert "QuoteService/quote: the input or the result cannot be converted (" in err.decode()
    assert "`data_converter` in the settings" in err.decode()
    assert "Traceback" not in err.decode()


async def test_the_command_does_not_say_that_it_started_what_was_answered_at_once(world: World, command: Any) -> None:
    """A synchronous operation has no target. A target that has ended was not started by this call."""
    ask = json.dumps(asdict(Ask(key=world.key())))
    lines = [
        (await (await command("payments", each, ask)).communicate())[1].decode()
        for each in ("QuoteService/quote", "ProbeService/probe", "ProbeService/probe")
    ]
    assert lines[0] == ""
    assert lines[1].startswith("started ")
    assert lines[2].endswith(" has ended\n")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        pytest.param(["ProbeService/probe", "{"], 1, "the input is not JSON", id="no JSON"),
        pytest.param(["ProbeService/probe", "[" * 50_000], 1, "the input is not JSON", id="JSON nested too deeply"),
        pytest.param(["probe", "{}"], 1, "the form Service/operation, not 'probe'", id="no service"),
        pytest.param(["ProbeService/", "{}"], 1, "the form Service/operation", id="no name"),
        pytest.param(["ProbeService/none", "{}"], 1, "succeed: NOT_FOUND: no such operation", id="no operation"),
        pytest.param(
            ["ProbeService/probe", '{"key": "FRESH", "behaviour": "fail"}'],
            1,
            "did not succeed: Outer: the outer reason; caused by Inner: the inner reason",
            id="failure",
        ),
        pytest.param(
            ["ProbeService/probe", '{"key": "FRESH", "behaviour": "wait"}', "--timeout", "1"],
            1,
            "TimeoutError: operation timed out",
            id="timeout",
        ),
    ],
)
async def test_the_command_says_why_an_operation_did_not_succeed(
    world: World, command: Any, arguments: list[str], code: int, says: str
) -> None:
    """One line on standard error, with the causes."""
    running = await command("payments", *(each.replace("FRESH", world.key()) for each in arguments))
    _, err = await running.communicate()
    assert says in err.decode()
    assert running.returncode == code
    assert "Traceback" not in err.decode()


async def test_an_interrupted_command_cancels_the_operation_and_says_so(world: World, command: Any) -> None:
    """The exit code is 130, and the target is canceled."""
    ask = Ask(key=world.key(), behaviour="cleanup")
    running = await command("payments", "ProbeService/probe", json.dumps(asdict(ask)))
    assert b"started" in await running.stderr.readline()
    running.send_signal(signal.SIGINT)
    _, err = await running.communicate()
    assert running.returncode == 130
    assert "canceled: the handler was asked to end ProbeService/probe" in err.decode()

    async def canceled() -> None:
        assert (await world.target(ask).describe()).status is WorkflowExecutionStatus.CANCELED

    await assert_eventually(canceled)


async def test_an_operation_by_its_name_has_no_types(client: OperationClient, world: World) -> None:
    """What a script without the contract writes."""
    probe: nexusrpc.Operation[dict[str, str], Any] = nexusrpc.Operation("probe")
    assert (await client.execute_operation(probe, {"key": world.key(), "text": "plain"}))["text"] == "plain"


async def test_an_interrupted_command_does_not_wait_for_a_handler_that_is_down(world: World, command: Any) -> None:
    """It says how the operation can be found again."""
    ask = Ask(key=world.key(), behaviour="wait")
    running = await command("payments", "ProbeService/probe", json.dumps(asdict(ask)))
    assert b"started" in await running.stderr.readline()
    await world.service.stop()
    running.send_signal(signal.SIGINT)
    _, err = await asyncio.wait_for(running.communicate(), 60)
    assert running.returncode == 130
    assert "repeat it with --request-id" in err.decode()
    await world.service.start()


@pytest.mark.parametrize(("message", "kind"), [("\x1b[2Jgone", "Declined"), ("no", "\x1b]0;title\x07Declined")])
async def test_the_command_prints_no_control_character_of_the_handler(
    world: World, command: Any, message: str, kind: str
) -> None:
    """Neither from the message of a cause nor from its type."""

    async def failed(request: web.Request) -> web.StreamResponse:
        headers = {"Content-Type": "application/json", "Nexus-Operation-State": "failed"}
        return world.signed_response(request, 424, headers, failure_body(message, kind))

    world.service.before = failed
    running = await command("payments", "ProbeService/probe", "{}")
    _, err = await running.communicate()
    assert running.returncode == 1
    assert b"Declined" in err
    assert not {b"\x1b", b"\x07"} & {bytes([each]) for each in err}


@pytest.mark.parametrize(
    ("content_type", "body", "printed"),
    [
        ("application/octet-stream", b"\x00\xff", "AP8="),
        (
            'application/json; format=protobuf; message-type="temporal.api.common.v1.WorkflowType"',
            b'{"name": "pay"}',
            'name: "pay"\n',
        ),
    ],
)
async def test_the_command_prints_a_result_that_json_has_no_form_for(
    world: World, command: Any, content_type: str, body: bytes, printed: str
) -> None:
    """The operation has succeeded: its result must not be lost to a traceback."""

    async def succeeded(request: web.Request) -> web.StreamResponse:
        headers = {"Content-Type": content_type, "Nexus-Operation-State": "succeeded"}
        return world.signed_response(request, 200, headers, body)

    world.service.before = succeeded
    running = await command("payments", "ProbeService/probe", "{}")
    out, err = await running.communicate()
    assert (running.returncode, json.loads(out)) == (0, printed), err


async def test_a_command_that_waits_for_a_handler_says_what_is_wrong(world: World, command: Any) -> None:
    """With the first attempt, and not only at the deadline of a day."""
    await world.service.stop()
    running = await command("payments", "ProbeService/probe", "{}")
    line = await asyncio.wait_for(running.stderr.readline(), 60)
    assert line.startswith(b"bridge.handler_not_reached: endpoint payments (127.0.0.1:")
    assert b"was not reached in attempt 1 of call" in line
    assert b"cannot connect: ConnectionRefusedError" in line
    running.send_signal(signal.SIGINT)
    await running.wait()
