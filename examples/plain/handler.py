"""A handler without Temporal. It pays up to 100 at once, up to 10 000 after some seconds, and declines larger payments.

`python -m examples.plain.handler PORT`. START_KEY and COMPLETION_KEY are the keys that it shares with its caller,
RECEIVER is the URL that the caller's callbacks begin with, `https://orders.example/callbacks/`.

A production handler needs more. This handler keeps payments in memory. After a restart a repeated start therefore pays
twice; a database row for each request id, written before the answer, prevents that. It serves one caller and one
operation. It delivers an outcome once, because a caller that did not receive it asks again.
"""

import asyncio
import json
import os
import sys
from typing import Any

import aiohttp
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from multidict import CIMultiDict
from yarl import URL

from examples.plain.signatures import decode_key, is_signed, sign, sign_answer

Outcome = tuple[str, dict[str, Any]]
"""State, and result or Failure."""

KINDS = {"/": "echo", "/PaymentService/process/cancel": "cancel"}

SETTLEMENT = float(os.environ.get("PAYMENT_SETTLEMENT_SECONDS", "5"))


async def pay(payment: dict[str, Any]) -> Outcome:
    """Pay for one order."""
    if payment["amount"] > 10_000:
        return "failed", {"message": "card declined", "details": {"order_id": payment["order_id"]}}
    try:
        await asyncio.sleep(0 if payment["amount"] <= 100 else SETTLEMENT)
    except asyncio.CancelledError:
        return "canceled", {"message": "payment canceled"}
    return "succeeded", {"payment_id": f"p-{payment['order_id']}", "status": "paid"}


def authentication(key: bytes) -> Middleware:
    """A middleware that accepts only requests signed with *key*, and signs the answers."""

    @web.middleware
    async def authenticate(request: web.Request, handler: Handler) -> web.StreamResponse:
        kind, body = KINDS.get(request.path, "start"), await request.read()
        if not is_signed(f"bridge-{kind}", request.raw_path, request.headers, body, key=key):
            return web.Response(status=401)
        response = await handler(request)
        assert isinstance(response, web.Response)
        content = response.body if isinstance(response.body, bytes) else b""
        sign_answer(request.raw_path, request.headers, response.status, response.headers, content, key=key)
        return response

    return authenticate


def create_app(*, start_key: bytes, completion_key: bytes, receiver: str) -> web.Application:
    """The handler's routes. It shares the keys with its one caller, whose callback URLs begin with *receiver*."""
    payments: dict[str, asyncio.Task[Outcome]] = {}
    deliveries: set[asyncio.Task[None]] = set()

    async def start(request: web.Request) -> web.Response:
        request_id, callback = request.headers.get("Nexus-Request-Id", ""), request.query.get("callback", "")
        if not request_id or not callback.startswith(receiver):
            return web.Response(status=400)
        is_new = request_id not in payments
        if is_new:
            payments[request_id] = asyncio.create_task(pay(await request.json()))
        payment = payments[request_id]
        await asyncio.wait({payment}, timeout=0.1)
        if payment.done():
            state, content = payment.result()
            return respond(200 if state == "succeeded" else 424, content, {"Nexus-Operation-State": state})
        if is_new:
            deliveries.add(asyncio.create_task(deliver(callback, request_id, payment)))
        return respond(201, {"token": request_id, "state": "running"}, {})

    async def cancel(request: web.Request) -> web.Response:
        payment = payments.get(request.headers.get("Nexus-Operation-Token", ""))
        if payment is not None:
            payment.cancel()
        return web.Response(status=404 if payment is None else 202)

    async def echo(_: web.Request) -> web.Response:
        return web.Response()

    async def deliver(callback: str, token: str, payment: asyncio.Task[Outcome]) -> None:
        state, content = await payment
        body = json.dumps(content).encode()
        headers = CIMultiDict(
            {"Content-Type": "application/json", "Nexus-Operation-State": state, "Nexus-Operation-Token": token}
        )
        sign("bridge-completion", callback, headers, body, key=completion_key)
        async with aiohttp.ClientSession() as session:
            await session.post(URL(callback, encoded=True), headers=headers, data=body, allow_redirects=False)

    app = web.Application(middlewares=[authentication(start_key)])
    app.router.add_post("/", echo)
    app.router.add_post("/PaymentService/process", start)
    app.router.add_post("/PaymentService/process/cancel", cancel)
    return app


def respond(status: int, content: dict[str, Any], headers: dict[str, str]) -> web.Response:
    """An answer of JSON without a charset, because Temporal does not recognize JSON with a charset."""
    return web.Response(
        status=status, headers={"Content-Type": "application/json", **headers}, body=json.dumps(content).encode()
    )


if __name__ == "__main__":
    keys = {name: decode_key(os.environ[name.upper()]) for name in ("start_key", "completion_key")}
    app = create_app(**keys, receiver=os.environ["RECEIVER"])
    web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), print=None)
