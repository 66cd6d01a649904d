"""The command `callback-bridge` for its users: help, errors, exit codes, and modules that have our packages' names."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tomllib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from scripts.environment.server import Server
from scripts.environment.stack import ROOT, write_local_settings
from tests.support.commands import BRIDGE, run
from tests.support.cut_proxy import silent_proxy
from tests.support.helpers import CALLER, HANDLER

COMMANDS = [
    (),
    ("init",),
    ("receiver", "serve"),
    ("handler", "serve"),
    ("keys", "new"),
    ("call",),
    ("keys", "rotate"),
    ("keys", "list"),
    ("keys", "check"),
    ("receiver", "doctor"),
    ("handler", "doctor"),
    ("pair", "make"),
    ("pair", "take"),
    ("pair", "check"),
    ("deliveries", "list"),
    ("deliveries", "show"),
    ("deliveries", "redeliver"),
]


@pytest.fixture(name="settings")
def both_sides(tmp_path: Path) -> Path:
    write_local_settings(tmp_path, receiver_url="http://127.0.0.1:1", service_url="http://127.0.0.1:2")
    return tmp_path


@pytest.fixture(name="script")
def console_script(tmp_path: Path) -> Path:
    """The script that an installation makes of the entry point."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, function = project["scripts"]["callback-bridge"].partition(":")
    path = tmp_path / "bin" / "callback-bridge"
    path.parent.mkdir()
    path.write_text(f"#!{sys.executable}\nimport sys\nfrom {module} import {function}\nsys.exit({function}())\n")
    path.chmod(0o755)
    return path


@pytest.fixture(name="project")
def users_project(tmp_path: Path) -> Path:
    """A folder with modules that have our packages' names, and one that may be served."""
    folder = tmp_path / "project"
    folder.mkdir()
    for name in ("bridge", "caller", "handler"):
        (folder / f"{name}.py").write_text(f"print('the user\\'s {name} ran')\n")
    (folder / "payments.py").write_text("import caller\nfrom tests.support.targets import ProbeWorkflow\n")
    return folder


