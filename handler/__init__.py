"""The handler's side: the service that starts targets, and the plugin that delivers their outcomes."""

from importlib.util import find_spec
from pathlib import Path

_own = Path(__file__).parent.parent / "bridge" / "__init__.py"
_found = getattr(find_spec("bridge"), "origin", "missing")
if _found != str(_own):
    # Checked before the import: another module's code must not run, and its error would not name our package.
    _message = f"the package bridge should be {_own}, but is {_found}; rename that module, or move it off sys.path"
    raise ImportError(_message)

from handler.delivery.activities import UndeliveredOutcome  # noqa: E402 - after the check
from handler.plugin import HandlerPlugin  # noqa: E402 - after the check
from handler.service import create_app  # noqa: E402 - after the check
from handler.settings import HandlerSettings  # noqa: E402 - after the check

__all__ = ["HandlerPlugin", "HandlerSettings", "UndeliveredOutcome", "create_app"]
