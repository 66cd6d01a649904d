"""What `/metrics` shows before and after a call, a lost callback, a refused delivery and a request of a stranger."""

import asyncio
import functools
import json
import logging
import re
import subprocess
import urllib.request
from collections.abc import AsyncIterator, Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import pytest_asyncio
import yaml
from aiohttp import ClientSession, web
from temporalio.client import WorkflowFailureError
from temporalio.worker import Worker
from yarl import URL

from bridge.errors import UntrustedError, reason_label
from bridge.runtime.metrics import COUNTERS, DURATIONS, GAUGES, Metrics, new_runtime
from bridge.runtime.reloaded import Alarm
from bridge.runtime.settings import SettingsError
from handler.delivery.activities import UndeliveredOutcome
from handler.plugin import HandlerPlugin
from handler.reports.open_deliveries import watch_deliveries
from scripts.environment.server import Server, free_ports
from scripts.environment.stack import ROOT
from tests.support.callers import CallPlan
from tests.support.debian import debian_program
from tests.support.helpers import CALLER, HANDLER, assert_eventually
from tests.support.targets import TARGETS, Ask
from tests.support.world import World, running_world

HOSTILE = 'x"} evil 1\n# HELP'
_SAMPLE = re.compile(r"^(bridge_\w+)\{(.*)\} (\S+)$", re.MULTILINE)


