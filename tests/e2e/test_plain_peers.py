"""Peers without Temporal: the programs of `examples/plain` as processes, with the real other side."""

import asyncio
import contextlib
import json
import os
import sys
import tomllib
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import aiohttp
import pytest
from temporalio import workflow
from temporalio.client import WorkflowFailureError
from temporalio.exceptions import ApplicationError
from temporalio.worker import Worker

import bridge
from bridge.security.keys import KeySet, new_key
from caller import CallerPlugin
from examples.payments.contract import PaymentRequest, PaymentResponse, PaymentService
from examples.payments.order import Order, OrderReceipt
from examples.payments.orders import OrderWorkflow
from scripts.environment.processes import stop_process
from scripts.environment.server import Server, free_ports
from scripts.environment.stack import ROOT
from tests.e2e.test_docs import blocks
from tests.support.helpers import HANDLER, assert_eventually, caller_settings, handler_settings
from tests.support.world import World, running_world

Process = asyncio.subprocess.Process

PROTOCOL = ROOT / "docs" / "protocol.md"


@workflow.defn(sandboxed=False)
class ImpatientWorkflow:
    """A plan that renews after a second."""

    @workflow.run
    async def run(self, request: PaymentRequest) -> PaymentResponse:
        payments = bridge.create_client(
            service=PaymentService,
            endpoint="payments",
            first_lease=timedelta(seconds=1),
            renewals=bridge.Renewals(initial=timedelta(seconds=1)),
        )
        return await payments.execute_operation(
            PaymentService.process, request, schedule_to_close_timeout=timedelta(minutes=5)
        )


def one_key(key_set: KeySet) -> str:
    return key_set.keys[key_set.signing].get_secret_value()


@contextlib.asynccontextmanager
async def running(module: str, port: int, **variables: str) -> AsyncIterator[Process]:
    """One of the example programs, yielded when it listens."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module, str(port)),
        cwd=ROOT,
        env={**os.environ, **variables},
        stdout=asyncio.subprocess.PIPE,
    )

    async def listens() -> None:
        assert process.returncode is None, "it has ended"
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError as error:
            raise AssertionError from error
        writer.close()

    try:
        await assert_eventually(listens)
        yield process
    finally:
        await stop_process(process)


@contextlib.asynccontextmanager
async def plain_handler(server: Server) -> AsyncIterator[tuple[World, str]]:
    """The caller's side of a world, and the URL of the handler without Temporal that it calls."""
    [port] = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    async with running_world(server, without=("service", "caller", "handler")) as world:
        endpoint = {"url": url, "handler": HANDLER, "networks": ["127.0.0.0/8"], "allow_insecure": True}
        settings = caller_settings(
            world.keys, receiver_url=world.receiver.url, endpoint_url=url, endpoints={"payments": endpoint}
        )
        worker = Worker(
            world.caller_client,
            task_queue=world.order_queue,
            workflows=[OrderWorkflow, ImpatientWorkflow],
            plugins=[CallerPlugin(settings)],
        )
        handler = running(
            "examples.plain.handler",
            port,
            START_KEY=one_key(world.keys.start),
            COMPLETION_KEY=one_key(world.keys.completion),
            RECEIVER=f"{world.receiver.url}/callbacks/",
            PAYMENT_SETTLEMENT_SECONDS="4",
        )
        async with worker, handler:
            yield world, url


async def order(world: World, amount: float) -> OrderReceipt:
    order_id = world.key()
    receipt: OrderReceipt = await world.caller_client.execute_workflow(
        OrderWorkflow.run, Order(order_id, amount), id=f"order-{order_id}", task_queue=world.order_queue
    )
    assert receipt.payment_id == f"p-{order_id}"
    return receipt


async def test_an_order_is_paid_by_a_handler_without_temporal(server: Server) -> None:
    """The answer to the start or a later signed completion carries the outcome; a failure arrives as a failure."""
    async with plain_handler(server) as (world, _):
        assert (await order(world, 50)).status == "paid"
        assert await world.receiver.answered() == []
        assert (await order(world, 500)).status == "paid"
        assert await world.receiver.answered() == [200]

        with pytest.raises(WorkflowFailureError) as raised:
            await order(world, 50_000)
        not_paid = raised.value.cause
        assert isinstance(not_paid, ApplicationError)
        assert not_paid.type == "OrderNotPaid"
        assert not_paid.details[0] == {"type": "NexusFailure", "message": "card declined", "cause": None}


async def test_a_handler_without_temporal_is_canceled_and_says_so(server: Server) -> None:
    """The order's cancellation waits for the completion that the handler signs."""
    async with plain_handler(server) as (world, _):
        order_id = world.key()
        handle = await world.caller_client.start_workflow(
            OrderWorkflow.run, Order(order_id, 500), id=f"order-{order_id}", task_queue=world.order_queue
        )

        async def is_taken_on() -> None:
            activity = await world.pending(handle)
            assert activity is not None
            assert activity.heartbeat_details.payloads, "no token yet"

        await assert_eventually(is_taken_on)
        await handle.cancel()
        with pytest.raises(WorkflowFailureError) as raised:
            await handle.result()
        assert "cancel" in str(raised.value.cause).lower()
        assert await world.receiver.answered() == [200]


