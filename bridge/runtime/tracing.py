"""One trace over both hops, by OpenTelemetry: the extra `otel`. Without the package every function does nothing.

Only the W3C headers `traceparent` and `tracestate` cross, never baggage. They are not signed, because proxies add spans
of their own. No decision depends on them, and they are read only after the sender is authenticated.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

from temporalio.api.common.v1 import Payload
from temporalio.converter import PayloadConverter

try:
    from opentelemetry import trace
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError:
    IS_AVAILABLE = False
else:
    IS_AVAILABLE = True
    _W3C = TraceContextTextMapPropagator()

TraceMode = Literal["continue", "link", "off"]
"""What a peer's trace context means: our spans belong to its trace, only link to it, or no context crosses."""

TRACEPARENT = "traceparent"
_HEADERS = (TRACEPARENT, "tracestate")
_WORKFLOW_HEADER = "_tracer-data"
"""Where `temporalio.contrib.opentelemetry` looks for the context of a workflow."""


def trace_headers() -> dict[str, str]:
    """Return the W3C headers of the current span; empty without one."""
    carrier: dict[str, str] = {}
    if IS_AVAILABLE:
        _W3C.inject(carrier)
    return carrier


def workflow_header() -> dict[str, Payload]:
    """Return the header fields by which the interceptor of a worker continues the current trace in a workflow."""
    carrier = trace_headers()
    return {_WORKFLOW_HEADER: PayloadConverter.default.to_payloads([carrier])[0]} if carrier else {}


def trace_fields() -> dict[str, str | int]:
    """Return the ids of the current span, as fields of log lines; empty without one."""
    context = trace.get_current_span().get_span_context() if IS_AVAILABLE else None
    if context is None or not context.is_valid:
        return {}
    return {"bridge.trace_id": f"{context.trace_id:032x}", "bridge.span_id": f"{context.span_id:016x}"}


@contextmanager
def span(name: str, headers: Mapping[str, str], mode: TraceMode) -> Iterator[None]:
    """Run a block in a span that continues the trace in *headers*, or links to it. Its status names no error's text."""
    if not IS_AVAILABLE or mode == "off":
        yield
        return
    remote = _W3C.extract({each: headers[each] for each in _HEADERS if each in headers}, context=Context())
    sender = trace.get_current_span(remote).get_span_context()
    with trace.get_tracer("callback-bridge").start_as_current_span(
        name,
        context=remote if mode == "continue" else Context(),
        links=[trace.Link(sender)] if mode == "link" and sender.is_valid else (),
        record_exception=False,
        set_status_on_exception=False,
    ) as current:
        try:
            yield
        except Exception as error:
            current.set_status(trace.Status(trace.StatusCode.ERROR, type(error).__name__))
            raise
