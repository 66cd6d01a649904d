"""The Kubernetes manifests, as far as tests without a cluster can verify them."""

import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from bridge.http.application import create_app
from bridge.http.listener import SHUTDOWN_TIMEOUT
from bridge.runtime.settings import load
from caller.settings import CallerSettings
from examples.payments.workers import STOP_TIMEOUT
from handler.delivery.dispatcher import DRAIN
from handler.settings import HandlerSettings
from scripts.environment.stack import ROOT
from tests.support.kustomize import Resource, render

FOLDER = ROOT / "deploy" / "kubernetes"
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
SERVICES = {"caller": "receiver-1", "handler": "handler-1"}
WORKERS = {"caller": "order-worker", "handler": "payment-worker"}
RESERVE = timedelta(seconds=5)

Rendered = dict[str, Resource]


@pytest.fixture(name="resources", scope="module", params=["caller", "handler"])
def rendered(request: pytest.FixtureRequest) -> tuple[str, Rendered]:
    """A side, and its resources by kind and name without the prefix."""
    side: str = request.param
    resources = render(FOLDER / side)
    found = {f"{each['kind']} {each['metadata']['name'].rpartition('-')[2]}": each for each in resources}
    assert len(found) == len(resources)
    return side, found


def pod(resources: Rendered, name: str) -> dict[str, Any]:
    spec: dict[str, Any] = resources[f"Deployment {name}"]["spec"]["template"]["spec"]
    return spec


def container(resources: Rendered, name: str) -> dict[str, Any]:
    [found] = pod(resources, name)["containers"]
    assert isinstance(found, dict)
    return found


def variables(resources: Rendered, name: str) -> dict[str, str]:
    return {each["name"]: each["value"] for each in container(resources, name)["env"]}


@pytest.mark.parametrize("version", ["1.27", "1.37"])
def test_every_resource_is_valid_on_the_oldest_and_the_newest_kubernetes(
    resources: tuple[str, Rendered], version: str
) -> None:
    """By the strict schemas, which refuse unknown fields."""
    _, found = resources
    assert set(found) == {
        *("Deployment service", "Service service", "PodDisruptionBudget service"),
        *("Deployment worker", "PodDisruptionBudget worker"),
    }
    for resource in found.values():
        kubernetes_validate.validate(resource, version, strict=True)


def test_the_schemas_refuse_a_misspelled_field(resources: tuple[str, Rendered]) -> None:
    _, found = resources
    wrong = {**found["Service service"], "spec": {"selectors": {}}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, "1.37", strict=True)


