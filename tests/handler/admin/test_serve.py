"""What `handler serve --with-worker` takes from a team's module."""

from types import ModuleType

import pytest

from handler.admin.serve import activities_in


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
