"""Headers that the caller's workflow sets: a header that cannot reach the handler is refused when the call is made."""

import pytest

from bridge.workflow.client import checked_headers


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param("tenant_id", "7", id="underscore, which proxies drop"),
        pytest.param("_", "7", id="nothing but an underscore"),
        pytest.param("", "7", id="no name"),
        pytest.param("tenant id", "7", id="blank"),
        pytest.param("ténant", "7", id="name not ASCII"),
        pytest.param("tenant", "é", id="value not ASCII"),
        pytest.param("tenant", "a\nb", id="line break"),
        pytest.param("Nexus-Request-Id", "7", id="the protocol's"),
        pytest.param("Content-Type", "text/plain", id="the payload's"),
        *(pytest.param(name, "x", id=f"{name}, of a connection") for name in ("TE", "Upgrade", "Keep-Alive", "Expect")),
        pytest.param("X-Forwarded-For", "10.0.0.7", id="a proxy adds to it"),
        pytest.param("tenant", "x" * 8192, id="longer than listeners accept"),
    ],
)
def test_a_header_that_would_not_arrive_is_refused(name: str, value: str) -> None:
    """By a ValueError in the workflow, not by a 401 behind a proxy."""
    with pytest.raises(ValueError, match="header"):
        checked_headers({name: value})


def test_more_headers_than_listeners_accept_are_refused() -> None:
    """And more than one `Signature-Input` can name."""
    with pytest.raises(ValueError, match="headers"):
        checked_headers({f"x-tenant-{number}": "7" for number in range(100)})


def test_other_headers_are_kept_in_lower_case() -> None:
    """HTTP does not distinguish cases in names."""
    assert checked_headers({"X-Tenant-Id": "7", "Priority": "u=1"}) == {"x-tenant-id": "7", "priority": "u=1"}
