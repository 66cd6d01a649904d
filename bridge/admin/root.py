"""The root of the command `callback-bridge`.

The commands of each side are listed as text and imported when they are used. Therefore this package depends on neither
side. The table also works in a checkout, which has no entry points.
"""

import inspect
import secrets
import sys
from typing import NoReturn

from cyclopts import App, Parameter

import bridge
from bridge.admin import command
from bridge.admin.init import init
from bridge.admin.keys import keys
from bridge.admin.pair import checked, pair
from bridge.console.sessions import hash_token
from bridge.runtime.settings import ConsoleSettings
from bridge.runtime.user_modules import require_own_package

COMMANDS = {
    "call": "caller.admin.call:call",
    "receiver": "caller.admin.serve:receiver",
    "handler": "handler.admin.serve:handler",
    "calls": "caller.admin.calls:calls",
    "runs": "handler.admin.runs:runs",
    "deliveries": "handler.admin.deliveries:deliveries",
}

_EPILOGUE = """\
Examples:

    callback-bridge init
    BRIDGE_CONFIG=caller.toml callback-bridge receiver serve
    BRIDGE_CONFIG=handler.toml callback-bridge handler serve \\
        --module payments --with-worker
    callback-bridge call payments PaymentService/process '{"order_id": "7", "amount": 12.5}'
    callback-bridge calls show order-7
    callback-bridge deliveries list --json

Environment:

- `BRIDGE_CONFIG` names the TOML file with the settings of the side; `BRIDGE_...` variables override single values.
- `TEMPORAL_ADDRESS` (by default localhost:7233) and `TEMPORAL_NAMESPACE` (by default that of the settings) name the
  Temporal of this side. TLS, API keys and profiles: `TEMPORAL_...` variables, as for every client.

Exit codes: 0; 1 if a command cannot be carried out; 2 for bad usage or settings; 130 if interrupted.
"""


console = App(name="console", help="The page for operators: see docs/observability.md.")


@console.command
def token(operator: str, /) -> None:
    """Print a new token for the console, and its entry in the settings. The token is not stored and not shown again.

    Args:
        operator: Name of the person who gets the token. The log names it.
    """
    new_token = secrets.token_urlsafe()
    # The settings would refuse the entry later.
    checked(lambda: ConsoleSettings(tokens={operator: hash_token(new_token)}))
    print(f"the token of {operator} for the login form: {new_token}\n")
    print(f'[console.tokens]\n"{operator}" = "{hash_token(new_token)}"')


def main(serve: str | None = None, *, name: str = command.NAME) -> NoReturn:
    """Run the command line under *name*. *serve* names the side whose `serve` becomes a command of the root too."""

    async def chosen() -> None:
        for package in ("caller", "handler"):
            require_own_package(package)
        try:
            "".join(sys.argv).encode()
        except UnicodeEncodeError:
            # A shell passes bytes of another encoding as lone surrogates. Neither Temporal nor a file can store them.
            message = "a value is not UTF-8; the terminal and the shell have to use UTF-8"
            raise command.CommandError(message) from None
        app = App(
            name=name,
            help="Call a workflow in another Temporal namespace: the two services, keys, and what operators need.",
            help_epilogue=_EPILOGUE,
            help_format="markdown",
            default_parameter=Parameter(negative=""),
            version=bridge.__version__,
            version_flags=["--version"],
        )
        app.command(init)
        app.command(keys)
        app.command(console)
        app.command(pair)
        for each, path in COMMANDS.items():
            app.command(path, name=each)
        if serve is not None:
            app.command(COMMANDS[serve].partition(":")[0] + ":serve", name="serve")
        if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
            for each in COMMANDS:
                app[each]  # imports the command, because its help is shown
        function, bound, _ = app.parse_args(exit_on_error=False, print_error=False)
        result = function(*bound.args, **bound.kwargs)
        if inspect.isawaitable(result):
            await result

    command.run(chosen, name=name)