async def test_a_completion_that_a_plain_handler_cannot_deliver_is_fetched_by_a_renewal(server: Server) -> None:
    """The handler sends once. An unreached caller repeats the start under its request id, and is charged once."""
    async with plain_handler(server) as (world, _):
        await world.receiver.stop()
        order_id = world.key()
        response = await world.caller_client.execute_workflow(
            ImpatientWorkflow.run,
            PaymentRequest(order_id, 500),
            id=f"impatient-{order_id}",
            task_queue=world.order_queue,
        )
        assert response == PaymentResponse(f"p-{order_id}", "paid")


async def test_a_plain_handler_refuses_unsigned_starts_and_other_callback_hosts(server: Server) -> None:
    """A start without the caller's signature is a 401. A forged start cannot direct requests to another host."""
    async with plain_handler(server) as (_, url), aiohttp.ClientSession() as session:
        start = f"{url}/PaymentService/process?callback=http://127.0.0.1:1/"
        headers = {"Nexus-Request-Id": "1"}
        async with session.post(start, json={"order_id": "1", "amount": 1}, headers=headers) as answer:
            assert answer.status == 401


@pytest.mark.parametrize("auth", ["signature", "bearer", "none"])
async def test_a_caller_without_temporal_starts_by_curl_and_receives_the_outcome(server: Server, auth: str) -> None:
    """The document's commands and settings work unchanged, except for ports and the order's id."""
    [receiver_port] = free_ports(1)
    key_set = KeySet.model_validate({"signing": "k1", "keys": {"k1": new_key()}})
    keys = {"START-KEY": one_key(key_set), "COMPLETION-KEY": new_key(), "BEARER-KEY": new_key()}
    number = ["signature", "bearer", "none"].index(auth)
    async with running_world(server, without=("receiver", "caller", "service", "handler")) as world:

        def filled(text: str) -> str:
            for name, key in keys.items():
                text = text.replace(name, key)
            text = text.replace("127.0.0.1:8081", f"127.0.0.1:{world.service.port}")
            return text.replace("127.0.0.1:8090", f"127.0.0.1:{receiver_port}").replace(" 8090", f" {receiver_port}")

        peer = tomllib.loads(filled(blocks(PROTOCOL, "toml")[number]))
        world.override_handler_settings(
            handler_settings(
                world.keys,
                receiver_url=world.receiver.url,
                service_url=world.service.url,
                task_queue=world.payment_queue,
                **peer,
            )
        )
        await world.service.start()
        await world.start_worker("handler")
        commands = [each for each in blocks(PROTOCOL, "sh") if "examples.plain" in each]
        receive, call = (line for line in commands[number].splitlines() if line)
        order_id = f"{world.id}7"
        async with shell(filled(receive)) as receiver:
            assert receiver.stdout is not None

            async def is_listening() -> None:
                async with aiohttp.ClientSession() as session:
                    try:
                        await session.get(f"http://127.0.0.1:{receiver_port}/")
                    except aiohttp.ClientError as error:
                        raise AssertionError from error

            await assert_eventually(is_listening)
            answer = await run(filled(call).replace("caller.sh 7 ", f"caller.sh {order_id} "))
            assert "201 Created" in answer
            received = json.loads(await asyncio.wait_for(receiver.stdout.readline(), 30))
            assert received["state"] == "succeeded"
            assert received["content"] == {"payment_id": f"p-{order_id}", "status": "paid"}
            # The same command again is the same call. When the run has closed, the answer is its outcome.
            await world.handler_client.get_workflow_handle(f"payment-{order_id}").result()
            again = await run(filled(call).replace("caller.sh 7 ", f"caller.sh {order_id} "))
            assert "200 OK" in again
            assert json.loads(again.splitlines()[-1]) == received["content"]
            if auth == "signature":
                variables, _, _ = filled(call).partition("examples/plain/caller.sh")
                by_hand = await run(f"{variables} examples/plain/by_hand.sh {order_id} 420")
                assert "200 OK" in by_hand
                assert json.loads(by_hand.splitlines()[-1]) == received["content"]


def environment() -> dict[str, str]:
    """The environment with our Python first on the path, as in an activated virtual environment."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


@contextlib.asynccontextmanager
async def shell(command: str) -> AsyncIterator[Process]:
    process = await asyncio.create_subprocess_shell(
        f"exec env {command}", cwd=ROOT, env=environment(), stdout=asyncio.subprocess.PIPE
    )
    try:
        yield process
    finally:
        await stop_process(process)


async def run(command: str) -> str:
    process = await asyncio.create_subprocess_shell(
        command, cwd=ROOT, env=environment(), stdout=asyncio.subprocess.PIPE
    )
    out, _ = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 0
    return out.decode()
