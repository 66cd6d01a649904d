"""`callback-bridge receiver doctor` and `handler doctor`: each rung is broken once, and above it nothing is claimed."""

import json
import re
import socket
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from types import ModuleType

import pytest
import pytest_asyncio
from temporalio.client import Client
from temporalio.service import RPCError, RPCStatusCode
from temporalio.worker import Worker

import caller
import handler
from bridge.admin.command import CommandError
from bridge.admin.init import local_settings
from bridge.admin.pair import write_new
from bridge.runtime.settings import load
from bridge.security.keys import new_key
from bridge.temporal.pollers import workers_seen
from caller import CallerPlugin
from caller.admin.doctor import doctor as caller_doctor
from caller.settings import CallerSettings
from handler import HandlerPlugin
from handler.admin.doctor import doctor as handler_doctor
from handler.settings import HandlerSettings
from scripts.environment.server import Server, free_ports
from tests.support.callers import CallingWorkflow
from tests.support.helpers import CALLER, HANDLER, assert_eventually
from tests.support.targets import ProbeWorkflow
from tests.support.world import Listener

Report = dict[str, tuple[str, str]]


@pytest_asyncio.fixture(loop_scope="session", scope="module")
async def sides(server: Server, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Path]:
    """The folder with the settings of two sides that run, with their workers on `orders` and `payments`."""
    folder = tmp_path_factory.mktemp("settings")
    receiver_port, service_port = free_ports(2)
    settings = local_settings(
        receiver_url=f"http://127.0.0.1:{receiver_port}",
        service_url=f"http://127.0.0.1:{service_port}",
        receiver_port=receiver_port,
        service_port=service_port,
        task_queue="doctor-payments",
    )
    write_new(folder, settings)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("BRIDGE_CONFIG", str(folder / "caller.toml"))
        ours = load(CallerSettings)
        environment.setenv("BRIDGE_CONFIG", str(folder / "handler.toml"))
        theirs = load(HandlerSettings, sweep=False)
    orders = await Client.connect(server.address, namespace=CALLER)
    payments = await Client.connect(server.address, namespace=HANDLER)
    module = ModuleType("served")
    vars(module)["workflow"] = ProbeWorkflow
    receiver = Listener(receiver_port, lambda: caller.create_app(ours, client=orders))
    service = Listener(service_port, lambda: handler.create_app(theirs, module, client=payments))
    await receiver.start()
    await service.start()
    async with (
        Worker(orders, task_queue="doctor-orders", workflows=[CallingWorkflow], plugins=[CallerPlugin(ours)]),
        Worker(payments, task_queue="doctor-payments", workflows=[ProbeWorkflow], plugins=[HandlerPlugin(theirs)]),
        Worker(payments, task_queue="doctor-plain", workflows=[ProbeWorkflow], identity="7@plain"),
    ):

        async def poll() -> None:
            assert (await workers_seen(orders, "doctor-orders", "CallerPlugin"))[0] is None
            assert (await workers_seen(payments, "doctor-payments", "HandlerPlugin"))[0] is None
            assert "7@plain" in str((await workers_seen(payments, "doctor-plain", "HandlerPlugin"))[0])

        await assert_eventually(poll)
        yield folder
    await service.stop()
    await receiver.stop()


