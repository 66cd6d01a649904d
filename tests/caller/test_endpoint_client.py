"""The requests of the caller's worker to a handler, on a real socket."""

import asyncio
from contextlib import aclosing
from datetime import timedelta

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from temporalio.common import MetricMeter
from temporalio.converter import DataConverter

from bridge.http.client import HttpClient
from bridge.protocol.start import StartRequest
from bridge.runtime.metrics import Metrics
from bridge.runtime.reloaded import LiveKeys
from caller.endpoint_client import Endpoints, NotStartedError
from tests.support.helpers import Keys, assert_eventually, caller_settings, key_set

MINUTE = timedelta(minutes=1)


def start(request_id: str) -> StartRequest:
    return StartRequest(
        service="Payments", operation="pay", request_id=request_id, callback_url=None, wait=timedelta(seconds=30)
    )


async def test_held_starts_leave_half_of_the_places_for_other_requests() -> None:
    """A start that finds half of them taken does not ask to be held: it is answered at once, and called back."""
    asked: list[str | None] = []
    closing = asyncio.Event()

    async def hold(request: web.Request) -> web.Response:
        asked.append(request.headers.get("Prefer"))
        await closing.wait()
        return web.Response(status=503)

    app = web.Application()
    app.router.add_post("/{any:.*}", hold)
    async with TestServer(app) as server, aclosing(HttpClient(requests_per_destination=4)) as http:
        settings = caller_settings(Keys(), receiver_url="http://127.0.0.1:9", endpoint_url=str(server.make_url("")))
        metrics = Metrics(MetricMeter.noop)
        keys = LiveKeys(settings, metrics)
        endpoints = Endpoints(settings, keys=keys, http=http, metrics=metrics)
        held: list[asyncio.Task[object]] = []

        async def reached() -> None:
            assert len(asked) == len(held)

        for number in range(4):
            sent = endpoints.start(
                "payments", start(f"request-{number}"), None, DataConverter.default, remaining=MINUTE
            )
            held.append(asyncio.create_task(sent))
            await assert_eventually(reached)
        assert asked == ["wait=30", "wait=30", None, None]
        closing.set()
        await asyncio.gather(*held, return_exceptions=True)


async def test_a_handler_that_hangs_takes_no_place_of_another_behind_the_same_gateway() -> None:
    """Two handlers have one host and port. All places of the first are taken, and the second is reached at once."""
    asked: list[str] = []
    closing = asyncio.Event()

    async def route(request: web.Request) -> web.Response:
        asked.append(request.path)
        if request.path.startswith("/slow/"):
            await closing.wait()
        return web.Response(status=503)

    app = web.Application()
    app.router.add_post("/{any:.*}", route)
    async with TestServer(app) as server, aclosing(HttpClient(requests_per_destination=2)) as http:
        keys, url = Keys(), str(server.make_url(""))
        options = {"networks": ["127.0.0.0/8"], "allow_insecure": True}
        settings = caller_settings(
            keys,
            receiver_url="http://127.0.0.1:9",
            endpoint_url=url,
            handlers={
                name: {"start_keys": key_set(), "completion_keys": key_set(), "answers": "unsigned"}
                for name in ("slow", "quick")
            },
            endpoints={name: {"url": f"{url}/{name}", "handler": name, **options} for name in ("slow", "quick")},
        )
        metrics = Metrics(MetricMeter.noop)
        endpoints = Endpoints(settings, keys=LiveKeys(settings, metrics), http=http, metrics=metrics)
        waiting = [
            asyncio.create_task(
                endpoints.start("slow", start(f"request-{number}"), None, DataConverter.default, remaining=MINUTE)
            )
            for number in range(2)
        ]

        async def taken() -> None:
            assert len(asked) == len(waiting)

        await assert_eventually(taken)
        with pytest.raises(NotStartedError, match="answered 503"):
            await endpoints.start("quick", start("request-q"), None, DataConverter.default, remaining=MINUTE)
        closing.set()
        await asyncio.gather(*waiting, return_exceptions=True)
