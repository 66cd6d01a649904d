"""Settings that are not this machine's."""

import pytest


@pytest.fixture(autouse=True)
def _no_settings_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BRIDGE_CONFIG", "BRIDGE_NAME"):
        monkeypatch.delenv(name, raising=False)
