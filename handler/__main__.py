"""The handler's command line: `python -m handler`."""

import argparse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import NoReturn

from temporalio.worker import Worker

from bridge.admin import command
from bridge.runtime.http_server import Readiness, serve, stop_on_signals
from bridge.runtime.settings import SettingsError, load
from bridge.runtime.temporal import Namespace
from bridge.security.callback_tokens import OperationTokens
from bridge.security.keys import decode_key
from bridge.workflow.targets import Targets
from handler.admin.command import add_deliveries_command
from handler.plugin import HandlerPlugin
from handler.service import create_service
from handler.settings import HandlerSettings
from handler.start.canceler import Canceler
from handler.start.held_starts import Holds
from handler.start.starter import Starter
from handler.start.sync_operations import SyncOperations, service_handlers_in
from handler.sweep.activity import start_sweep


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Parse the command line and run it."""
    parser = argparse.ArgumentParser(prog="python -m handler", description="The handler's side of the callback bridge.")
    commands = parser.add_subparsers(dest="command", required=True)
    service = commands.add_parser(
        "serve",
        help="run the handler service",
        description="Run the handler service: start target workflows for the callers in the settings. "
        "Settings: BRIDGE_CONFIG names a TOML file, BRIDGE_… variables override it; the connection to Temporal comes "
        "from TEMPORAL_ADDRESS, TEMPORAL_NAMESPACE and the like.",
    )
    service.add_argument(
        "--module",
        required=True,
        metavar="NAME",
        help="dotted name of the module with the decorated workflows; an instance of a class decorated with "
        "`nexusrpc.handler.service_handler` is served too if it has a name there, for operations that need no workflow "
        '(beside a workflow of the same service, name the class: service_handler(name="PaymentService"))',
    )
    service.add_argument(
        "--with-worker",
        action="store_true",
        help="host the workflows' worker too, and start them eagerly; if the module has an `activities` list, "
        "the worker gets those",
    )
    command.add_serve_options(service)
    service.set_defaults(run=_serve)
    add_deliveries_command(commands)
    command.add_keys_command(commands)
    command.run(parser, arguments)


async def _serve(arguments: argparse.Namespace) -> None:
    command.configure_logging(arguments.log_level)
    stop = stop_on_signals()
    settings = load(HandlerSettings)
    host = arguments.host or settings.service.host
    try:
        settings.check_host(host)
    except ValueError as error:
        raise SettingsError(str(error)) from None
    module = command.import_module(arguments.module)
    try:
        targets = Targets.in_module(module)
    except ValueError as error:
        raise SettingsError(str(error)) from None
    services = service_handlers_in(module)
    if not list(targets) and not services:
        message = f"{arguments.module} has no workflow decorated with @emits_callback, and no service handler"
        raise SettingsError(message)
    client = await command.connect(settings.data_converter)
    executor = ThreadPoolExecutor(thread_name_prefix="operation")

    def clock() -> datetime:
        return datetime.now(UTC)

    try:
        operations = SyncOperations(
            services, targets=targets, data_converter=client.data_converter, executor=executor, clock=clock
        )
    except ValueError as error:
        raise SettingsError(str(error)) from None
    namespace = Namespace(client, clock=clock)
    readiness = Readiness(namespace.is_reachable)
    tokens = OperationTokens(settings.operation_keys)
    starter = Starter(
        client=client,
        tokens=tokens,
        hash_key=decode_key(settings.hash_key),
        task_queue=settings.task_queue,
        retention=namespace.retention,
        holds=Holds(client, limit=settings.service.held_starts),
        clock=clock,
        is_eager=arguments.with_worker,
        shares_storage=settings.shares_storage,
    )
    app = create_service(
        settings,
        targets=targets,
        operations=operations,
        starter=starter,
        canceler=Canceler(client=client, tokens=tokens),
        readiness=readiness,
    )
    async with AsyncExitStack() as stack:
        # What still runs there was told so, and nobody waits for it.
        stack.callback(executor.shutdown, wait=False, cancel_futures=True)
        if arguments.with_worker:
            worker = Worker(
                client,
                task_queue=settings.task_queue,
                workflows=targets.workflow_classes,
                activities=getattr(module, "activities", []),
                plugins=[HandlerPlugin(settings)],
            )
            await stack.enter_async_context(worker)
        if settings.sweep:
            try:
                await start_sweep(client, targets=targets, settings=settings)
            except ValueError as error:
                raise SettingsError(str(error)) from None
        await serve(
            app,
            readiness,
            host=host,
            port=settings.service.port if arguments.port is None else arguments.port,
            reuse_port=arguments.reuse_port,
            on_listening=lambda url: command.announce("handler", url),
            stop=stop,
        )


if __name__ == "__main__":
    main()