@pytest.mark.parametrize("links", [False, True], ids=["no service links", "service links"])
def test_the_settings_load_in_a_pod(
    resources: tuple[str, Rendered], links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with the variables that Kubernetes makes for each Service of the namespace."""
    side, found = resources
    folder = tmp_path / "secrets"
    subprocess.run([sys.executable, ROOT / "deploy" / "new_secrets.py", folder], check=True)
    given = {**variables(found, "service"), "BRIDGE_CONFIG": str(folder / f"{side}.toml")}
    for name in ("bridge", "bridge-receiver", found["Service service"]["metadata"]["name"]) if links else ():
        upper = name.upper().replace("-", "_")
        address = "10.96.0.7"
        given |= {f"{upper}_SERVICE_HOST": address, f"{upper}_SERVICE_PORT": "80", f"{upper}_SERVICE_PORT_HTTP": "80"}
        given |= {f"{upper}_PORT": f"tcp://{address}:80", f"{upper}_PORT_80_TCP": f"tcp://{address}:80"}
        given |= {f"{upper}_PORT_80_TCP_PROTO": "tcp", f"{upper}_PORT_80_TCP_PORT": "80"}
        given |= {f"{upper}_PORT_80_TCP_ADDR": address}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    settings = load(CallerSettings) if side == "caller" else load(HandlerSettings)
    listener = settings.receiver if isinstance(settings, CallerSettings) else settings.service
    assert listener is not None
    assert listener.host == "0.0.0.0"
    ports = {each["name"]: each["containerPort"] for each in container(found, "service")["ports"]}
    assert settings.metrics_address == f"0.0.0.0:{ports['metrics']}"
    assert listener.port == ports["http"]
    annotations = found["Deployment service"]["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(ports["metrics"])


async def test_probes_and_services_name_ports_and_routes_that_exist(resources: tuple[str, Rendered]) -> None:
    _, found = resources
    service = container(found, "service")
    ports = {each["name"] for each in service["ports"]}

    async def ready() -> bool:
        return True

    routes = {route.resource.canonical for route in create_app(ready).router.routes() if route.resource is not None}
    probes = {name: each["httpGet"] for name, each in service.items() if name.endswith("Probe")}
    assert {name: each["path"] for name, each in probes.items()} == {
        "startupProbe": "/livez",
        "livenessProbe": "/livez",
        "readinessProbe": "/readyz",
    }
    assert {each["path"] for each in probes.values()} <= routes
    assert {each["port"] for each in probes.values()} <= ports
    assert {each["targetPort"] for each in found["Service service"]["spec"]["ports"]} == {"http"}


def test_commands_and_health_checks_are_those_of_the_compose_file(resources: tuple[str, Rendered]) -> None:
    """Other tests run these commands."""
    side, found = resources
    for name, compose in (("service", COMPOSE[SERVICES[side]]), ("worker", COMPOSE[WORKERS[side]])):
        given = variables(found, name)
        assert container(found, name)["command"] == compose["command"]
        assert given["TEMPORAL_NAMESPACE"] == compose["environment"]["TEMPORAL_NAMESPACE"]
        image = container(found, name)["image"].rpartition("/")[2]
        assert image == compose["image"]
    probe = container(found, "worker")["readinessProbe"]["exec"]["command"]
    assert ["CMD", *probe] == COMPOSE[WORKERS[side]]["healthcheck"]["test"]
    assert "livenessProbe" not in container(found, "worker")


@pytest.mark.parametrize("name", ["service", "worker"])
def test_selectors_find_the_pods_of_one_deployment(resources: tuple[str, Rendered], name: str) -> None:
    """A rolling restart and a drained node leave at least one copy."""
    _, found = resources
    labels = {
        each: found[f"Deployment {each}"]["spec"]["template"]["metadata"]["labels"] for each in ("service", "worker")
    }
    deployment, budget = (found[f"{kind} {name}"]["spec"] for kind in ("Deployment", "PodDisruptionBudget"))
    selectors = [deployment["selector"]["matchLabels"], budget["selector"]["matchLabels"]]
    selectors += [each["labelSelector"]["matchLabels"] for each in pod(found, name)["topologySpreadConstraints"]]
    selectors += [found["Service service"]["spec"]["selector"]] if name == "service" else []
    for selector in selectors:
        assert [each for each in labels if selector.items() <= labels[each].items()] == [name]
    assert deployment["replicas"] > budget["maxUnavailable"] == 1
    assert deployment["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}


def test_a_pod_has_more_time_than_its_graceful_stop_takes(resources: tuple[str, Rendered]) -> None:
    _, found = resources
    [sleep, seconds] = container(found, "service")["lifecycle"]["preStop"]["exec"]["command"]
    assert sleep == "sleep"
    stops = {"service": timedelta(seconds=int(seconds)) + SHUTDOWN_TIMEOUT, "worker": STOP_TIMEOUT + DRAIN}
    for name, stop in stops.items():
        assert timedelta(seconds=pod(found, name)["terminationGracePeriodSeconds"]) >= stop + RESERVE


@pytest.mark.parametrize("name", ["service", "worker"])
def test_the_settings_are_a_mounted_folder_that_only_the_pod_reads(resources: tuple[str, Rendered], name: str) -> None:
    """With a `subPath` changed keys would never arrive. The page makes the secret with this name and this file."""
    side, found = resources
    [volume] = pod(found, name)["volumes"]
    [mount] = container(found, name)["volumeMounts"]
    assert mount == {"name": volume["name"], "mountPath": "/etc/bridge", "readOnly": True}
    assert volume["secret"]["defaultMode"] == 0o440
    file = Path(variables(found, name)["BRIDGE_CONFIG"])
    assert str(file.parent) == mount["mountPath"]
    namespace = found[f"Deployment {name}"]["metadata"]["namespace"]
    command = (
        f"kubectl --namespace {namespace} create secret generic {volume['secret']['secretName']} "
        f"--from-file={file.name}={side}.toml"
    )
    assert command in (ROOT / "docs" / "deployment.md").read_text()


@pytest.mark.parametrize("name", ["service", "worker"])
def test_a_pod_runs_without_rights(resources: tuple[str, Rendered], name: str) -> None:
    _, found = resources
    spec = pod(found, name)
    [user] = re.findall(r"^USER (\d+):\1$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert spec["securityContext"] == {
        "runAsNonRoot": True,
        **dict.fromkeys(("runAsUser", "runAsGroup", "fsGroup"), int(user)),
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert container(found, name)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert spec["automountServiceAccountToken"] is spec["enableServiceLinks"] is False
