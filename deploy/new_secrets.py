"""Make the secrets that compose.yaml mounts: the settings of both sides with new keys, and the database's password.

`python3 deploy/new_secrets.py`, with any Python 3. It never overwrites a file. To make new secrets, remove the folder.
"""

import base64
import re
import secrets
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
TEMPLATES = ("caller.toml", "handler.toml")


def new_key() -> str:
    """A new random key in the form of `callback-bridge keys new`."""
    return base64.urlsafe_b64encode(secrets.token_bytes(32)).decode().rstrip("=")


def main(folder: Path) -> None:
    """Write the secrets into *folder*, which must not exist."""
    try:
        # Only the mode of the folder protects the files, because in a container another user reads each file.
        folder.mkdir(mode=0o700)
    except FileExistsError:
        sys.exit(f"{folder} exists already; nothing was changed")
    texts = {name: (HERE / name).read_text() for name in TEMPLATES}
    keys = {name: new_key() for name in set(re.findall(r"KEY-\d", "".join(texts.values())))}
    for name, text in texts.items():
        # The same name becomes the same key in both files.
        (folder / name).write_text(re.sub(r"KEY-\d", lambda found: keys[found[0]], text))
    (folder / "postgres-password").write_text(secrets.token_urlsafe(24))
    for path in folder.iterdir():
        path.chmod(0o444)


if __name__ == "__main__":
    main(HERE / "secrets" if len(sys.argv) < 2 else Path(sys.argv[1]))
