"""The command `callback-bridge handler serve`."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import ModuleType
from typing import Any

from cyclopts import App
from temporalio.client import Client
from temporalio.worker import Worker

from bridge.admin import command
from bridge.admin.command import ServeOptions
from bridge.runtime.event_log import configure_logging
from bridge.runtime.settings import SettingsError, load
from bridge.runtime.user_modules import import_module
from bridge.temporal.connection import connect
from bridge.temporal.lasting_client import lasting_client
from handler.plugin import HandlerPlugin
from handler.service import Served, create_app
from handler.settings import HandlerSettings

handler = App(name="handler", help="The handler service: it starts workflows for the callers in the settings.")

handler.command("handler.admin.doctor:doctor", name="doctor")


@handler.command
async def serve(
    *,
    module: str,
    with_worker: bool = False,
    options: ServeOptions = ServeOptions(),  # noqa: B008 - frozen
) -> None:
    """Run the handler service: start target workflows for the callers in the settings.

    BRIDGE_CONFIG names the file with the settings; BRIDGE_... variables override the file. TEMPORAL_ADDRESS,
    TEMPORAL_NAMESPACE and similar variables give the connection to Temporal.

    Args:
        module: Dotted name of the module with the decorated workflows. It may be in the current directory. If the
            module has names for instances of classes decorated with nexusrpc.handler.service_handler, these are served
            too. If it has a function named authorize, the function decides about every start.
        with_worker: Also run the worker for the workflows in this process, and start them eagerly. If the module has a
            list named activities, the worker runs these activities. If it has a function named on_undelivered, the
            worker calls it when a delivery ends without being accepted.
    """
    configure_logging(options.log_level, options.log_format)
    settings = load(HandlerSettings)
    host = options.host or settings.service.host
    try:
        settings.check_host(host)
    except ValueError as error:
        raise SettingsError(str(error)) from None
    imported = import_module(module)
    # Refuse a module that cannot be served before Temporal is asked for anything.
    Served.by(imported)
    client = await connect(settings, serves_metrics=True)
    worker = _worker(client, settings, imported) if with_worker else None

    def replaced(new: Client) -> None:
        if worker is not None:
            worker.client = new

    app = create_app(settings, imported, client=lasting_client(client, replaced=replaced), is_eager=with_worker)
    sockets = options.bind(host, settings.service.port)
    async with worker or nullcontext():
        await command.serve("handler", app, sockets)


def activities_in(module: ModuleType) -> Sequence[Callable[..., Any]]:
    """Return the list `activities` of *module*; an empty one if the name is that of a module which *module* imports."""
    found = getattr(module, "activities", [])
    return [] if isinstance(found, ModuleType) else found


def _worker(client: Client, settings: HandlerSettings, module: ModuleType) -> Worker:
    served, hook = Served.by(module), getattr(module, "on_undelivered", None)
    try:
        return Worker(
            client,
            task_queue=settings.task_queue,
            workflows=served.targets.workflow_classes,
            activities=activities_in(module),
            plugins=[HandlerPlugin(settings, on_undelivered=hook, authorize=served.authorize)],
        )
    except (TypeError, ValueError, RuntimeError) as error:
        # The SDK's own checks. Its error for a workflow that the sandbox refuses has the reason as its cause.
        reason = f"{error}: {error.__cause__}" if error.__cause__ else str(error)
        message = f"no worker can be made of {module.__name__}: {reason}"
        raise SettingsError(message) from None
