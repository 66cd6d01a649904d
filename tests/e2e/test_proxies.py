"""Calls through real proxies: what a proxy changes or answers by itself ends no call, loses none and doubles none."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web
from temporalio.client import WorkflowFailureError, WorkflowHandle
from temporalio.exceptions import NexusOperationError

from bridge.protocol.headers import operation_path
from bridge.security.signatures import MessageSigner
from scripts.environment.server import Server, free_ports
from tests.support.callers import CallPlan
from tests.support.helpers import assert_eventually
from tests.support.peer import send, start
from tests.support.proxies import PREFIX, Proxy, running
from tests.support.targets import Ask, Reply
from tests.support.world import World, running_world

PATIENT = CallPlan(first_lease=600)
"""Only a callback ends such a call in the time of a test."""
SOON = CallPlan(first_lease=5, renewal=1)
PAGE = "<html>Back soon</html>"


@pytest_asyncio.fixture(loop_scope="session", scope="module")
async def fronted(server: Server) -> AsyncIterator[World]:
    """A world whose service and receiver are reached through two ports of a proxy."""

    def prepare(world: World) -> None:
        front, back = free_ports(2)
        world.service.url = world.endpoint_url = f"http://127.0.0.1:{front}{PREFIX}"
        world.receiver.url = f"http://127.0.0.1:{back}"

    async with running_world(server, prepare=prepare) as world:
        yield world


@pytest.fixture
def make(fronted: World, tmp_path: Path) -> Callable[[str], Proxy]:
    for listener in (fronted.service, fronted.receiver):
        listener.before = listener.change = listener.after = None
        listener.requests.clear()

    def proxy(name: str) -> Proxy:
        front, back = (
            int(url.rpartition(":")[2].partition("/")[0]) for url in (fronted.service.url, fronted.receiver.url)
        )
        return Proxy(name, tmp_path, front, back, fronted.service.port, fronted.receiver.port)

    return proxy


async def runs_of(world: World, ask: Ask) -> int:
    query = f"WorkflowId = '{world.target(ask).id}'"
    return len([each async for each in world.handler_client.list_workflows(query)])


async def shown(world: World, handle: WorkflowHandle[Any, Any], *words: str) -> None:
    """Wait until the pending activity shows *words*."""

    async def check() -> None:
        activity = await world.pending(handle)
        assert activity is not None, "nothing is pending"
        for word in words:
            assert word in activity.last_failure.message

    await assert_eventually(check)


def both(directives: str) -> dict[str, str]:
    return {"service": directives, "receiver": directives}


HARMLESS = [
    pytest.param("caddy", {}, id="caddy"),
    pytest.param("caddy", both("encode {\n minimum_length 1\n match {\n status 2xx\n }\n}"), id="caddy, compression"),
    pytest.param(
        *("caddy", both("header {\n Content-Security-Policy self\n Strict-Transport-Security max-age=1\n -Server\n}")),
        id="caddy, added headers",
    ),
    pytest.param("nginx", {}, id="nginx, HTTP/1.0 upstream"),
    pytest.param(
        "nginx", both('proxy_http_version 1.1; proxy_set_header Connection "";'), id="nginx, kept connections"
    ),
    pytest.param("nginx", both("gzip on; gzip_types *; gzip_min_length 1; gzip_proxied any;"), id="nginx, compression"),
    pytest.param(
        "nginx",
        both(
            "add_header Content-Security-Policy \"default-src 'self'\" always; add_header X-Frame-Options DENY always; "
            "add_header Strict-Transport-Security max-age=1 always; add_header Content-Language en always;"
        ),
        id="nginx, added headers",
    ),
    pytest.param("nginx", both("charset utf-8; charset_types application/json;"), id="nginx, charset"),
    pytest.param(
        *("nginx", both("proxy_buffering off; proxy_set_header X-Forwarded-For 1.2.3.4; proxy_set_header Via edge;")),
        id="nginx, no buffers",
    ),
    pytest.param("haproxy", {}, id="haproxy"),
    pytest.param("haproxy", both("option forwardfor\noption http-buffer-request"), id="haproxy, forwarded"),
    pytest.param(
        "haproxy",
        both('http-response set-header Server edge\nhttp-response add-header Content-Security-Policy "x"'),
        id="haproxy, added headers",
    ),
    pytest.param(
        "haproxy", both('http-response set-status 201 reason "Made" if { status 201 }'), id="haproxy, reason phrase"
    ),
]


@pytest.mark.part("proxies")
@pytest.mark.parametrize(("name", "slots"), HARMLESS)
async def test_a_harmless_change_costs_no_second_request(
    fronted: World, make: Callable[[str], Proxy], name: str, slots: dict[str, str]
) -> None:
    """The first start and the first callback count, also for a held start, a refusal and a large input and outcome."""
    async with running(make(name), **slots):
        called = await fronted.call(Ask(key=fronted.key(), text="x" * 300_000, size=300_000), PATIENT)
        assert await called.result() == Reply("x" * 300_000, "b" * 300_000)
        held = await fronted.call(Ask(key=fronted.key(), text="held"), CallPlan(transport="wait", first_lease=600))
        assert await held.result() == Reply("held")
        refused = await fronted.call(Ask(key=fronted.key(), behaviour="refused"), PATIENT)
        with pytest.raises(WorkflowFailureError) as raised:
            await refused.result()
        assert "earlier attempt" not in str(raised.value.cause)
    assert Counter(fronted.service.statuses) == {201: 1, 200: 1, 400: 1}
    assert await fronted.receiver.answered() == [200]


HARMFUL = [
    pytest.param("caddy", 'respond "Back soon" 200', ["answered 200", "9 bytes"], id="caddy, page"),
    pytest.param("caddy", "redir https://elsewhere.example{uri} 301", ["answered 301"], id="caddy, redirect"),
    pytest.param("caddy", "header >Repr-Digest x", ["not signed by the peer"], id="caddy, changed digest"),
    pytest.param(
        "caddy",
        "basic_auth {\n a $2a$14$Zkx19XLiW6VYouLHR5NmfOFU0z2GTNmpkT/5qqR7hx4IjWJPDhjvG\n}",
        ["answered 401"],
        id="caddy, 401",
    ),
    pytest.param(
        "nginx", f"default_type text/html; return 200 '{PAGE}';", ["answered 200", "text/html"], id="nginx, page"
    ),
    pytest.param(
        "nginx", 'default_type application/json; return 200 \'{"key":"x"}\';', ["answered 200"], id="nginx, JSON page"
    ),
    pytest.param("nginx", "return 204;", ["answered 204", "0 bytes"], id="nginx, 204"),
    pytest.param("nginx", "return 301 https://elsewhere.example/;", ["answered 301"], id="nginx, redirect"),
    pytest.param("nginx", "deny all;", ["answered 403", "nginx"], id="nginx, 403"),
    pytest.param("nginx", "return 404;", ["answered 404"], id="nginx, 404"),
    pytest.param("nginx", "client_max_body_size 1;", ["answered 413", "must pass bodies of 4 MiB"], id="nginx, 413"),
    pytest.param("nginx", "return 410;", ["answered 410"], id="nginx, 410"),
    pytest.param("nginx", "return 503;", ["answered 503"], id="nginx, 503"),
    pytest.param("nginx", "proxy_hide_header Signature;", ["Signature missing"], id="nginx, no signature"),
    pytest.param("nginx", "proxy_hide_header Content-Type;", ["not signed"], id="nginx, no content type"),
    pytest.param("nginx", "add_header Nexus-Link x always;", ["does not hold"], id="nginx, doubled header"),
    pytest.param(
        "nginx", "add_header Signature x always;", ["Signature missing, repeated"], id="nginx, two signatures"
    ),
    pytest.param(
        *("nginx", "sub_filter running stopped; sub_filter_types *;", ["body was changed"]), id="nginx, changed body"
    ),
    pytest.param("nginx", 'proxy_set_header Nexus-Request-Id "";', ["answered 401"], id="nginx, dropped request id"),
    pytest.param("nginx", "proxy_set_header Operation-Timeout 1s;", ["answered 401"], id="nginx, changed deadline"),
    pytest.param(
        "haproxy",
        "http-request return status 200 content-type text/html string x",
        ["answered 200"],
        id="haproxy, page",
    ),
    pytest.param("haproxy", "http-request deny deny_status 403", ["answered 403"], id="haproxy, 403"),
    pytest.param("haproxy", "http-response set-status 200", ["answered 200", "does not hold"], id="haproxy, status"),
    pytest.param("haproxy", "http-response del-header Repr-Digest", ["not signed"], id="haproxy, no digest"),
    pytest.param("haproxy", "http-request add-header Nexus-Request-Id x", ["answered 401"], id="haproxy, doubled"),
    pytest.param("haproxy", "http-request set-header Content-Encoding gzip", ["answered 401"], id="haproxy, encoding"),
]


@pytest.mark.part("proxies")
@pytest.mark.parametrize(("name", "directives", "says"), HARMFUL)
async def test_what_a_proxy_answers_or_changes_ends_no_call(
    fronted: World, make: Callable[[str], Proxy], name: str, directives: str, says: list[str]
) -> None:
    """The pending activity names the answer and the failed check. After its repair the call gets its result."""
    # The target waits: some of these proxies change only the answer, and its outcome would end the call by callback.
    ask = Ask(key=fronted.key(), behaviour="wait")
    async with running(make(name), service=directives):
        handle = await fronted.call(ask, SOON)
        await shown(fronted, handle, *says, "not signed by the peer")
    async with running(make(name)):
        await (await fronted.until_started(ask)).signal("say", "true")
        assert await handle.result() == Reply("true")
    assert await runs_of(fronted, ask) == 1


@pytest.mark.part("proxies")
@pytest.mark.parametrize(
    ("name", "directives"),
    [
        pytest.param("nginx", f"return 200 '{PAGE}';", id="page"),
        pytest.param("nginx", "return 404;", id="404"),
        pytest.param("nginx", "return 410;", id="410"),
        pytest.param("haproxy", "http-response set-status 202", id="another status"),
        pytest.param("haproxy", "http-response del-header Signature", id="no signature"),
    ],
)
async def test_what_a_proxy_answers_to_a_completion_is_no_delivery(
    fronted: World, make: Callable[[str], Proxy], name: str, directives: str
) -> None:
    """The outcome is sent again until the receiver itself has answered; it arrives once."""
    ask = Ask(key=fronted.key(), text="true", behaviour="wait")
    async with running(make(name), receiver=directives):
        handle = await fronted.call(ask, PATIENT)
        target = await fronted.until_started(ask)
        await target.signal("say", "paid")
        await target.result()
        delivery = await delivery_of(fronted, ask)
    async with running(make(name)):
        assert await handle.result() == Reply("paid")
        await delivery.result()


async def delivery_of(world: World, ask: Ask) -> WorkflowHandle[Any, Any]:
    """The delivery workflow of the only call of *ask*."""
    run_id = (await world.target(ask).describe()).run_id

    async def found() -> WorkflowHandle[Any, Any]:
        query = "WorkflowType = 'bridge.Delivery'"
        ids = [each.id async for each in world.handler_client.list_workflows(query) if each.id.endswith(run_id)]
        assert ids, "no delivery workflow yet"
        return world.handler_client.get_workflow_handle(ids[0])

    return await assert_eventually(found)


@pytest.mark.part("proxies")
@pytest.mark.parametrize("then", ["return 404;", "return 403;", "return 401;"])
async def test_a_start_that_was_processed_is_not_ended_by_the_proxys_next_answers(
    fronted: World, make: Callable[[str], Proxy], then: str
) -> None:
    """504 after the start was processed, then a bare refusal, then a healthy proxy: one run, and its result arrives."""
    released = asyncio.Event()
    fronted.service.after = released.wait  # type: ignore[assignment] # its result is not used
    ask = Ask(key=fronted.key(), behaviour="wait")
    async with running(make("nginx"), service="proxy_read_timeout 1s;"):
        handle = await fronted.call(ask, SOON)
        target = await fronted.until_started(ask)
        await shown(fronted, handle, "answered 504")
    released.set()
    async with running(make("nginx"), service=then):
        await shown(fronted, handle, f"answered {then[7:10]}")
    async with running(make("nginx")):
        await target.signal("say", "paid")
        assert await handle.result() == Reply("paid")
    assert await runs_of(fronted, ask) == 1


@pytest.mark.part("proxies")
async def test_a_refusal_that_a_proxy_replaces_is_given_once_the_proxy_lets_it_pass(
    fronted: World, make: Callable[[str], Proxy]
) -> None:
    """`proxy_intercept_errors` hides the handler's signed refusal: the call waits, and says why."""
    async with running(make("nginx"), service="proxy_intercept_errors on; error_page 400 404 503 /oops;"):
        handle = await fronted.call(Ask(key=fronted.key(), behaviour="refused"), SOON)
        await shown(fronted, handle, "answered 404", "nginx")
    async with running(make("nginx")):
        with pytest.raises(WorkflowFailureError) as raised:
            await handle.result()
    assert isinstance(raised.value.cause, NexusOperationError)