class Scrapes:
    """Texts of one exporter, in the order of the scenario."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.texts: dict[str, str] = {}
        self.undelivered: list[UndeliveredOutcome] = []
        self.log: list[logging.LogRecord] = []

    async def read(self) -> str:
        url = f"http://{self.address}/metrics"
        return (await asyncio.to_thread(urllib.request.urlopen, url)).read().decode()  # type: ignore[no-any-return]

    async def take(self, name: str) -> None:
        self.texts[name] = await self.read()

    def value(self, scrape: str, metric: str, **labels: str) -> float:
        """The sum of the samples of *metric* that have at least these labels."""
        wanted = {f'{name}="{value}"' for name, value in labels.items()}
        samples = _SAMPLE.findall(self.texts[scrape])
        return sum(float(value) for name, found, value in samples if name == metric and all(w in found for w in wanted))

    def added(self, before: str, after: str, metric: str, **labels: str) -> float:
        return self.value(after, metric, **labels) - self.value(before, metric, **labels)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def scrapes(server: Server) -> AsyncIterator[Scrapes]:
    """The whole scenario, once."""
    [port] = free_ports(1)
    found = Scrapes(f"127.0.0.1:{port}")
    runtime = new_runtime(found.address)

    def prepare(world: World) -> None:
        world.handler_runtime = runtime
        world.caller_client_options = {"runtime": runtime}

    records = logging.Handler()
    records.emit = found.log.append  # type: ignore[assignment, method-assign]
    logging.getLogger("handler.delivery.activities").addHandler(records)
    async with running_world(server, prepare=prepare, without=("handler",)) as world:

        def hook(outcome: UndeliveredOutcome) -> None:
            found.undelivered.append(outcome)
            if len(found.undelivered) == 1:
                message = "the pager is down"
                raise OSError(message)

        worker = Worker(
            world.handler_client,
            task_queue=world.payment_queue,
            workflows=TARGETS,
            plugins=[HandlerPlugin(world.handler_settings, on_undelivered=hook)],
        )
        async with worker:
            await _scenario(world, found)
        yield found
    logging.getLogger("handler.delivery.activities").removeHandler(records)


async def _scenario(world: World, found: Scrapes) -> None:
    await found.take("begin")
    await (await world.call(Ask(key=world.key()))).result()
    failing = await world.call(Ask(key=world.key(), behaviour="fail"))
    with pytest.raises(WorkflowFailureError):
        await failing.result()
    await found.take("calls")

    async def lost(request: web.Request) -> web.StreamResponse:
        return web.Response(status=502, text="a proxy's page")

    world.receiver.before = lost
    await (await world.call(Ask(key=world.key()), CallPlan(first_lease=1))).result()
    metrics = Metrics.of(world.handler_client)
    Alarm("keys", metrics).raised(ValueError("a bad file"))
    watching = asyncio.create_task(watch_deliveries(world.handler_client, metrics, [CALLER], every_s=0.2))

    async def gauged() -> None:
        await found.take("lost")
        assert found.value("lost", "bridge_deliveries_open", caller=CALLER) > 0
        assert found.value("lost", "bridge_delivery_oldest_seconds", caller=CALLER) > 0

    await assert_eventually(gauged)
    watching.cancel()
    world.receiver.before = None

    async def repeated() -> None:
        await found.take("repeated")
        assert found.added("lost", "repeated", "bridge_completions_total", outcome="repeated") == 1

    await assert_eventually(repeated)

    async def refused(request: web.Request) -> web.StreamResponse:
        return world.signed_response(request, 400)

    world.receiver.before = refused
    handle = await world.call(Ask(key=world.key()), CallPlan(first_lease=600))

    async def reported() -> None:
        assert len(found.undelivered) == 2
        await found.take("refused")

    await assert_eventually(reported)
    await handle.terminate()
    world.receiver.before = None
    async with ClientSession() as session:
        hostile = quote(HOSTILE, safe="")
        for path in (f"/c/{CALLER}/{hostile}/{hostile}", f"/c/evil/{hostile}/b"):
            async with session.post(URL(world.service.url + path, encoded=True), data=b"{}") as answered:
                assert answered.status == 401
        callback = URL(f"{world.receiver.url}/callbacks/x?sig={hostile}", encoded=True)
        async with session.post(callback, data=b"{}") as answered:
            assert answered.status == 401
    await found.take("end")


def test_a_call_is_counted_on_both_sides(scrapes: Scrapes) -> None:
    """One start, one completion and one end for each call, with its duration."""
    added = functools.partial(scrapes.added, "begin", "calls")
    call = {"endpoint": "payments", "operation": "ProbeService/probe"}
    assert added("bridge_calls_total", **call, transport="callback", outcome="succeeded") == 1
    assert added("bridge_calls_total", **call, transport="callback", outcome="failed") == 1
    assert added("bridge_calls_total") == 2
    assert added("bridge_call_duration_seconds_count", **call) == 2
    assert added("bridge_starts_total", caller=CALLER, operation="ProbeService/probe", code="201") == 2
    assert added("bridge_start_duration_seconds_count", caller=CALLER) == 2
    assert added("bridge_completions_total", handler=HANDLER, outcome="completed") == 2
    assert added("bridge_callback_to_resume_seconds_count", handler=HANDLER) == 2
    assert added("bridge_key_uses_total", peer=CALLER, key_id="k1") >= 2
    assert added("bridge_key_uses_total", peer=HANDLER, key_id="k1") >= 2
    for quiet in ("bridge_renewals_total", "bridge_untrusted_total", "bridge_unsigned_answers_total"):
        assert added(quiet) == 0


def test_a_lost_callback_is_seen_on_both_sides(scrapes: Scrapes) -> None:
    """The caller got the outcome by a renewal; the handler got an unsigned answer and keeps a delivery open."""
    added = functools.partial(scrapes.added, "calls", "lost")
    assert added("bridge_renewals_total", endpoint="payments", result="outcome") == 1
    assert added("bridge_unsigned_answers_total", peer=CALLER, code="502") >= 1
    assert added("bridge_completions_total") == 0
    assert added("bridge_calls_total", outcome="succeeded") == 1


def test_an_undelivered_outcome_is_an_event(scrapes: Scrapes) -> None:
    """One log line of its own name, one count, and the team's hook, which is called again after its error."""
    assert scrapes.added("repeated", "refused", "bridge_deliveries_failed_total", caller=CALLER) == 1
    assert scrapes.value("refused", "bridge_deliveries_failed_total", reason="bridge.CompletionRefused") == 1
    first, second = scrapes.undelivered
    assert first == second
    assert first.delivery_id == f"bridge-delivery-{CALLER}:{first.request_id}-{first.target_run_id}"
    assert (first.caller, first.operation, first.reason) == (CALLER, "ProbeService/probe", "bridge.CompletionRefused")
    [line] = scrapes.log
    assert "bridge.outcome_undelivered" in line.getMessage()


def test_a_strangers_words_never_become_labels(scrapes: Scrapes) -> None:
    """Requests that are not authenticated count under "unknown" and a few reasons."""
    assert scrapes.added("refused", "end", "bridge_untrusted_total", side="handler") == 2
    assert scrapes.added("refused", "end", "bridge_untrusted_total", side="receiver", reason="callback token") == 1
    assert scrapes.added("refused", "end", "bridge_starts_total", caller="unknown", operation="unknown") == 2
    assert "evil" not in scrapes.texts["end"]


