"""The command `callback-bridge` as `python -m caller`, with the receiver's `serve` at its top."""

from bridge.admin.root import main

if __name__ == "__main__":
    main("receiver", name="python -m caller")
