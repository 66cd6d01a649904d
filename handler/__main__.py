"""The command `callback-bridge` as `python -m handler`, with the handler service's `serve` at its top."""

from bridge.admin.root import main

if __name__ == "__main__":
    main("handler", name="python -m handler")
