"""All keys of a pair are rotated while calls run: no request is refused, and no outcome is lost."""

import asyncio
import json
import re
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from aiohttp import ClientSession, web
from yarl import URL

from bridge.security.callback_tokens import CallbackTokens
from bridge.security.keys import KeySet, new_key
from scripts.environment.server import Server
from tests.support.callers import CallPlan
from tests.support.commands import run
from tests.support.helpers import CALLER, Keys, assert_eventually
from tests.support.mounted import by_symbolic_link
from tests.support.settings_files import Tree, toml
from tests.support.targets import Ask, Reply
from tests.support.world import World, running_world

PATIENT = CallPlan(first_lease=600)
"""Only the callback of the first start can end such a call in the time of a test."""


class SecretFiles:
    """The key files of both sides, each in a folder of its own, as Kubernetes mounts them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.content: dict[str, Tree] = {}
        for name in ("start", "completion", "callback"):
            for side in ("caller", "handler") if name != "callback" else ("caller",):
                (folder / side / name).mkdir(parents=True)
            self.change(name, "k1", k1=new_key())

    def sides(self, name: str) -> list[Path]:
        """The files of the key set *name*, those of the side that verifies first."""
        handler, caller = (self.folder / side / name / "keys.toml" for side in ("handler", "caller"))
        return {"start": [handler, caller], "completion": [caller, handler], "callback": [caller]}[name]

    def change(self, name: str, signing: str, **keys: str) -> None:
        """Write the key set *name* on all sides that have it."""
        self.content[name] = {"signing": signing, "keys": keys}
        for path in self.sides(name):
            by_symbolic_link(path, toml(self.content[name]) + "\n")

    def spoil(self, name: str) -> None:
        """Replace the key set *name* by a file that was cut off."""
        for path in self.sides(name):
            by_symbolic_link(path, toml(self.content[name])[:-20])

    def of(self, side: str) -> Keys:
        """The key sets in the settings of *side*."""
        keys = Keys()
        for name in self.content:
            setattr(keys, name, {"file": str(self.folder / side / name / "keys.toml")})
        return keys


class Calls:
    """Calls that are made one after another by several loops."""

    def __init__(self, world: World, number: int) -> None:
        self._world = world
        self._left = [Ask(key=world.key(), text=f"call {each}") for each in range(number)]
        self._open: set[str] = set()
        self.replies: list[tuple[str, Reply]] = []

    async def make(self) -> None:
        """Make calls until none is left."""
        while self._left:
            ask = self._left.pop()
            self._open.add(ask.key)
            handle = await self._world.call(ask, PATIENT)
            self.replies.append((ask.text, await handle.result()))
            self._open.discard(ask.key)

    async def settle(self) -> None:
        """Wait until all calls that are open now have ended, and at least one."""
        before, ended = set(self._open), len(self.replies)

        async def check() -> None:
            assert not before & self._open
            assert len(self.replies) > ended or not self._left

        await assert_eventually(check, within=60)


async def rotate(files: SecretFiles, settle: Callable[[], Awaitable[None]]) -> None:
    """Replace every key in the order of the guide, with a bad file before each step."""
    for name, content in files.content.items():
        old, new = content["keys"]["k1"], new_key()
        for signing, keys in (("k1", {"k1": old, "k2": new}), ("k2", {"k1": old, "k2": new}), ("k2", {"k2": new})):
            files.spoil(name)
            await settle()
            files.change(name, signing, **keys)
            await settle()


async def rotated_under_load(server: Server, folder: Path, *, calls: int, at_once: int) -> None:
    files = SecretFiles(folder)

    def prepare(world: World) -> None:
        world.keys, world.handler_keys = files.of("caller"), files.of("handler")

    async with running_world(server, prepare=prepare) as world:
        signed_with: list[str] = []

        def note(request: web.Request, response: web.StreamResponse) -> web.StreamResponse:
            signed_with.extend(re.findall(r'keyid="(\w+)"', request.headers["Signature-Input"]))
            return response

        world.service.change = world.receiver.change = note
        made = Calls(world, calls)
        making = asyncio.gather(*(made.make() for _ in range(at_once)))
        await rotate(files, made.settle)
        assert made._left, "the calls ended before the rotation"
        await making
        assert sorted(made.replies) == sorted((reply.text, reply) for _, reply in made.replies)
        assert len({text for text, _ in made.replies}) == calls
        assert Counter(world.service.statuses) == {201: calls}
        assert Counter(await world.receiver.answered()) == {200: calls}
        assert signed_with[:2] == ["k1", "k1"]
        assert signed_with[-2:] == ["k2", "k2"]
        url = URL(world.receiver.requests[-1][0])
        tokens = CallbackTokens(KeySet.model_validate(files.content["callback"]), namespace=CALLER)
        tokens.verify(url.query["sig"], callback_id=url.name, now=datetime.now(UTC))


@pytest.fixture
def looking_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every use looks at the files, so that the steps of a rotation need no wait."""
    monkeypatch.setattr("bridge.runtime.reloaded._PACE_S", 0)


