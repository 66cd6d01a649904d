"""The bridge's metrics. The Temporal SDK's exporter serves them together with the SDK's own.

A label holds a name from the settings, a name of a served operation, or one of a few words. Text that a peer chooses
never becomes a label, so that the number of time series is limited.
"""

import dataclasses
from datetime import timedelta
from typing import Self

from temporalio.client import Client
from temporalio.common import MetricMeter
from temporalio.runtime import LogForwardingConfig, LoggingConfig, PrometheusConfig, Runtime, TelemetryConfig

from bridge.runtime.event_log import core_logger
from bridge.runtime.settings import SettingsError

COUNTERS = {
    "bridge_calls": "Calls that have ended: endpoint, operation, transport, outcome",
    "bridge_starts": "Starts that the handler service answered: caller, operation, code",
    "bridge_completions": "Completions that the receiver answered: handler, outcome",
    "bridge_renewals": "Renewals, and what they found: endpoint, result",
    "bridge_deliveries_failed": "Deliveries that ended without being accepted: caller, reason",
    "bridge_untrusted": "Requests that were not authenticated: side, reason",
    "bridge_unsigned_answers": "Answers that do not count, because the peer has not signed them: peer, code",
    "bridge_files_not_taken": "Looks at changed files that could not be used, while the old content stays: content",
    "bridge_key_uses": "Requests whose signature was verified: peer, key_id",
}
DURATIONS = {
    "bridge_call_duration": "Time from the schedule of a call to its end: endpoint, operation",
    "bridge_callback_to_resume": "Time from the close of the target to the end of the wait: handler",
    "bridge_start_duration": "Time that the handler service took to answer a start: caller, operation, code",
}
GAUGES = {
    "bridge_deliveries_open": "Deliveries that are still attempted: caller",
    "bridge_delivery_oldest_seconds": "Age of the oldest of them: caller",
}

_SHORT = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 3600.0)
_LONG = (0.1, 0.5, 1.0, 5.0, 30.0, 60.0, 300.0, 1800.0, 3600.0, 6 * 3600.0, *(days * 86400.0 for days in (1, 3, 7, 30)))


def new_runtime(address: str | None) -> Runtime:
    """Return a runtime that logs to Python's `temporalio.core` without task tokens.

    It serves `/metrics` on *address* (host:port), with the names of docs/observability.md; None serves none.

    Raises:
        SettingsError: The address cannot be used.
    """
    buckets = dict.fromkeys(DURATIONS, _SHORT) | {"bridge_call_duration": _LONG}
    config = PrometheusConfig(
        bind_address=address or "",
        counters_total_suffix=True,
        unit_suffix=True,
        durations_as_seconds=True,
        histogram_bucket_overrides=buckets,
    )
    # By default the SDK's core prints to standard output, which holds the line that a command announces.
    core = dataclasses.replace(LoggingConfig.default, forwarding=LogForwardingConfig(logger=core_logger()))
    try:
        return Runtime(telemetry=TelemetryConfig(logging=core, metrics=config if address else None))
    except (ValueError, RuntimeError) as error:
        message = f"metrics_address {address}: {error}; the form is 127.0.0.1:9464, an IP address and a port"
        raise SettingsError(message) from None


class Metrics:
    """The bridge's instruments on one meter. Without an exporter they do nothing."""

    def __init__(self, meter: MetricMeter) -> None:
        self.is_exported = meter is not MetricMeter.noop
        self._counters = {name: meter.create_counter(name, text) for name, text in COUNTERS.items()}
        self._durations = {name: meter.create_histogram_timedelta(name, text, "s") for name, text in DURATIONS.items()}
        self._gauges = {name: meter.create_gauge_float(name, text) for name, text in GAUGES.items()}

    @classmethod
    def of(cls, client: Client) -> Self:
        """Use the runtime of *client*."""
        return cls((client.service_client.config.runtime or Runtime.default()).metric_meter)

    def count(self, name: str, **labels: str | int) -> None:
        """Add 1 to a counter."""
        self._counters[name].add(1, labels)

    def observe(self, name: str, duration: timedelta, **labels: str | int) -> None:
        """Record *duration*, at least zero: two machines' clocks may differ."""
        self._durations[name].record(max(duration, timedelta(0)), labels)

    def set(self, name: str, value: float, **labels: str | int) -> None:
        """Set a gauge."""
        self._gauges[name].set(value, labels)
