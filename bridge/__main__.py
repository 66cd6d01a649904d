"""The command `callback-bridge` from a checkout: `python -m bridge`."""

from bridge.admin.root import main

if __name__ == "__main__":
    main()