@pytest.fixture(autouse=True)
def _environment(server: Server, sides: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEMPORAL_ADDRESS", server.address)
    monkeypatch.delenv("TEMPORAL_NAMESPACE", raising=False)


async def examined(
    side: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Report:
    """The findings of `doctor` by rung: state and text. It fails exactly when a rung does not hold."""
    monkeypatch.setenv("BRIDGE_CONFIG", str(folder / f"{side}.toml"))
    capsys.readouterr()
    error = ""
    try:
        await (
            caller_doctor(task_queue="doctor-orders", as_json=True)
            if side == "caller"
            else handler_doctor(as_json=True)
        )
    except CommandError as failed:
        error = str(failed)
    findings = json.loads(capsys.readouterr().out)
    assert bool(error) == any(each["state"] == "wrong" for each in findings)
    return {each["rung"]: (each["state"], each["found"]) for each in findings}


async def test_two_healthy_sides_have_no_finding(
    sides: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], server: Server
) -> None:
    """Every rung is shown with what was seen. What a server does not name is not claimed."""
    peer = "address, connection, signed answer, version, clock, way back"
    for side, queue, names in (
        ("caller", "doctor-orders", ("payments",)),
        ("handler", "doctor-payments", (CALLER,)),
    ):
        report = await examined(side, sides, monkeypatch, capsys)
        assert report.pop("limits")[0] == ("ok" if server.release >= (1, 32) else "not known")
        state, workers = report.pop("workers")
        assert state == "ok"
        assert re.fullmatch(rf"poll {queue} \(last seen (in )?\d+[sm]( ago)?\)", workers)
        assert report == {
            "settings": ("ok", str(sides / f"{side}.toml")),
            "Temporal": ("ok", f"{server.address}, server {server.version}"),
            "namespace": ("ok", f"{CALLER if side == 'caller' else HANDLER}, keeps closed runs for 24 h"),
            **{f"{name}: {peer}": ("ok", "") for name in names},
        }


@pytest.mark.parametrize(
    ("side", "variables", "rung", "says"),
    [
        ("caller", {"BRIDGE_RECEIVER__PROT": "1"}, "settings", "did you mean BRIDGE_RECEIVER__PORT?"),
        ("handler", {"BRIDGE_HASH_KEY": "short"}, "settings", "hash_key: a key "),
        ("caller", {"TEMPORAL_ADDRESS": "127.0.0.1:1"}, "Temporal", "cannot connect to Temporal at 127.0.0.1:1"),
        ("handler", {"TEMPORAL_NAMESPACE": CALLER}, "Temporal", f"connected to namespace {CALLER}, but"),
        ("caller", {"BRIDGE_NAMESPACE": "nope"}, "Temporal", "create it: temporal operator namespace create"),
        (
            "handler",
            {"BRIDGE_TASK_QUEUE": "other"},
            "workers",
            f"no worker polls task queue other in namespace {HANDLER}",
        ),
        ("handler", {"BRIDGE_TASK_QUEUE": "doctor-plain"}, "workers", "has no HandlerPlugin: 7@plain; add it: Worker("),
        (
            "caller",
            {"BRIDGE_ENDPOINTS__PAYMENTS__URL": "http://no.invalid/c/order-prod"},
            "payments: address",
            "is the",
        ),
        ("caller", {"BRIDGE_ENDPOINTS__PAYMENTS__NETWORKS": "[]"}, "payments: address", "has to be in `networks`"),
        (
            "caller",
            {"BRIDGE_ENDPOINTS__PAYMENTS__URL": "http://127.0.0.1:1/c/x"},
            "payments: connection",
            "is the peer up",
        ),
        ("caller", {"BRIDGE_ENDPOINTS__PAYMENTS__URL": "{service}/pay/c/x"}, "payments: signed answer", "answered 404"),
        (
            "caller",
            {"BRIDGE_ENDPOINTS__PAYMENTS__URL": "{tls}/c/x"},
            "payments: TLS",
            "TLS failed: WRONG_VERSION_NUMBER: is the peer up",
        ),
        (
            "caller",
            {"BRIDGE_HANDLERS__PAYMENT_PROD__START_KEYS__KEYS__K1": new_key()},
            "payments: signed answer",
            "compare keys, key ids and clocks",
        ),
        (
            "caller",
            {"BRIDGE_RECEIVER__URL": "https://elsewhere.example"},
            "payments: way back",
            "the handler's settings need its address in this caller's callbacks",
        ),
        ("handler", {"BRIDGE_SERVICE__URL": "http://127.0.0.1:1"}, "order-prod: connection", "is the"),
        (
            "handler",
            {"BRIDGE_CALLERS__ORDER_PROD__CALLBACKS": '[{"url": "https://elsewhere.example/callbacks"}]'},
            "order-prod: way back",
            "the handler service could not reach the receiver: callback url is not allowed",
        ),
    ],
)
async def test_a_broken_rung_is_named_and_nothing_above_it_is_claimed(
    sides: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    side: str,
    caplog: pytest.LogCaptureFixture,
    variables: dict[str, str],
    rung: str,
    says: str,
) -> None:
    """The rungs below hold, and those above are not checked."""
    monkeypatch.setenv("BRIDGE_CONFIG", str(sides / "caller.toml"))
    service = load(CallerSettings).endpoints["payments"].url.removesuffix(f"/c/{CALLER}")
    for name, value in variables.items():
        tls = service.replace("http:", "https:")
        monkeypatch.setenv(name, value.replace("{service}", service).replace("{tls}", tls))
    report = await examined(side, sides, monkeypatch, capsys)
    state, found = report[rung]
    assert state == "wrong"
    assert says in found
    group = (
        [each for each in report if each.partition(":")[0] == rung.partition(":")[0]] if ":" in rung else [*report][:5]
    )
    after = group[group.index(rung) + 1 :]
    assert {report[each][0] for each in after} <= {"not checked"}
    assert {report[each][0] for each in group[: group.index(rung)]} <= {"ok", "not known"}
    assert "Unhandled exception" not in caplog.text
    if rung == "settings":
        assert len(report) == 5, "a peer was asked with settings that cannot be used"


async def test_rights_that_are_missing_are_named(
    sides: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Temporal refuses the description of the namespace. The development server refuses nothing, hence the fake."""

    async def refused(_: Client) -> None:
        raise RPCError("no", RPCStatusCode.PERMISSION_DENIED, b"")

    monkeypatch.setattr("bridge.admin.doctor.describe_namespace", refused)
    report = await examined("handler", sides, monkeypatch, capsys)
    assert report["namespace"][0] == "wrong"
    assert "PERMISSION_DENIED: no: the credentials of this process need the right" in report["namespace"][1]
    assert report["workers"] == ("not checked", "")


async def test_a_caller_without_a_task_queue_claims_nothing_about_workers(
    sides: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its settings name none. The report is a table for people."""
    monkeypatch.setenv("BRIDGE_CONFIG", str(sides / "caller.toml"))
    capsys.readouterr()
    with pytest.raises(CommandError):
        await caller_doctor(peer="other-team")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["STATE", "RUNG", "FOUND"]
    assert lines[-2] == "not known  workers    --task-queue names the task queue to check"
    assert lines[-1].startswith("wrong      peer       the settings have no such peer")
    assert len(lines) == 7, "a peer that was not asked for was checked"


async def test_a_service_on_the_port_that_gives_no_answer_is_no_peer(
    sides: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It accepts the connection and is silent."""
    monkeypatch.setattr("bridge.http.peer_check._TIMEOUT", timedelta(milliseconds=300))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/c/x"
        monkeypatch.setenv("BRIDGE_ENDPOINTS__PAYMENTS__URL", url)
        report = await examined("caller", sides, monkeypatch, capsys)
    assert "no answer in time" in report["payments: signed answer"][1]


async def test_a_peer_that_the_settings_do_not_have_is_no_success(
    sides: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A misspelled name must not pass as a peer that was checked."""
    for side, check in (("caller", caller_doctor), ("handler", handler_doctor)):
        monkeypatch.setenv("BRIDGE_CONFIG", str(sides / f"{side}.toml"))
        with pytest.raises(CommandError, match="1 of the checks failed"):
            await check(peer="paymets")
        assert "the settings have no such peer" in capsys.readouterr().out
