"""Make the virtual environment that a command needs, then run the command in it.

Runs under any Python 3 that a machine has. Therefore it uses the standard library only, and no recent syntax. Two
commands at once wait for each other. What is installed already stays as it is.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST = (3, 11)
VENV = ROOT / ".venv"
REQUIREMENTS = {
    "test": "dev.txt",
    "check": "dev.txt",
    "pictures": "dev.txt",
    "bench": "bench.txt",
    "attack": "bench.txt",
    "scale": "bench.txt",
    "soak": "bench.txt",
}
"""What a command installs that needs more than `run.txt`."""


def say(text: str) -> None:
    """Print one line for the user, on standard error."""
    print(text, file=sys.stderr, flush=True)


def find_python() -> str:
    """A Python that is new enough: this one, or another on PATH."""
    if sys.version_info >= OLDEST:
        return sys.executable
    for minor in range(20, OLDEST[1] - 1, -1):
        found = shutil.which(f"python3.{minor}")
        if found:
            return found
    say(f"Python 3.11 or newer is needed, on PATH as python3 or python3.N; this is {sys.version.split()[0]}.")
    sys.exit(1)


def run(what: str, command: "list[str]") -> None:
    """Run *command* quietly, and report every few seconds that it still runs. Where it fails, show its output."""
    began = time.monotonic()
    say(f"{what} …")
    output = b""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        while True:
            try:
                output, _ = process.communicate(timeout=5)
                break
            except subprocess.TimeoutExpired:
                say(f"{what} … {time.monotonic() - began:.0f} s")
            except KeyboardInterrupt:
                process.terminate()
                sys.exit(130)
    if process.returncode != 0:
        say(output.decode(errors="replace"))
        say(f"{what} failed; the lines above say why. After mending it, run the command again.")
        sys.exit(1)


def ensure_venv(requirements: Path) -> Path:
    """Install exactly what *requirements* locks, once for each content of the file."""
    digest = hashlib.sha256(requirements.read_bytes()).hexdigest()[:16]
    stamp = VENV / (f"installed-{requirements.stem}-{digest}")
    with (ROOT / ".venv.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        python = VENV / "bin" / "python"
        if stamp.exists() and python.exists():
            return python
        if not python.exists():
            shutil.rmtree(VENV, ignore_errors=True)
            run("making a virtual environment", [find_python(), "-m", "venv", str(VENV)])
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--require-hashes"]
        run("installing dependencies", [*pip, "-r", str(requirements)])
        stamp.touch()
        return python


def main() -> None:
    """`bootstrap.py COMMAND [ARGUMENT …]`."""
    command, arguments = sys.argv[1], sys.argv[2:]
    python = ensure_venv(ROOT / "scripts" / "requirements" / REQUIREMENTS.get(command, "run.txt"))
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    os.execve(str(python), [str(python), "-m", f"scripts.commands.{command}", *arguments], environment)


if __name__ == "__main__":
    main()
