"""The command `callback-bridge receiver serve`."""

from cyclopts import App

from bridge.admin import command
from bridge.admin.command import ServeOptions
from bridge.http.listener import bind, listening, stop_on_signals
from bridge.runtime.event_log import configure_logging
from bridge.runtime.settings import SettingsError, load
from bridge.temporal.lasting_client import lasting_client
from bridge.temporal.server import connect
from caller.receiver import create_app
from caller.settings import CallerSettings

receiver = App(name="receiver", help="The caller's receiver: it accepts outcomes and completes the waiting activities.")

receiver.command("caller.admin.doctor:doctor", name="doctor")


@receiver.command
async def serve(*, options: ServeOptions = ServeOptions()) -> None:  # noqa: B008 - frozen
    """Run the receiver: accept outcomes from handlers and complete the activities that wait for them.

    BRIDGE_CONFIG names the file with the settings; BRIDGE_... variables override the file. TEMPORAL_ADDRESS,
    TEMPORAL_NAMESPACE and similar variables give the connection to Temporal. A worker with
    CallerPlugin(serve_receiver=True) does not need this process.
    """
    configure_logging(options.log_level, options.log_format)
    settings = load(CallerSettings)
    if settings.receiver is None:
        message = "no receiver in the settings: without one there is nothing to serve"
        raise SettingsError(message)
    client = await connect(settings, serves_metrics=True)
    app = create_app(settings, client=lasting_client(client))
    port = settings.receiver.port if options.port is None else options.port
    sockets = bind(options.host or settings.receiver.host, port, reuse_port=options.reuse_port)
    stop = stop_on_signals()
    async with listening(app, sockets) as url:
        command.announce("receiver", url)
        await stop.wait()