def assert_helps(command: tuple[str, ...], text: str) -> None:
    assert " ".join(("Usage: callback-bridge", *command)) in text
    assert "--help" in text if not command else "--" in text
    assert "callback-bridge handler serve" in text
    assert "BRIDGE_CONFIG" in text
    assert "TEMPORAL_ADDRESS" in text


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_shows_options_examples_and_environment(command: tuple[str, ...]) -> None:
    """Of every command."""
    done = run(*command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert_helps(command, done.stdout)


@pytest.mark.parametrize("command", [COMMANDS[0], COMMANDS[-1]], ids=" ".join)
def test_help_is_shown_on_a_terminal_that_cannot_show_all_characters(command: tuple[str, ...]) -> None:
    done = subprocess.run(
        [*BRIDGE, *command, "--help"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "latin-1"},
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert_helps(command, done.stdout.decode("latin-1"))


def test_the_root_lists_every_command_with_its_purpose() -> None:
    """Also those that are imported only when they are used."""
    text = run("--help", COLUMNS="200").stdout
    for name, purpose in (
        ("receiver", "accepts outcomes"),
        ("handler", "starts workflows"),
        ("deliveries", "delivered"),
    ):
        [line] = [each for each in text.splitlines() if each.startswith(f"│ {name} ")]
        assert purpose in line
    assert run("--version").stdout == "0.1.0\n"


@pytest.mark.parametrize("side", ["caller", "handler"])
def test_each_side_runs_as_a_module_too(side: str) -> None:
    """`python -m caller serve` and `python -m handler serve` are the side's own `serve`."""
    done = subprocess.run(
        [sys.executable, "-m", side, "serve", "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert f"python -m {side} serve" in done.stdout
    assert ("Run the receiver" if side == "caller" else "Run the handler service") in done.stdout


def test_keys_new_prints_a_key_set_for_the_settings() -> None:
    """TOML for people, JSON for machines; never the same key twice."""
    key_set = tomllib.loads(run("keys", "new", "--id", "k7").stdout)
    assert key_set["signing"] == "k7"
    other = json.loads(run("keys", "new", "--json").stdout)
    assert len(key_set["keys"]["k7"]) == 43
    assert key_set["keys"]["k7"] not in other["keys"].values()


@pytest.mark.parametrize("key_id", ["Payments", "a b", 'k"', "k" * 32])
def test_keys_new_refuses_an_id_that_the_settings_refuse(key_id: str) -> None:
    """Before the key is copied to two teams."""
    done = run("keys", "new", "--id", key_id)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("callback-bridge: signing: String should match pattern")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        pytest.param(["reciever"], "receiver", id="unknown command"),
        pytest.param(["handler", "serve"], "--module", id="missing option"),
        pytest.param(["receiver", "serve", "--prot", "1"], "--prot", id="unknown option"),
        pytest.param(["receiver", "serve", "--port", "http"], "http", id="no number"),
        pytest.param(["receiver", "serve", "--log-level", "loud"], "debug", id="no choice"),
        pytest.param(["deliveries", "show"], "ID", id="missing argument"),
        pytest.param(["deliveries", "list", "--limit", "0"], ">= 1", id="limit"),
        pytest.param(["deliveries", "redeliver"], "--failed", id="nothing named"),
    ],
)
def test_a_wrong_use_is_one_line_on_standard_error_and_code_2(arguments: list[str], says: str) -> None:
    """The line names the command and what was wrong."""
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("callback-bridge: ")
    assert says in line


@pytest.mark.parametrize(
    "words", ["calls show", "runs show", "deliveries show", "calls list --query", "receiver doctor --task-queue"]
)
def test_a_value_that_is_not_utf_8_is_refused_by_every_command(words: str) -> None:
    """A terminal with another encoding. No server is asked, because Temporal could not have such a name."""
    done = run(*words.split(), os.fsdecode(b"k\xe4se"))
    assert done.stderr == "callback-bridge: a value is not UTF-8; the terminal and the shell have to use UTF-8\n"
    assert (done.returncode, done.stdout) == (1, "")


def test_a_reader_that_has_gone_is_an_error_without_a_traceback() -> None:
    """As in `callback-bridge keys new | true`."""
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [*BRIDGE, "keys", "new"], cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, check=False, timeout=60
        )
    finally:
        os.close(write)
    assert done.returncode == 1
    assert done.stderr == "callback-bridge: standard output was closed before everything was written\n"


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_standard_streams_are_no_error(closed: str) -> None:
    """A supervisor may start a process without them."""
    done = subprocess.run(
        f'"{sys.executable}" -m bridge keys new {closed}',
        shell=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0
    assert "Traceback" not in done.stderr


def test_the_console_script_does_not_import_a_users_modules_of_our_names(
    script: Path, project: Path, settings: Path
) -> None:
    """In a folder with handler.py, caller.py and bridge.py: ours run, and the user's other module is found."""
    done = subprocess.run(
        [script, "handler", "serve", "--module", "payments"],
        cwd=project,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "BRIDGE_CONFIG": str(settings / "handler.toml"),
            "TEMPORAL_ADDRESS": "127.0.0.1:1",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2
    assert "cannot connect to Temporal at 127.0.0.1:1" in done.stderr
    assert "the user's" not in done.stdout


@pytest.mark.parametrize("module", ["bridge", "caller", "handler", "handler.service"])
def test_a_module_with_the_name_of_one_of_our_packages_is_refused(settings: Path, project: Path, module: str) -> None:
    """The reason is in the message."""
    done = run("handler", "serve", "--module", module, BRIDGE_CONFIG=str(settings / "handler.toml"), cwd=None)
    assert done.returncode == 2
    name = module.partition(".")[0]
    assert f"{name} is a package of the bridge itself; give your module another name" in done.stderr


@pytest.mark.parametrize("name", ["caller", "handler"])
def test_a_users_module_that_hides_a_side_is_named_with_the_place_of_ours(
    script: Path, project: Path, name: str
) -> None:
    """Where PYTHONPATH puts the user's folder first; the user's module does not run."""
    (project / "bridge.py").unlink()
    (project / ("handler.py" if name == "caller" else "caller.py")).unlink()
    done = subprocess.run(
        [script, "receiver", "serve"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(project), str(ROOT)])},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert str(project / f"{name}.py") in done.stderr
    assert str(ROOT / name / "__init__.py") in done.stderr


@pytest.mark.parametrize("side", ["caller", "handler"])
def test_a_users_module_that_hides_the_shared_package_is_named_with_the_place_of_ours(project: Path, side: str) -> None:
    """In a user's own worker script, whose folder Python searches first."""
    for each in ("caller", "handler"):
        (project / f"{each}.py").unlink()
    (project / "worker.py").write_text(f"import {side}\n")
    done = subprocess.run(
        [sys.executable, project / "worker.py"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (1, "")
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert str(project / "bridge.py") in last
    assert str(ROOT / "bridge" / "__init__.py") in last


@asynccontextmanager
async def ended_by(end: signal.Signals, *command: str, **variables: str) -> AsyncIterator[asyncio.StreamReader]:
    """Run a command, and end it by a signal afterwards: it ends soon, with the code of a signal and no traceback."""
    process = await asyncio.create_subprocess_exec(
        *(*BRIDGE, *command),
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    try:
        yield process.stderr
        process.send_signal(end)
        assert await asyncio.wait_for(process.wait(), 25) == 130
        assert b"Traceback" not in await process.stderr.read()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def test_a_port_that_is_taken_is_named_with_a_remedy(settings: Path, server: Server) -> None:
    """The newcomer's second service on one machine."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run(
            *("receiver", "serve", "--port", port),
            BRIDGE_CONFIG=str(settings / "caller.toml"),
            TEMPORAL_ADDRESS=server.address,
            TEMPORAL_NAMESPACE=CALLER,
        )
    reason = "Address already in use; stop what listens there, or choose a free address by --host and --port"
    assert f"callback-bridge: cannot listen on 127.0.0.1 port {port}: {reason}, or in the settings\n" in done.stderr
    assert done.returncode == 1


@pytest.fixture(name="silent")
def silent_server() -> Iterator[str]:
    """Takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize(
    "command",
    [
        ("receiver", "serve"),
        ("handler", "serve", "--module", "examples.payments.payments"),
        ("deliveries", "list"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
async def test_a_command_that_connects_to_a_silent_temporal_says_so_and_can_be_ended(
    settings: Path, silent: str, command: tuple[str, ...], end: signal.Signals
) -> None:
    """Well before the SDK's own limit of half a minute."""
    side = "caller" if command[0] == "receiver" else "handler"
    async with ended_by(end, *command, BRIDGE_CONFIG=str(settings / f"{side}.toml"), TEMPORAL_ADDRESS=silent) as log:
        line = b""
        while silent.encode() not in line:
            line = await log.readline()
            assert line, "ended without a word"


def test_a_token_is_made_only_for_an_operator_whom_the_settings_can_name() -> None:
    """An address is no name. The service that reads the entry would refuse to start."""
    done = run("console", "token", "anna@orders.example")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("callback-bridge: tokens: String should match pattern")
    assert run("console", "token", "anna").returncode == 0


def test_a_module_that_ends_the_process_when_it_is_imported_is_refused(settings: Path) -> None:
    """A script without `if __name__ == "__main__"`. The command would end without a word and with code 0."""
    (settings / "script.py").write_text("import sys\n\nsys.exit(0)\n")
    done = run(*("handler", "serve", "--module", "script"), cwd=settings, BRIDGE_CONFIG=str(settings / "handler.toml"))
    assert done.returncode == 2
    assert "callback-bridge: cannot import script: SystemExit: 0" in done.stderr


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
async def test_a_service_can_be_ended_when_temporal_falls_silent_after_it_has_connected(
    settings: Path, server: Server, end: signal.Signals
) -> None:
    """The handler service starts its sweeps before it listens. It does not wait for the SDK's limit."""
    async with (
        silent_proxy(server.address, after=2) as (address, is_silent),
        ended_by(
            *(end, "handler", "serve", "--module", "examples.payments.payments", "--port", "0"),
            BRIDGE_CONFIG=str(settings / "handler.toml"),
            TEMPORAL_ADDRESS=address,
            TEMPORAL_NAMESPACE=HANDLER,
        ),
    ):
        await asyncio.wait_for(is_silent.wait(), 60)