@pytest.mark.part("proxies")
async def test_an_outcome_whose_body_a_proxy_cuts_short_is_not_taken(
    fronted: World, make: Callable[[str], Proxy]
) -> None:
    """The end of the connection ends such a body, and only the signed digest shows that half of it is missing."""
    cut: list[str] = []

    def halved(request: web.Request, answer: web.StreamResponse) -> web.StreamResponse:
        if cut or not isinstance(answer, web.Response) or not isinstance(answer.body, bytes):
            return answer
        cut.append(request.path)
        half = web.Response(status=answer.status, headers=answer.headers, body=answer.body[: len(answer.body) // 2])
        half.headers["Content-Length"] = str(len(answer.body))
        half.force_close()
        return half

    fronted.service.change = halved
    # Without a length and without chunks, the client sees a complete answer that ends with its connection.
    close_delimited = "chunked_transfer_encoding off; sub_filter absent absent; sub_filter_types *;"
    async with running(make("nginx"), service=close_delimited):
        plan = CallPlan(transport="wait", first_lease=10, renewal=1)
        handle = await fronted.call(Ask(key=fronted.key(), text="paid", size=300_000), plan)
        assert await handle.result() == Reply("paid", "b" * 300_000)
    assert cut
    assert fronted.service.statuses == [200, 200]


@pytest.mark.part("proxies")
async def test_held_starts_that_a_proxy_cuts_all_end_at_once_with_their_outcome(
    fronted: World, make: Callable[[str], Proxy]
) -> None:
    """Sixty at once, each cut after a second: callbacks or repeated starts bring every outcome before the lease."""
    asks = [Ask(key=fronted.key(), behaviour="wait") for _ in range(60)]
    async with running(make("nginx"), service="proxy_read_timeout 1s;"):
        plan = CallPlan(transport="wait", first_lease=600)
        handles = await asyncio.gather(*(fronted.call(ask, plan) for ask in asks))
        targets = await asyncio.gather(*(fronted.until_started(ask) for ask in asks))
        await asyncio.sleep(1.5)  # some are cut while the others are still held
        await asyncio.gather(*(target.signal("say", "paid") for target in targets))
        replies = await asyncio.wait_for(asyncio.gather(*(handle.result() for handle in handles)), 100)
    assert set(replies) == {Reply("paid")}


@pytest.mark.part("proxies")
@pytest.mark.parametrize("name", ["caddy", "nginx", "haproxy"])
async def test_a_name_of_any_characters_survives_a_proxy_that_strips_a_prefix(
    fronted: World, make: Callable[[str], Proxy], name: str
) -> None:
    """A proxy that decodes and encodes the path again changes no name that we encode."""
    async with running(make(name)):
        for operation in ("{a}", "[b];c(d)!*'", "+=:@&$", "c d,e", "~-._", "\u00e9"):
            message = start(fronted, {"key": fronted.key()})
            message.url = message.url.replace("/ProbeService/probe", operation_path("ProbeService", operation))
            answer = await send(message, MessageSigner(fronted.keys.start))
            assert (answer.status, answer.message, operation) == (404, "no such operation", operation)
            assert answer.is_signed


@pytest.mark.part("proxies", short=True)
@pytest.mark.timeout(300)
async def test_a_few_calls_through_a_proxy_that_restarts(fronted: World, make: Callable[[str], Proxy]) -> None:
    """The short form of the next test, with a proxy that pip installs."""
    await restarts(fronted, make("caddy"), calls=40)


@pytest.mark.part("proxies")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["nginx", "haproxy", "caddy"])
async def test_no_call_is_lost_doubled_or_wrong_through_a_proxy_that_restarts(
    fronted: World, make: Callable[[str], Proxy], name: str
) -> None:
    """1 000 calls while the proxy is killed, restarted and reloaded in turn."""
    await restarts(fronted, make(name), calls=1000)


async def restarts(world: World, proxy: Proxy, *, calls: int) -> None:
    asks = [Ask(key=world.key(f"{proxy.name}-{number}"), text=str(number)) for number in range(calls)]
    free = asyncio.Semaphore(20)

    async def call(ask: Ask) -> Reply:
        async with free:
            return await (await world.call(ask, CallPlan(first_lease=10, renewal=5))).result()

    async def disturb() -> None:
        while True:
            await asyncio.sleep(0.7)
            await proxy.reload()
            await asyncio.sleep(0.7)
            await proxy.kill()
            await proxy.start()

    async with running(proxy):
        disturbing = asyncio.create_task(disturb())
        try:
            replies = await asyncio.gather(*map(call, asks))
        finally:
            disturbing.cancel()
            await asyncio.gather(disturbing, return_exceptions=True)
    assert replies == [Reply(ask.text) for ask in asks]
    query = f"WorkflowId STARTS_WITH 'probe-{world.id}-{proxy.name}-'"

    async def all_listed() -> None:
        counts = Counter([each.id async for each in world.handler_client.list_workflows(query)])
        assert counts == dict.fromkeys([world.target(ask).id for ask in asks], 1)

    await assert_eventually(all_listed)
