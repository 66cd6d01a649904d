"""What the status of a failed call to Temporal means."""

import pytest
from temporalio.api.common.v1 import GrpcStatus
from temporalio.api.errordetails.v1 import NamespaceNotFoundFailure
from temporalio.service import RPCError, RPCStatusCode

from bridge.temporal.rpc_status import error_type, is_final, is_missing, is_temporary


@pytest.mark.parametrize(
    ("status", "kind", "temporary", "final"),
    [
        ("INVALID_ARGUMENT", "BAD_REQUEST", False, False),
        ("NOT_FOUND", "NOT_FOUND", False, False),
        ("UNIMPLEMENTED", "NOT_IMPLEMENTED", False, False),
        ("RESOURCE_EXHAUSTED", "RESOURCE_EXHAUSTED", True, False),
        ("UNAVAILABLE", "UNAVAILABLE", True, False),
        ("ABORTED", "UNAVAILABLE", True, False),
        ("DEADLINE_EXCEEDED", "UPSTREAM_TIMEOUT", True, False),
        ("CANCELLED", "INTERNAL", True, False),
        ("UNKNOWN", "INTERNAL", True, False),
        ("PERMISSION_DENIED", "INTERNAL", True, False),
        ("UNAUTHENTICATED", "INTERNAL", True, False),
        ("INTERNAL", "INTERNAL", False, False),
        ("DATA_LOSS", "INTERNAL", False, False),
        ("ALREADY_EXISTS", "INTERNAL", False, True),
        ("FAILED_PRECONDITION", "INTERNAL", False, True),
        ("OUT_OF_RANGE", "INTERNAL", False, True),
    ],
)
def test_every_status_of_a_failed_call_has_one_meaning(status: str, kind: str, temporary: bool, final: bool) -> None:
    """The table names what the request gets, whether a later call may succeed, and whether none can."""
    error = RPCError("text", RPCStatusCode[status], b"")
    assert error_type(error).name == kind
    assert (is_temporary(error), is_final(error)) == (temporary, final)


@pytest.mark.parametrize("namespace_exists", [True, False])
def test_a_namespace_that_does_not_exist_is_not_a_missing_run(namespace_exists: bool) -> None:
    """With wrong settings every run is NOT_FOUND. This must not look as if the runs had ended."""
    details = GrpcStatus()
    if not namespace_exists:
        details.details.add().Pack(NamespaceNotFoundFailure(namespace="payments"))
    assert is_missing(RPCError("text", RPCStatusCode.NOT_FOUND, details.SerializeToString())) is namespace_exists
