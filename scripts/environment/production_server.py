"""Temporal's server as production has it: two nodes that form one cluster, PostgreSQL, and a load balancer.

The server is built from its source, with Go. PostgreSQL is the one that is installed, with data of its own that is
removed at the end. PostgreSQL and each node have a host of their own in 127.0.0.0/8, the loopback, and the usual ports
there. Each node runs all four of Temporal's services. Clients connect to the balancer on 127.0.0.1.
"""

import asyncio
import contextlib
import functools
import json
import os
import pwd
import secrets
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from temporalio.client import Client
from temporalio.service import RPCError

from scripts.environment.go_programs import GO_MISSING, build_program, find_go, module_folder
from scripts.environment.load_balancer import LoadBalancer
from scripts.environment.processes import ServerPart
from scripts.environment.program_cache import cached, folder_of, on_path
from scripts.environment.progress import with_ticker
from scripts.environment.temporal_cli import OLDEST, NoServerError

DATABASE = "postgresql"
NODES = ("node-1", "node-2")

_CLIENTS_HOST = "127.0.0.1"
_GRPC_PORTS = {"frontend": 7233, "history": 7234, "matching": 7235, "worker": 7239}
_MEMBERSHIP_PORTS = {"frontend": 6933, "history": 6934, "matching": 6935, "worker": 6939}
"""The schema of PostgreSQL has room for none above 32 767."""
_HTTP_PORT, _METRICS_PORT, _DATABASE_PORT = 7243, 8000, 5432
_SHARDS = 16
"""Parts of all histories, which the nodes divide among them."""
_CONNECTIONS = 20
"""Most connections of one service of one node to one of the two databases."""
_USER = "temporal"
_DATABASES = {"temporal": "temporal", "visibility": "temporal_visibility"}
"""Name of each database, by the name of its schema."""
_SYSTEM_USER = "postgres"
"""Debian's package makes it. PostgreSQL refuses to run as root: root starts it as this user."""
_MODULE = f"go.temporal.io/server@v{OLDEST}"
_PROGRAMS = f"server-programs-{OLDEST}"


@dataclass(frozen=True, kw_only=True)
class ProductionServer:
    """A cluster that answers. It has no namespace yet."""

    parts: Mapping[str, ServerPart]
    """The database and the nodes, by name."""
    frontends: Sequence[str]
    """Address of each node's frontend, not through the balancer."""
    metrics: Sequence[str]
    """URL of the Prometheus metrics of each node."""


def obstacle() -> str | None:
    """Why such a server cannot run here; None if it can."""
    if sys.platform != "linux":
        return "only Linux has more than one address on the loopback, which the nodes need"
    if not folder_of(_PROGRAMS).is_dir() and find_go() is None:
        return GO_MISSING
    if _postgresql("postgres") is None:
        return "PostgreSQL is not installed (Debian: apt-get install postgresql)"
    return None


def require_possible() -> None:
    """Refuse to go on where such a server cannot run.

    Raises:
        NoServerError: The text says what is missing.
    """
    reason = obstacle()
    if reason is not None:
        message = f"no production server: {reason}"
        raise NoServerError(message)


async def server_programs() -> Path:
    """The folder with `temporal-server`, `temporal-sql-tool` and PostgreSQL's schema, built where it is missing.

    Raises:
        RuntimeError: Go is missing, or the module cannot be downloaded or built.
    """
    if not folder_of(_PROGRAMS).is_dir():
        building = asyncio.to_thread(cached, _PROGRAMS, _build)
        await with_ticker(f"building Temporal server {OLDEST} and its tools (once)", building)
    return folder_of(_PROGRAMS)


