"""Make the secrets that compose.yaml mounts: both sides' settings with fresh keys, and the database's password.

`python3 deploy/new_secrets.py`, with any Python 3. Never overwrites: to begin anew, remove the folder first.
"""

import base64
import re
import secrets
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
TEMPLATES = ("caller.toml", "handler.toml")


def new_key() -> str:
    """As `callback-bridge keys new` makes them."""
    return base64.urlsafe_b64encode(secrets.token_bytes(32)).decode().rstrip("=")


def main(folder: Path) -> None:
    """Write the secrets into *folder*, which must not be there yet."""
    try:
        # Only the folder keeps others out: in a container each file is read by a user of its own.
        folder.mkdir(mode=0o700)
    except FileExistsError:
        sys.exit(f"{folder} is there already; nothing was changed")
    texts = {name: (HERE / name).read_text() for name in TEMPLATES}
    keys = {name: new_key() for name in set(re.findall(r"KEY-\d", "".join(texts.values())))}
    for name, text in texts.items():
        # The same name is the same key, in both files.
        (folder / name).write_text(re.sub(r"KEY-\d", lambda found: keys[found[0]], text))
    (folder / "postgres-password").write_text(secrets.token_urlsafe(24))
    for path in folder.iterdir():
        path.chmod(0o444)


if __name__ == "__main__":
    main(HERE / "secrets" if len(sys.argv) < 2 else Path(sys.argv[1]))
