"""Real proxies in front of a service and a receiver: caddy, nginx and haproxy, and tinyproxy for what goes out.

caddy is a pinned package. The others are those on PATH, or Debian's packages, unpacked into the user's cache.
"""

import asyncio
import contextlib
import os
import signal
import textwrap
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from scripts.environment.program_cache import cached, install_package, on_path
from scripts.environment.server import free_ports
from tests.support.debian import debian_program
from tests.support.helpers import assert_eventually

PREFIX = "/edge"
"""The prefix of the service's public URL, which every proxy strips."""

_CADDY = """
{{
    admin off
    auto_https off
    persist_config off
    {globally}
}}
http://:{front} {{
    bind 127.0.0.1
    handle_path {prefix}/* {{
        {service}
        reverse_proxy 127.0.0.1:{upstream}
    }}
}}
http://:{back} {{
    bind 127.0.0.1
    {receiver}
    reverse_proxy 127.0.0.1:{receiver_port}
}}
{more}
"""
_NGINX = """
daemon off; pid {folder}/pid; error_log {folder}/error.log; worker_processes 2; {globally}
events {{ worker_connections 1024; }}
http {{
    access_log off; client_max_body_size 5m; large_client_header_buffers 8 16k;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    upstream service {{ server 127.0.0.1:{upstream}; keepalive 8; }}
    server {{
        listen 127.0.0.1:{front};
        location {prefix}/ {{ proxy_pass http://service/; {service} }}
    }}
    server {{
        listen 127.0.0.1:{back};
        location / {{ proxy_pass http://127.0.0.1:{receiver_port}; {receiver} }}
    }}
    {more}
}}
"""
_HAPROXY = """
global
    maxconn 1000
    {globally}
defaults
    mode http
    timeout connect 2s
    timeout client 30s
    timeout server 30s
frontend front
    bind 127.0.0.1:{front}
    http-request replace-path {prefix}(/.*) \\1
    {service}
    default_backend service
backend service
    server service 127.0.0.1:{upstream}
frontend back
    bind 127.0.0.1:{back}
    {receiver}
    default_backend receiver
backend receiver
    server receiver 127.0.0.1:{receiver_port}
{more}
"""
_CONFIGURATIONS = {"caddy": _CADDY, "nginx": _NGINX, "haproxy": _HAPROXY}
_TINYPROXY = """
Port {port}
Listen 127.0.0.1
Timeout 30
MaxClients 50
LogLevel Connect
LogFile "{folder}/tinyproxy.log"
Allow 127.0.0.1
ConnectPort {connect_port}
"""
_DEBIAN = {"nginx": "nginx-light", "haproxy": "haproxy", "tinyproxy": "tinyproxy-bin"}


def program(name: str) -> Path:
    """The program *name*. Skips the test where it cannot be had."""
    if name != "caddy":
        return debian_program(name, _DEBIAN[name])
    found = on_path(name)
    return found or cached("proxy-caddy", _install_caddy) / "bin" / name


def _install_caddy(into: Path) -> None:
    refusal = install_package("caddy.txt", into)
    if refusal is not None:
        pytest.skip(f"caddy is neither on PATH nor can it be installed: {refusal}")


def _libraries(found: Path) -> str:
    """The folders of the shared libraries that were unpacked with *found*."""
    root = found.parent.parent.parent
    return ":".join(sorted({str(each.parent) for each in root.glob("usr/lib/**/*.so*")}))


