"""The command `callback-bridge receiver serve`."""

from cyclopts import App

from bridge.admin import command
from bridge.admin.command import ServeOptions
from bridge.runtime.event_log import configure_logging
from bridge.runtime.settings import load
from bridge.temporal.connection import connect
from bridge.temporal.lasting_client import lasting_client
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
    place = settings.required_receiver()
    client = await connect(settings, serves_metrics=True)
    app = create_app(settings, client=lasting_client(client))
    await command.serve("receiver", app, options.bind(place.host, place.port))
