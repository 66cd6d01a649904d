"""The handler's command line: `python -m handler`."""

import argparse
from collections.abc import Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import NoReturn

from temporalio.worker import Worker

from bridge import command
from bridge.keys import decode_key
from bridge.namespace import Namespace
from bridge.operations import Targets
from bridge.server import Readiness, serve, stop_on_signals
from bridge.settings import SettingsError, load
from bridge.tokens import OperationTokens
from handler.plugin import HandlerPlugin
from handler.service import create_service
from handler.settings import HandlerSettings
from handler.starter import Starter


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
        "--module", required=True, metavar="NAME", help="dotted name of the module with the decorated workflows"
    )
    service.add_argument(
        "--with-worker",
        action="store_true",
        help="host the workflows' worker too, and start them eagerly; if the module has an `activities` list, "
        "the worker gets those",
    )
    command.add_serve_options(service)
    service.set_defaults(run=_serve)
    command.add_keys_command(commands)
    command.run(parser, arguments)


async def _serve(arguments: argparse.Namespace) -> None:
    command.configure_logging(arguments.log_level)
    stop = stop_on_signals()
    settings = load(HandlerSettings)
    module = command.import_module(arguments.module)
    try:
        targets = Targets.in_module(module)
    except ValueError as error:
        raise SettingsError(str(error)) from None
    if not list(targets):
        message = f"{arguments.module} has no workflow decorated with @emits_callback"
        raise SettingsError(message)
    client = await command.connect(settings.data_converter)

    def clock() -> datetime:
        return datetime.now(UTC)

    namespace = Namespace(client, clock=clock)
    readiness = Readiness(namespace.is_reachable)
    starter = Starter(
        client=client,
        tokens=OperationTokens(settings.operation_keys),
        hash_key=decode_key(settings.hash_key),
        task_queue=settings.task_queue,
        retention=namespace.retention,
        clock=clock,
        is_eager=arguments.with_worker,
    )
    app = create_service(settings, targets=targets, starter=starter, readiness=readiness)
    async with AsyncExitStack() as stack:
        if arguments.with_worker:
            worker = Worker(
                client,
                task_queue=settings.task_queue,
                workflows=[target.workflow_class for target in targets],
                activities=getattr(module, "activities", []),
                plugins=[HandlerPlugin(settings)],
            )
            await stack.enter_async_context(worker)
        await serve(
            app,
            readiness,
            host=arguments.host or settings.service.host,
            port=settings.service.port if arguments.port is None else arguments.port,
            reuse_port=arguments.reuse_port,
            on_listening=lambda url: command.announce("handler", url),
            stop=stop,
        )


if __name__ == "__main__":
    main()