@dataclass
class Proxy:
    """One proxy between the outside and our two services."""

    name: str
    folder: Path
    front: int
    """Port at which callers reach the service, below `PREFIX`."""
    back: int
    """Port at which handlers reach the receiver."""
    upstream: int
    """Port of the service."""
    receiver_port: int
    """Port of the receiver."""
    process: asyncio.subprocess.Process | None = field(default=None, init=False)

    async def start(self, *, service: str = "", receiver: str = "", more: str = "", globally: str = "") -> None:
        """Start with further directives for requests to the *service* and the *receiver*, and wait for both ports."""
        slots = {"service": service, "receiver": receiver, "more": more, "globally": globally}
        if self.name == "nginx" and os.geteuid() == 0:
            # Otherwise the workers run as another user, who cannot write into our folder.
            slots["globally"] += " user root;"
        ports = {"front": self.front, "back": self.back, "upstream": self.upstream, "receiver_port": self.receiver_port}
        text = _CONFIGURATIONS[self.name].format(**slots, **ports, folder=self.folder, prefix=PREFIX)
        path = self.folder / f"{self.name}.conf"
        path.write_text(textwrap.dedent(text))
        found = program(self.name)
        arguments = {
            "caddy": ["run", "--adapter", "caddyfile", "--config", str(path)],
            "nginx": ["-c", str(path), "-e", str(self.folder / "error.log")],
            "haproxy": ["-W", "-f", str(path)],
        }
        home = {"HOME": str(self.folder), "XDG_DATA_HOME": str(self.folder), "XDG_CONFIG_HOME": str(self.folder)}
        with (self.folder / f"{self.name}.log").open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *(str(found), *arguments[self.name]),
                stdout=log,
                stderr=log,
                env={**os.environ, **home, "LD_LIBRARY_PATH": _libraries(found)},
                # nginx and haproxy have workers. All of them are killed together.
                start_new_session=True,
            )
        await assert_eventually(self._listens)

    async def _listens(self) -> None:
        assert self.process is not None
        if self.process.returncode is not None:
            logs = [each.read_text() for each in self.folder.glob("*.log")]
            pytest.fail(f"{self.name} ended: {''.join(logs)[-2000:]}")
        for port in (self.front, self.back):
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                message = f"nothing listens on port {port}"
                raise AssertionError(message) from None
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def reload(self, *, more: str = "") -> None:
        """Read the configuration again without a break, as operators do. caddy is ended in good order and restarted."""
        assert self.process is not None
        match self.name:
            case "nginx":
                self.process.send_signal(signal.SIGHUP)
            case "haproxy":
                self.process.send_signal(signal.SIGUSR2)
            case _:
                self.process.terminate()
                await self.process.wait()
                await self.start(more=more)

    async def kill(self) -> None:
        """Kill it with all its workers: what is under way breaks off."""
        if self.process is not None:
            process, self.process = self.process, None
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()


@contextlib.asynccontextmanager
async def running(proxy: Proxy, **slots: str) -> AsyncIterator[None]:
    """*proxy*, from its start with the directives in *slots* until the end of the context."""
    await proxy.start(**slots)
    try:
        yield
    finally:
        await proxy.kill()


@dataclass
class EgressProxy:
    """tinyproxy, which tunnels to one port."""

    url: str
    folder: Path

    def log(self) -> str:
        """Return its log."""
        return (self.folder / "tinyproxy.log").read_text()


@contextlib.asynccontextmanager
async def egress_proxy(folder: Path, *, connect_port: int) -> AsyncIterator[EgressProxy]:
    """tinyproxy, from its start until the end of the context. It refuses CONNECT to other ports than *connect_port*."""
    [port] = free_ports(1)
    path = folder / "tinyproxy.conf"
    path.write_text(_TINYPROXY.format(port=port, folder=folder, connect_port=connect_port))
    found = program("tinyproxy")
    process = await asyncio.create_subprocess_exec(
        *(str(found), "-d", "-c", str(path)),
        stdout=asyncio.subprocess.DEVNULL,
        env={**os.environ, "LD_LIBRARY_PATH": _libraries(found)},
    )

    async def listens() -> None:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            message = f"nothing listens on port {port}; tinyproxy ended with {process.returncode}"
            raise AssertionError(message) from None
        writer.close()

    try:
        await assert_eventually(listens)
        yield EgressProxy(f"http://127.0.0.1:{port}", folder)
    finally:
        process.kill()
        await process.wait()