@contextlib.asynccontextmanager
async def running_production_server(
    *, port: int, http_port: int, flags: Mapping[str, str], log_folder: Path | None
) -> AsyncIterator[ProductionServer]:
    """A new cluster, which clients reach on two free ports of 127.0.0.1, and which ends with this context.

    *flags* is the dynamic configuration, each value as JSON.

    Raises:
        NoServerError: The cluster cannot be run.
        RuntimeError: The server cannot be built.
    """
    require_possible()
    programs = await server_programs()
    # Membership in a cluster is by host. Two clusters on one machine therefore share none.
    network = f"127.{port // 256}.{port % 256}"
    database_host, hosts = f"{network}.1", {name: f"{network}.{number}" for number, name in enumerate(NODES, 2)}
    password = secrets.token_urlsafe()
    logs = {name: log_folder and log_folder / f"{name}.log" for name in (DATABASE, *NODES)}
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="callback-bridge-server-")))
        database = await _make_database(folder, database_host, password, logs[DATABASE])
        stack.push_async_callback(database.stop)
        await with_ticker("starting PostgreSQL", database.start())
        await with_ticker("making Temporal's databases", _make_schemas(programs, database_host, password))
        # The dev server allows the same by itself.
        allowed = [{"Pattern": f"{_CLIENTS_HOST}:{http_port}", "AllowInsecure": True}]
        values = {
            "component.callbacks.allowedAddresses": allowed,
            **{key: json.loads(each) for key, each in flags.items()},
        }
        flag_file = folder / "flags.yaml"
        flag_file.write_text(json.dumps({key: [{"value": value}] for key, value in values.items()}))
        stores = _stores(database_host, password)
        nodes = {}
        for name, host in hosts.items():
            # JSON is YAML. The file has the password.
            path = folder / f"{name}.yaml"
            path.touch(mode=0o600)
            path.write_text(json.dumps(node_config(host, stores, flag_file)))
            options = ("--root", str(folder), "--config", ".", "--env", name)
            nodes[name] = ServerPart(
                name,
                [str(programs / "temporal-server"), *options, "start"],
                is_ready=functools.partial(_answers, f"{host}:{_GRPC_PORTS['frontend']}"),
                log=logs[name],
            )
        stack.push_async_callback(_stop_all, list(nodes.values()))
        for name, node in nodes.items():
            # The first one writes the cluster's metadata. Two at once fail.
            await with_ticker(f"starting {name} of Temporal server {OLDEST}", node.start())
        for own_port, node_port in ((port, _GRPC_PORTS["frontend"]), (http_port, _HTTP_PORT)):
            balancer = LoadBalancer([(host, node_port) for host in hosts.values()])
            await stack.enter_async_context(balancer.running(_CLIENTS_HOST, own_port))
        yield ProductionServer(
            parts={DATABASE: database, **nodes},
            frontends=[f"{host}:{_GRPC_PORTS['frontend']}" for host in hosts.values()],
            metrics=[f"http://{host}:{_METRICS_PORT}/metrics" for host in hosts.values()],
        )


def node_config(host: str, stores: Mapping[str, Any], flag_file: Path) -> dict[str, Any]:
    """The configuration of the node on *host*, which runs all services. *stores* are those of `_stores`."""
    services: dict[str, Any] = {
        service: {"rpc": {"grpcPort": port, "membershipPort": _MEMBERSHIP_PORTS[service], "bindOnIP": host}}
        for service, port in _GRPC_PORTS.items()
    }
    services["frontend"]["rpc"]["httpPort"] = _HTTP_PORT
    cluster = {
        "enabled": True,
        "initialFailoverVersion": 1,
        "rpcName": "frontend",
        "rpcAddress": f"{host}:{_GRPC_PORTS['frontend']}",
    }
    return {
        "log": {"stdout": True, "level": "error"},
        "persistence": {
            "numHistoryShards": _SHARDS,
            "defaultStore": "temporal",
            "visibilityStore": "visibility",
            "datastores": stores,
        },
        "global": {
            "membership": {"maxJoinDuration": "30s", "broadcastAddress": host},
            "metrics": {"prometheus": {"listenAddress": f"{host}:{_METRICS_PORT}"}},
        },
        "services": services,
        "clusterMetadata": {
            "failoverVersionIncrement": 10,
            "masterClusterName": "active",
            "currentClusterName": "active",
            "clusterInformation": {"active": cluster},
        },
        "dcRedirectionPolicy": {"policy": "noop"},
        "dynamicConfigClient": {"filepath": str(flag_file), "pollInterval": "60s"},
    }


def _stores(host: str, password: str) -> dict[str, Any]:
    return {
        schema: {
            "sql": {
                "pluginName": "postgres12",
                "databaseName": name,
                "connectAddr": f"{host}:{_DATABASE_PORT}",
                "connectProtocol": "tcp",
                "user": _USER,
                "password": password,
                "maxConns": _CONNECTIONS,
                "maxIdleConns": _CONNECTIONS,
                "maxConnLifetime": "1h",
            }
        }
        for schema, name in _DATABASES.items()
    }


