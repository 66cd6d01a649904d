"""Format, lint, types, import contracts, documents and the compose file.

`--fix` repairs what ruff can, and writes the tables of docs/settings.md.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

from scripts.environment.stack import ROOT

PACKAGES = ("bridge", "caller", "handler", "deploy", "examples", "scripts", "tests")


def main() -> NoReturn:
    """Run every check, then report which failed."""
    parser = argparse.ArgumentParser(prog="scripts/check", description=__doc__)
    parser.add_argument("--fix", action="store_true", help="repair what ruff can, write the tables of docs/settings.md")
    fix = parser.parse_args().fix
    tools = Path(sys.executable).parent
    checks = [
        ("format", ["ruff", "format", *([] if fix else ["--check"]), "."]),
        ("lint", ["ruff", "check", *(["--fix"] if fix else []), "."]),
        ("types", ["mypy", *PACKAGES]),
        ("import contracts", ["lint-imports", "--no-cache"]),
        ("words and fields", ["python", "-m", "scripts.checks.prose"]),
        ("settings page", ["python", "-m", "scripts.checks.settings_page", *(["--fix"] if fix else [])]),
        # The specification's schema comes with the tool: no Docker, no network.
        ("compose file", ["check-jsonschema", "--builtin-schema", "vendor.compose-spec", "compose.yaml"]),
    ]
    failed = []
    for name, (tool, *arguments) in checks:
        print(f"== {name}", flush=True)
        command = shutil.which(tool, path=str(tools)) or tool
        if subprocess.run([command, *arguments], cwd=ROOT, check=False).returncode != 0:
            failed.append(name)
    print(f"failed: {', '.join(failed)}" if failed else "all checks passed", flush=True)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
