"""The handler's side: the service that starts targets, and the interceptor that tells their callers."""

from handler.plugin import HandlerPlugin
from handler.settings import HandlerSettings

__all__ = ["HandlerPlugin", "HandlerSettings"]
