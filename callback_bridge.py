"""The console script `callback-bridge`.

It is a module of its own, because an import from `bridge` imports Temporal's SDK. The import takes a second, in which
Ctrl-C ends the process without a traceback.
"""

import signal
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from bridge.admin import root  # noqa: PLC0415 - see above

    signal.signal(signal.SIGINT, before)
    root.main()