def names_in(expressions: list[str]) -> set[str]:
    return {name for text in expressions for name in re.findall(r"\bbridge_\w+", text)}


def dashboard() -> list[str]:
    board: dict[str, Any] = json.loads((ROOT / "deploy" / "observability" / "dashboard.json").read_text())
    return [target["expr"] for panel in board["panels"] for target in panel["targets"]]


def alerts() -> list[str]:
    rules: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "observability" / "alerts.yaml").read_text())
    return [rule["expr"] for group in rules["groups"] for rule in group["rules"]]


def test_every_metric_of_dashboard_and_alerts_is_exported(scrapes: Scrapes) -> None:
    """And the dashboard shows every metric that the code defines."""
    exported = {name for name, _, _ in _SAMPLE.findall(scrapes.texts["end"])}
    assert names_in(alerts()) <= exported
    assert names_in(dashboard()) <= exported
    shown = {re.sub(r"_total$|_seconds_bucket$", "", name) for name in names_in(dashboard())}
    assert shown == {*COUNTERS, *DURATIONS, *GAUGES}


def test_labels_of_dashboard_and_alerts_exist(scrapes: Scrapes) -> None:
    """A label that no sample has would make an expression empty for ever."""
    labels = set(re.findall(r'(\w+)="', "".join(found for _, found, _ in _SAMPLE.findall(scrapes.texts["end"]))))
    for expression in [*dashboard(), *alerts()]:
        used = re.findall(r"by \(([^)]*)\)", expression)
        assert {each.strip() for group in used for each in group.split(",")} <= labels
        assert set(re.findall(r"[{,](\w+)[=!]", expression)) <= labels


def recorded(texts: Iterable[str], *, minutes: int) -> dict[str, str]:
    """The samples of *texts* as series with a value a minute, where each text was scraped for so many *minutes*."""
    made: dict[str, list[str]] = {}
    for number, text in enumerate(texts):
        for name, labels, value in _SAMPLE.findall(text):
            values = made.setdefault(f"{name}{{{labels}}}", ["_"] * number * minutes)
            values += [value] * minutes
    return {name: " ".join(values) for name, values in made.items()}


def fired(folder: Path, series: Mapping[str, str], expected: Mapping[str, list[dict[str, str]]], *, minute: int) -> str:
    """Evaluate the alerts on *series* at this *minute*. Returns what promtool says: nothing if just *expected* fire."""
    path = ROOT / "deploy" / "observability" / "alerts.yaml"
    rules = {rule["alert"]: rule for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]}

    def alert(name: str, labels: dict[str, str]) -> dict[str, Any]:
        texts = {
            key: re.sub(r"\{\{ \$labels\.(\w+) \}\}", lambda found: labels[found[1]], text)
            for key, text in rules[name]["annotations"].items()
        }
        return {"exp_labels": labels | rules[name]["labels"], "exp_annotations": texts}

    case = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "alert_rule_test": [
            {
                "eval_time": f"{minute}m",
                "alertname": name,
                "exp_alerts": [alert(name, each) for each in expected.get(name, ())],
            }
            for name in rules
        ],
    }
    tests = {"rule_files": [str(path)], "evaluation_interval": "1m", "tests": [case]}
    (folder / "tests.yaml").write_text(yaml.safe_dump(tests))
    done = subprocess.run(
        [debian_program("promtool", "prometheus"), "test", "rules", folder / "tests.yaml"],
        capture_output=True,
        text=True,
        check=False,
    )
    return "" if done.returncode == 0 else done.stdout + done.stderr


ALERTS = pytest.mark.part("alerts", short=True)


@ALERTS
def test_alerts_fire_on_what_was_recorded(scrapes: Scrapes, tmp_path: Path) -> None:
    """An outcome was refused, for the first time in the life of its counter. One lost callback is no reason to act."""
    texts = scrapes.texts
    quiet = recorded([texts["begin"], texts["calls"]], minutes=20)
    assert fired(tmp_path, quiet, {}, minute=39) == ""
    series = recorded(texts.values(), minutes=5)
    assert series.keys() > quiet.keys()
    expected = {"BridgeDeliveryFailed": [{"caller": CALLER, "reason": "bridge.CompletionRefused"}]}
    assert fired(tmp_path, series, expected, minute=29) == ""


