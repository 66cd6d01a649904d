"""The caller's command line: `python -m caller`."""

import argparse
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import NoReturn

from bridge.admin import command
from bridge.runtime.http_server import Readiness, serve, stop_on_signals
from bridge.runtime.settings import SettingsError, load
from bridge.runtime.temporal import Namespace
from caller.completer import Completer
from caller.receiver import create_receiver
from caller.settings import CallerSettings


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Parse the command line and run it."""
    parser = argparse.ArgumentParser(prog="python -m caller", description="The caller's side of the callback bridge.")
    commands = parser.add_subparsers(dest="command", required=True)
    receiver = commands.add_parser(
        "serve",
        help="run the receiver",
        description="Run the receiver: take completions from handlers and complete the waiting activities. "
        "Settings: BRIDGE_CONFIG names a TOML file, BRIDGE_… variables override it; the connection to Temporal comes "
        "from TEMPORAL_ADDRESS, TEMPORAL_NAMESPACE and the like.",
    )
    command.add_serve_options(receiver)
    receiver.set_defaults(run=_serve)
    command.add_keys_command(commands)
    command.run(parser, arguments)


async def _serve(arguments: argparse.Namespace) -> None:
    command.configure_logging(arguments.log_level)
    stop = stop_on_signals()
    settings = load(CallerSettings)
    if settings.receiver is None:
        message = "no receiver in the settings: without one there is nothing to serve"
        raise SettingsError(message)
    client = await command.connect(settings.data_converter)

    def clock() -> datetime:
        return datetime.now(UTC)

    readiness = Readiness(Namespace(client, clock=clock).is_reachable)
    app = create_receiver(
        name=settings.name,
        completer=Completer(client=client),
        tokens=settings.callback_tokens(client.namespace),
        verifiers=settings.completion_verifiers(),
        readiness=readiness,
        clock=clock,
    )
    await serve(
        app,
        readiness,
        host=arguments.host or settings.receiver.host,
        port=settings.receiver.port if arguments.port is None else arguments.port,
        reuse_port=arguments.reuse_port,
        on_listening=lambda url: command.announce("receiver", url),
        stop=stop,
    )


if __name__ == "__main__":
    main()
