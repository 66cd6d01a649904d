"""What `handler serve --with-worker` takes from a team's module."""

from types import ModuleType

import pytest

from bridge.runtime.settings import SettingsError
from handler.admin.serve import activities_in, hook_in


async def charge() -> None:
    """An activity of the team."""


@pytest.mark.parametrize(
    ("attributes", "found"),
    [
        pytest.param({}, [], id="none"),
        pytest.param({"activities": [charge]}, [charge], id="a list"),
        pytest.param({"activities": ModuleType("activities")}, [], id="import activities"),
    ],
)
def test_a_worker_runs_the_list_of_activities_of_its_module(attributes: dict[str, object], found: list[object]) -> None:
    """A module that imports the team's module `activities` could not be served otherwise."""
    module = ModuleType("payments")
    vars(module).update(attributes)
    assert activities_in(module) == found


def test_a_hook_that_could_never_be_called_is_refused() -> None:
    """It would be missed when the first outcome is not delivered."""
    module = ModuleType("payments")
    assert hook_in(module) is None
    for hook in ("a text", lambda: None):
        vars(module)["on_undelivered"] = hook
        with pytest.raises(SettingsError, match=r"payments\.on_undelivered must be a function"):
            hook_in(module)
    vars(module)["on_undelivered"] = print
    assert hook_in(module) is print