async def _make_database(folder: Path, host: str, password: str, log: Path | None) -> ServerPart:
    """PostgreSQL with new data below *folder*, not yet started."""
    data, secret = folder / "postgresql", folder / "password"
    data.mkdir(mode=0o700)
    secret.touch(mode=0o600)
    secret.write_text(password)
    options = {"cwd": folder, **_as_system_user(folder, data, secret)}
    made = ("--pgdata", data, "--username", _USER, "--pwfile", secret, "--auth", "scram-sha-256", "--encoding", "UTF8")
    await _run(_postgresql("initdb"), *made, "--no-instructions", **options)
    settings = {
        "listen_addresses": host,
        "port": _DATABASE_PORT,
        "unix_socket_directories": "",
        # Of all services and databases of all nodes, and some for the tools.
        "max_connections": _CONNECTIONS * len(_GRPC_PORTS) * len(NODES) * len(_DATABASES) + 10,
    }
    command = [str(_postgresql("postgres")), "-D", str(data), *(f"--{key}={value}" for key, value in settings.items())]
    asks = (_postgresql("pg_isready"), "--host", host, "--port", str(_DATABASE_PORT), "--quiet")

    async def is_ready() -> bool:
        process = await asyncio.create_subprocess_exec(*map(str, asks))
        return await process.wait() == 0

    return ServerPart(DATABASE, command, is_ready=is_ready, log=log, options=options)


def _as_system_user(folder: Path, *owned: Path) -> dict[str, Any]:
    """The options that start a process as PostgreSQL's user, to whom the *owned* paths in *folder* are given.

    Only root needs any.
    """
    if os.geteuid() != 0:
        return {}
    try:
        user = pwd.getpwnam(_SYSTEM_USER)
    except KeyError:
        message = f"PostgreSQL does not run as root, and there is no user {_SYSTEM_USER}: run this as another user"
        raise NoServerError(message) from None
    for path in owned:
        os.chown(path, user.pw_uid, user.pw_gid)
    # The user passes through the folder, and cannot list it.
    folder.chmod(0o711)
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": ()}


async def _make_schemas(programs: Path, host: str, password: str) -> None:
    async def make(schema: str, database: str) -> None:
        options = ("--plugin", "postgres12", "--endpoint", host, "--port", str(_DATABASE_PORT), "--user", _USER)
        tool = (programs / "temporal-sql-tool", *options, "--database", database)
        versions = programs / "schema" / "postgresql" / "v12" / schema / "versioned"
        environment = {**os.environ, "SQL_PASSWORD": password}
        await _run(*tool, "create-database", env=environment)
        await _run(*tool, "setup-schema", "--version", "0.0", env=environment)
        await _run(*tool, "update-schema", "--schema-dir", versions, env=environment)

    await asyncio.gather(*(make(schema, database) for schema, database in _DATABASES.items()))


async def _answers(address: str) -> bool:
    """Whether the frontend at *address* is up."""
    try:
        client = await Client.connect(address)
        return await client.service_client.check_health()
    except (RuntimeError, RPCError):
        return False


async def _stop_all(parts: Sequence[ServerPart]) -> None:
    await asyncio.gather(*(part.stop() for part in parts))


async def _run(*command: str | Path | None, **options: Any) -> None:
    process = await asyncio.create_subprocess_exec(
        *map(str, command), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, **options
    )
    said, _ = await process.communicate()
    if process.returncode != 0:
        message = f"`{command[0]}` failed:\n{said.decode(errors='replace').strip()[-1000:]}"
        raise NoServerError(message)


def _postgresql(program: str) -> Path | None:
    """A program of PostgreSQL: on PATH, or where Debian's packages put those of the server, the newest one."""
    releases = Path("/usr/lib/postgresql").glob(f"*/bin/{program}")
    newest = max(releases, key=lambda path: int(path.parent.parent.name), default=None)
    return newest or on_path(program)


def _build(into: Path) -> None:
    build_program(_MODULE, "./cmd/server", into / "temporal-server")
    build_program(_MODULE, "./cmd/tools/sql", into / "temporal-sql-tool")
    schema = into / "schema" / "postgresql"
    shutil.copytree(module_folder(_MODULE) / "schema" / "postgresql", schema)
    # Go's cache of modules is read-only.
    for path in (schema, *schema.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