@ALERTS
@pytest.mark.parametrize(
    ("alert", "series", "labels"),
    [
        ("BridgeDeliveryOverdue", {'bridge_delivery_oldest_seconds{caller="a"}': "0x68 301 361"}, {"caller": "a"}),
        (
            "BridgeStartsFail",
            {
                'bridge_starts_total{caller="a",code="201"}': "0+9x70",
                'bridge_starts_total{caller="a",code="503"}': "0+1x70",
                'bridge_starts_total{caller="b",code="201"}': "0+99x70",
                'bridge_starts_total{caller="b",code="503"}': "0+1x70",
            },
            {"caller": "a"},
        ),
        (
            "BridgeUntrusted",
            {
                'bridge_untrusted_total{side="handler",reason="clock"}': "0+1x70",
                'bridge_untrusted_total{side="handler",reason="key"}': "0 1x69",
            },
            {"side": "handler", "reason": "clock"},
        ),
        (
            "BridgeFilesNotTaken",
            {
                'bridge_files_not_taken_total{content="keys"}': "_x9 1+12x61",
                'bridge_files_not_taken_total{content="certificates"}': "_x9 1x61",
            },
            {"content": "keys"},
        ),
        (
            "BridgeUnsignedAnswers",
            {'bridge_unsigned_answers_total{peer="a",code="502"}': "0+1x70"},
            {"peer": "a", "code": "502"},
        ),
        (
            "BridgeCallbacksLost",
            {
                'bridge_renewals_total{endpoint="a",result="outcome"}': "0+1x70",
                'bridge_calls_total{endpoint="a",transport="callback"}': "0+50x70",
                'bridge_renewals_total{endpoint="b",result="outcome"}': "0+1x70",
                'bridge_calls_total{endpoint="b",transport="wait"}': "0+200x70",
                'bridge_renewals_total{endpoint="b",result="running"}': "0+9x70",
            },
            {"endpoint": "a"},
        ),
        (
            "BridgeOutcomeContradicted",
            {
                'bridge_completions_total{handler="a",outcome="conflict"}': "_x60 1x10",
                'bridge_completions_total{handler="a",outcome="repeated"}': "0+1x70",
                'bridge_completions_total{handler="b",outcome="conflict"}': "1x70",
            },
            {"handler": "a"},
        ),
    ],
)
def test_an_alert_fires_for_the_labels_that_it_names(
    tmp_path: Path, alert: str, series: dict[str, str], labels: dict[str, str]
) -> None:
    """Nothing fires for the other series, and no other alert fires."""
    assert fired(tmp_path, series, {alert: [labels]}, minute=70) == ""


@pytest.mark.parametrize(
    ("reason", "label"),
    [
        ("signed +400 s before our time; 300 s are allowed: compare the clocks", "clock"),
        ("no such peer in the settings", "unknown peer"),
        ("bearer secret missing or unknown", "key"),
        ("token not ours", "callback token"),
        ("no key of the request's key id (known here: k1)", "key"),
        ("not covered by the signature: nexus-operation-token", "signature"),
        ("Signature-Input missing, repeated or malformed", "signature"),
        ("the body's digest differs: the body was changed on the way", "signature"),
        ("something new", "other"),
    ],
)
def test_a_reason_is_one_of_a_few_labels(reason: str, label: str) -> None:
    """The reason of an UntrustedError may hold a peer's words."""
    assert reason_label(UntrustedError(reason).reason) == label


def test_an_address_in_use_is_named(scrapes: Scrapes) -> None:
    """The second process on one address does not start."""
    with pytest.raises(SettingsError, match=f"metrics_address {scrapes.address}: .*in use"):
        new_runtime(scrapes.address)


async def test_two_clocks_make_no_negative_duration(scrapes: Scrapes) -> None:
    """A completion that seems to come before its close counts as immediate."""
    runtime = new_runtime(f"127.0.0.1:{free_ports(1)[0]}")
    Metrics(runtime.metric_meter).observe("bridge_callback_to_resume", timedelta(seconds=-5), handler=HANDLER)
