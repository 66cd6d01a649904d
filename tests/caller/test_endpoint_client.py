"""The requests of the caller's worker to a handler, on a real socket."""

import asyncio
from contextlib import aclosing
from datetime import UTC, datetime, timedelta

from aiohttp import web
from aiohttp.test_utils import TestServer
from temporalio.api.common.v1 import Payload
from temporalio.common import MetricMeter

from bridge.protocol.start import StartRequest
from bridge.runtime.http_client import HttpClient
from bridge.runtime.metrics import Metrics
from bridge.runtime.reloaded import LiveKeys
from caller.endpoint_client import Endpoints
from tests.support.helpers import Keys, assert_eventually, caller_settings

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
    async with TestServer(app) as server, aclosing(HttpClient(user_agent="t", requests_per_destination=4)) as http:
        settings = caller_settings(Keys(), receiver_url="http://127.0.0.1:9", endpoint_url=str(server.make_url("")))
        metrics = Metrics(MetricMeter.noop)
        keys = LiveKeys(settings, metrics)
        endpoints = Endpoints(settings, keys=keys, http=http, metrics=metrics, clock=lambda: datetime.now(UTC))
        held: list[asyncio.Task[object]] = []

        async def reached() -> None:
            assert len(asked) == len(held)

        for number in range(4):
            sent = endpoints.start("payments", start(f"request-{number}"), Payload(), remaining=MINUTE)
            held.append(asyncio.create_task(sent))
            await assert_eventually(reached)
        assert asked == ["wait=30", "wait=30", None, None]
        closing.set()
        await asyncio.gather(*held, return_exceptions=True)