@pytest.mark.usefixtures("looking_always")
async def test_a_rotation_under_load_loses_and_refuses_nothing(server: Server, tmp_path: Path) -> None:
    """All three key sets, both directions, a bad file before each step: every first request is accepted."""
    await rotated_under_load(server, tmp_path, calls=50, at_once=2)


@pytest.mark.part("rotation")
@pytest.mark.usefixtures("looking_always")
@pytest.mark.timeout(600)
async def test_a_rotation_under_a_thousand_calls_loses_and_refuses_nothing(server: Server, tmp_path: Path) -> None:
    """The same with twenty calls at a time."""
    await rotated_under_load(server, tmp_path, calls=1000, at_once=20)


async def test_both_sides_compare_their_keys_by_signed_echoes(server: Server, tmp_path: Path) -> None:
    """`keys check` of either side shows each key that is not the same on both sides, and no key."""
    files = SecretFiles(tmp_path)

    def prepare(world: World) -> None:
        world.keys, world.handler_keys = files.of("caller"), files.of("handler")

    async with running_world(server, prepare=prepare, without=("caller", "handler")) as world:
        settings = {"caller": world.caller_settings, "handler": world.handler_settings}
        for side, each in settings.items():
            # A key set of the settings shows its keys as asterisks; the files have them.
            tree = each.model_dump(mode="json", exclude_none=True)
            (tmp_path / f"{side}.toml").write_text(toml(with_files(tree)).replace("**********", new_key()))

        async def check(side: str) -> tuple[int, set[tuple[str, str, str]]]:
            config = str(tmp_path / f"{side}.toml")
            done = await asyncio.to_thread(run, "keys", "check", "--json", BRIDGE_CONFIG=config)
            assert not [key for each in files.content.values() for key in each["keys"].values() if key in done.stdout]
            rows = json.loads(done.stdout)
            # The table replaces URLs: a row names the peer as the settings do.
            assert {row["peer"] for row in rows} == {CALLER if side == "handler" else "payments"}
            return done.returncode, {(row["key_set"], row["key_id"], row["result"]) for row in rows}

        same = {("start_keys", "k1", "same"), ("completion_keys", "k1", "same")}
        assert await check("caller") == (0, same)
        assert await check("handler") == (0, same)
        caller_only, *_ = files.sides("completion")
        keys = files.content["completion"]["keys"]
        by_symbolic_link(caller_only, toml({"signing": "k1", "keys": {**keys, "k2": new_key()}}))
        assert await check("caller") == (1, same | {("completion_keys", "k2", "only here")})

        async def seen() -> None:
            assert await check("handler") == (1, same | {("completion_keys", "k2", "only there")})

        await assert_eventually(seen)
        await world.service.stop()
        [(_, _, problem)] = (await check("caller"))[1]
        assert "cannot connect" in problem


def with_files(tree: Tree) -> Tree:
    """*tree* with key sets that have only the name of their file."""
    return {
        name: {"file": each["file"]}
        if isinstance(each, dict) and "file" in each
        else with_files(each)
        if isinstance(each, dict)
        else each
        for name, each in tree.items()
    }


@pytest.mark.usefixtures("looking_always")
async def test_the_health_route_sees_a_bad_file(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A service that gets no requests raises the alarm too, and stays ready."""
    files = SecretFiles(tmp_path)

    def prepare(world: World) -> None:
        world.keys, world.handler_keys = files.of("caller"), files.of("handler")

    async with (
        running_world(server, prepare=prepare, without=("caller", "handler")) as world,
        ClientSession() as session,
    ):
        for listener, name in ((world.receiver, "callback"), (world.service, "start")):
            caplog.clear()
            files.spoil(name)
            async with session.get(f"{listener.url}/readyz") as answer:
                assert answer.status == 200
            assert "bridge.files_not_taken" in caplog.text
            assert f"{name}_keys: key file" in caplog.text
            files.change(name, **{"signing": "k1", **files.content[name]["keys"]})


@pytest.mark.usefixtures("looking_always")
async def test_a_bearer_secret_is_rotated_like_a_key(server: Server, tmp_path: Path) -> None:
    """Both secrets of the file are valid, and a removed one is refused at once."""
    path, old, new = tmp_path / "bearer.toml", new_key(), new_key()
    path.write_text(toml({"signing": "k1", "keys": {"k1": old}}))

    def prepare(world: World) -> None:
        world.peer_options = {"auth": "bearer", "start_keys": None, "bearer_keys": {"file": str(path)}}

    async with (
        running_world(server, prepare=prepare, without=("caller", "handler")) as world,
        ClientSession() as session,
    ):

        async def statuses() -> list[int]:
            url, secrets = f"{world.service.url}/c/{CALLER}", (old, new)
            return [(await session.post(url, headers={"Authorization": f"Bearer {each}"})).status for each in secrets]

        assert await statuses() == [200, 401]
        path.write_text(toml({"signing": "k1", "keys": {"k1": old, "k2": new}}))
        assert await statuses() == [200, 200]
        path.write_text(toml({"signing": "k2", "keys": {"k2": new}}))
        assert await statuses() == [401, 200]
