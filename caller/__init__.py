"""The caller's side: the waiting activity, and the receiver that completes it."""

from caller.plugin import CallerPlugin
from caller.settings import CallerSettings

__all__ = ["CallerPlugin", "CallerSettings"]
