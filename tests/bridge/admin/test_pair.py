"""`callback-bridge pair`: one file by which two teams meet, taken by each side into its own settings."""

import os
import re
import tomllib
from pathlib import Path

import pytest

from bridge.admin.command import CommandError
from bridge.admin.pair import Pair, Side, make, take
from bridge.runtime.settings import load
from caller.settings import CallerSettings
from handler.settings import HandlerSettings
from tests.support.commands import run

URLS = {"receiver_url": "https://orders.example", "service_url": "https://payments.example/bridge"}
OPERATIONS = ["PaymentService/*", "AuditService/read"]


@pytest.fixture(name="file")
def pair_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BRIDGE_CONFIG", raising=False)
    make(tmp_path / "pay.toml", caller="order-prod", handler="payment-prod", operations=OPERATIONS, **URLS)
    return tmp_path / "pay.toml"


def test_both_sides_take_the_file_and_agree(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """New settings have names, URLs, operations, the shared keys and own keys. Only the owner can read the files."""
    assert file.stat().st_mode & 0o777 == 0o600
    secrets = set(re.findall(r'"([\w-]{43})"', file.read_text()))
    take(file, side="caller")
    take(file, side="handler", task_queue="payment-queue")
    monkeypatch.setenv("BRIDGE_CONFIG", "caller.toml")
    ours = load(CallerSettings)
    monkeypatch.setenv("BRIDGE_CONFIG", "handler.toml")
    theirs = load(HandlerSettings)
    assert {Path(f"{side}.toml").stat().st_mode & 0o777 for side in ("caller", "handler")} == {0o600}
    peer, caller = ours.handlers["payment-prod"], theirs.callers["order-prod"]
    assert (peer.start_keys, peer.completion_keys) == (caller.start_keys, caller.completion_keys)
    assert ours.endpoints["payment-prod"].url == f"{theirs.service.url}/c/{ours.name}"
    assert ours.receiver is not None
    assert caller.callbacks[0].url == f"{ours.receiver.url}/callbacks"
    assert caller.operations == tuple(OPERATIONS)
    assert (ours.namespace, theirs.namespace, theirs.task_queue) == ("order-prod", "payment-prod", "payment-queue")
    printed = capsys.readouterr().out
    assert peer.completion_keys is not None
    fingerprints = [*peer.start_keys.fingerprints().values(), *peer.completion_keys.fingerprints().values()]
    assert all(printed.count(each) == 2 for each in fingerprints), "once by each side"
    assert not [each for each in secrets if each in printed]


@pytest.mark.parametrize(("side", "port"), [("caller", 8091), ("handler", 8092)])
def test_a_url_with_plain_http_names_the_port_to_listen_on(side: Side, port: int) -> None:
    """No proxy of one machine leads from the URL to another port."""
    urls = {"receiver_url": "http://127.0.0.1:8091", "service_url": "http://127.0.0.1:8092/bridge"}
    pair = Pair.with_new_keys(caller="a", handler="b", endpoint="b", operations=["S/*"], **urls)
    text = pair.settings(side)
    assert tomllib.loads(text)["receiver" if side == "caller" else "service"]["port"] == port


def test_a_second_peer_is_added_to_settings_that_exist(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was there stays, to the letter. A peer that is there already is not changed."""
    take(file, side="caller")
    before = Path("caller.toml").read_text()
    make(tmp_path / "second.toml", caller="order-prod", handler="stock.prod", operations=["Stock/take"], **URLS)
    monkeypatch.setenv("BRIDGE_CONFIG", str(tmp_path / "caller.toml"))
    take(tmp_path / "second.toml", side="caller")
    after = Path("caller.toml").read_text()
    assert after.startswith(before)
    settings = load(CallerSettings)
    assert sorted(settings.handlers) == ["payment-prod", "stock.prod"]
    assert settings.endpoints["stock.prod"].handler == "stock.prod"
    with pytest.raises(CommandError, match=r"caller\.toml has an entry for this peer or endpoint already"):
        take(tmp_path / "second.toml", side="caller")
    assert Path("caller.toml").read_text() == after


def test_an_entry_with_which_no_process_could_start_is_not_added(file: Path, tmp_path: Path) -> None:
    """A caller without a receiver polls. Its running workers would not notice, but could not be started again."""
    take(file, side="caller")
    path = Path("caller.toml")
    own = r'(?m)^(callback_keys = .*|\[receiver\]|url = "https://orders.example")\n'
    path.write_text(before := re.sub(own, "", path.read_text()) + 'transport = "poll"\n')
    make(tmp_path / "second.toml", caller="order-prod", handler="stock", operations=["Stock/take"], **URLS)
    says = 'no process could start with the new entry: endpoints.stock.transport: "callback" needs a receiver'
    with pytest.raises(CommandError, match=f"caller.toml is not changed, because {says}"):
        take(tmp_path / "second.toml", side="caller")
    assert path.read_text() == before


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--caller", "a b", "caller: String should match pattern"),
        ("--operations", "PaymentService", "operations: String should match pattern"),
        ("--service-url", "payments", "service_url: needs the form https://host"),
    ],
)
def test_a_file_that_no_side_could_use_is_not_made(tmp_path: Path, option: str, value: str, says: str) -> None:
    """The refusal names the field."""
    options = {"--caller": "a", "--handler": "b", "--receiver-url": "https://a", "--service-url": "https://b"}
    options |= {"--operations": "P/*", option: value}
    done = run("pair", "make", str(tmp_path / "x"), *(each for option in options.items() for each in option))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"callback-bridge: {says}")
    assert list(tmp_path.iterdir()) == []


def test_files_that_exist_are_not_replaced_and_broken_ones_are_not_taken(file: Path) -> None:
    """Their keys may be in use. A broken file is named and not quoted."""
    with pytest.raises(CommandError, match=r"pay\.toml exists already and is not replaced"):
        make(file, caller="order-prod", handler="payment-prod", operations=OPERATIONS, **URLS)
    file.write_text(file.read_text().replace("endpoint", "endpont"))
    with pytest.raises(CommandError, match="endpoint: Field required; endpont: Extra inputs are not permitted"):
        take(file, side="caller")
    assert not Path("caller.toml").exists()


def test_settings_of_another_team_take_no_pair(file: Path, tmp_path: Path) -> None:
    """They stay as they are."""
    path = tmp_path / "other.toml"
    path.write_text('\ufeffname = "billing"\n')
    done = run("pair", "take", str(file), "--as", "caller", BRIDGE_CONFIG=str(path))
    assert done.returncode == 1
    assert "has not the name" in done.stderr
    assert path.read_text() == '\ufeffname = "billing"\n'


def test_settings_that_are_not_utf_8_are_named_and_not_changed(file: Path, tmp_path: Path) -> None:
    """As every command does it that reads settings."""
    path = tmp_path / "old.toml"
    path.write_bytes(b'name = "order-prod" # f\xfcr Zahlungen\n')
    done = run("pair", "take", str(file), "--as", "caller", BRIDGE_CONFIG=str(path))
    assert done.returncode == 2
    assert done.stderr.startswith(f"callback-bridge: {path}, line 1: not UTF-8; save the TOML file as UTF-8")
    assert path.read_bytes() == b'name = "order-prod" # f\xfcr Zahlungen\n'


def test_settings_stay_utf_8_wherever_the_command_runs(file: Path, tmp_path: Path) -> None:
    """A terminal may have another encoding, in which no command could read the settings afterwards."""
    path = tmp_path / "old.toml"
    path.write_bytes('name = "order-prod" # f\u00fcr \u20ac\n'.encode())
    done = run(
        *("pair", "take", str(file), "--as", "caller"),
        BRIDGE_CONFIG=str(path),
        PYTHONUTF8="0",
        PYTHONCOERCECLOCALE="0",
        LC_ALL="C",
    )
    assert done.returncode == 0, done.stderr
    assert path.read_text(encoding="utf-8").startswith('name = "order-prod" # f\u00fcr \u20ac\n')


def test_an_empty_variable_names_no_settings(file: Path, tmp_path: Path) -> None:
    """As for every other command: the file then has the name of the side."""
    done = run("pair", "take", str(file), "--as", "caller", cwd=tmp_path, BRIDGE_CONFIG="")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "caller.toml").exists()


def test_settings_are_left_to_the_user_of_the_service(file: Path, tmp_path: Path) -> None:
    """Owner, group and mode of settings that exist stay, and so does a link that leads to them."""
    path, link = tmp_path / "own.toml", tmp_path / "link.toml"
    path.write_text('name = "order-prod"\n')
    owner = os.geteuid() or 65534
    os.chown(path, owner, os.getegid() if owner == os.geteuid() else 65534)
    path.chmod(0o640)
    link.symlink_to(path.name)
    before = path.stat()
    assert run("pair", "take", str(file), "--as", "caller", BRIDGE_CONFIG=str(link)).returncode == 0
    after = path.stat()
    assert link.is_symlink()
    assert "payment-prod" in path.read_text()
    assert (after.st_uid, after.st_gid, after.st_mode) == (before.st_uid, before.st_gid, before.st_mode)
