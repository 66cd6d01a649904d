"""One trace over both hops: the order's workflow, its activity, the handler service, the payment, and the way back."""

import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
import pytest_asyncio
from aiohttp import web
from opentelemetry import baggage, context, trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from temporalio.contrib.opentelemetry import TracingInterceptor

from bridge.runtime.tracing import span, trace_headers
from handler.delivery.calls import read_memo
from scripts.environment.server import Server
from scripts.environment.stack import ROOT
from tests.support.helpers import HANDLER, assert_eventually
from tests.support.targets import Ask
from tests.support.world import World, events, running_world

TRACED = {
    "bridge.start": "RunActivity:bridge.start_operation",
    "RunWorkflow:ProbeWorkflow": "bridge.start",
    "bridge.deliver": "bridge.start",
    "bridge.complete": "bridge.deliver",
}
"""Spans over the two hops, and their parents."""


@pytest.fixture(scope="module")
def exporter() -> Iterator[InMemorySpanExporter]:
    """The tests of other modules run without a tracer provider: their messages have no trace headers."""
    made = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(made))
    with pytest.MonkeyPatch.context() as patch:
        # The provider of a process can be set only once, and other tests have theirs.
        patch.setattr(trace, "_TRACER_PROVIDER", provider)
        yield made


def traced(mode: str) -> Callable[[World], None]:
    """Both teams trace their workers; each treats the other's context by *mode*."""

    def prepare(world: World) -> None:
        world.caller_client_options = {"interceptors": [TracingInterceptor()]}
        world.worker_options = {"interceptors": [TracingInterceptor()]}
        world.peer_options = {"trace": mode}
        keys = {"start_keys": world.keys.start, "completion_keys": world.keys.completion}
        world.caller_options = {"handlers": {HANDLER: {**keys, "trace": mode}}}

    return prepare


@pytest_asyncio.fixture(loop_scope="session")
async def sent() -> AsyncIterator[list[web.Request]]:
    yield []


async def called(world: World, exporter: InMemorySpanExporter, sent: list[web.Request]) -> dict[str, ReadableSpan]:
    """The spans of one call, by name; *sent* gets the requests of both hops."""

    async def keep(request: web.Request) -> None:
        sent.append(request)

    world.service.before = world.receiver.before = keep
    exporter.clear()
    ask = Ask(key=world.key())
    token = context.attach(baggage.set_baggage("secret", "of the order team"))
    handle = await world.call(ask)
    context.detach(token)
    await handle.result()
    assert "MARKER_RECORDED" not in await events(handle)
    assert len(await events(handle)) == 11

    async def complete() -> dict[str, ReadableSpan]:
        spans = {each.name: each for each in exporter.get_finished_spans()}
        assert "CompleteWorkflow:CallingWorkflow" in spans
        return spans

    return await assert_eventually(complete)


def trace_ids(spans: dict[str, ReadableSpan], *names: str) -> set[int]:
    return {spans[name].context.trace_id for name in names}


async def test_a_call_is_one_trace(server: Server, exporter: InMemorySpanExporter, sent: list[web.Request]) -> None:
    """From the client that starts the order to the receiver that resumes it, each span has the right parent."""
    async with running_world(server, prepare=traced("continue")) as world:
        spans = await called(world, exporter, sent)
    assert len(trace_ids(spans, "StartWorkflow:CallingWorkflow", *TRACED, *TRACED.values())) == 1
    for name, parent in TRACED.items():
        assert spans[name].parent is not None
        assert spans[name].parent.span_id == spans[parent].context.span_id, name  # type: ignore[union-attr]
    assert len(sent) == 2
    for request in sent:
        assert "traceparent" in request.headers
        assert "baggage" not in request.headers


async def test_no_secret_is_in_a_trace(server: Server, exporter: InMemorySpanExporter, sent: list[web.Request]) -> None:
    """Neither keys nor the callback token nor the input."""
    async with running_world(server, prepare=traced("continue")) as world:
        ask = Ask(key=world.key(), text="planted-input-4711")
        await (await world.call(ask)).result()
        described = await world.target(ask).describe()
        memo = await read_memo(world.handler_client.data_converter, described.raw_info)

        async def exported() -> str:
            text = "".join(each.to_json() for each in exporter.get_finished_spans())
            assert all(each in text for each in ("bridge.complete", ask.key))
            return text

        text = await assert_eventually(exported)
    assert memo is not None
    assert memo.callback_url is not None
    keys = (world.keys.start, world.keys.completion, world.keys.callback)
    secrets = [each.get_secret_value() for key_set in keys for each in key_set.keys.values()]
    secrets += [world.keys.hash, memo.callback_url.partition("sig=")[2], ask.text]
    assert not [secret[:3] for secret in secrets if secret in text]


async def test_a_link_keeps_two_traces(server: Server, exporter: InMemorySpanExporter, sent: list[web.Request]) -> None:
    """The handler's trace is its own, and its first span links to the caller's; likewise on the way back."""
    async with running_world(server, prepare=traced("link")) as world:
        spans = await called(world, exporter, sent)
    ids = trace_ids(spans, "RunActivity:bridge.start_operation", "bridge.start", "bridge.deliver", "bridge.complete")
    assert len(ids) > 2
    for name, source in (("bridge.start", "RunActivity:bridge.start_operation"), ("bridge.complete", "bridge.deliver")):
        assert spans[name].parent is None
        [link] = spans[name].links
        assert link.context.span_id == spans[source].context.span_id


async def test_off_sends_and_reads_nothing(
    server: Server, exporter: InMemorySpanExporter, sent: list[web.Request]
) -> None:
    """No header crosses, and no span of ours is made."""
    async with running_world(server, prepare=traced("off")) as world:
        spans = await called(world, exporter, sent)
    assert not [name for name in spans if name.startswith("bridge.")]
    assert not [request for request in sent if "traceparent" in request.headers]


@pytest.mark.parametrize("text", ["", "00-0-0-00", "x" * 5000, "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "\x1b[2J"])
def test_an_unreadable_context_begins_a_trace(exporter: InMemorySpanExporter, text: str) -> None:
    """A peer's header is never an error."""
    exporter.clear()
    with span("bridge.start", {"traceparent": text, "tracestate": text}, "continue"):
        assert text not in trace_headers().values() or not text
    [made] = exporter.get_finished_spans()
    assert made.parent is None


def test_a_span_names_no_text_of_an_error(exporter: InMemorySpanExporter) -> None:
    """The text may hold a callback URL."""
    exporter.clear()
    with pytest.raises(ValueError, match="sig="), span("bridge.start", {}, "continue"):
        int("https://h/?sig=1")
    [made] = exporter.get_finished_spans()
    assert made.status.description == "ValueError"
    assert not made.events


def test_without_the_package_nothing_changes() -> None:
    """Both sides import, and the functions do nothing."""
    code = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "import caller, handler\n"
        "from bridge.runtime.tracing import span, trace_fields, trace_headers, workflow_header\n"
        "with span('x', {'traceparent': 'y'}, 'continue'):\n"
        "    assert not (trace_headers() or trace_fields() or workflow_header())\n"
        "import os; os._exit(0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
