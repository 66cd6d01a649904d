"""How an operation ended, and its form as HTTP content.

One type serves every source of an outcome: the completion, the answer to a start, and the close event of a target.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from temporalio.api.common.v1 import Payload
from temporalio.api.failure.v1 import Failure

from bridge.errors import RemoteProtocolError
from bridge.protocol.failure import decode_failure, encode_failure, parse_failure
from bridge.protocol.headers import OperationState
from bridge.protocol.payload import (
    CONTENT_TYPE,
    JSON,
    MAX_BODY_BYTES,
    MAX_PAYLOAD_BYTES,
    MAX_PAYLOADS,
    decode_payload,
    encode_payload,
    is_json,
    payloads_in,
)

OUTCOME_TOO_LARGE = "OutcomeTooLarge"
"""Error type of the failure that replaces an outcome which is too large to deliver."""

CANCELED_MESSAGE = "operation canceled"
"""Message of every canceled operation, as in Temporal's server. The close event of a target holds no other text."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A final state with its result or its failure, encoded by the target's data converter and codec."""

    state: OperationState
    """Never RUNNING."""
    result: Payload | None = None
    """The value of an operation that succeeded; None if the target returned no value."""
    failure: Failure | None = None
    """The failure of an operation that failed or was canceled, with all its causes."""

    @classmethod
    def succeeded(cls, result: Payload | None) -> "Outcome":
        """The outcome of an operation that returned *result*."""
        return cls(state=OperationState.SUCCEEDED, result=result)

    @classmethod
    def failed(cls, failure: Failure) -> "Outcome":
        """The outcome of an operation that ended with *failure*."""
        return cls(state=OperationState.FAILED, failure=failure)

    @classmethod
    def canceled(cls, failure: Failure) -> "Outcome":
        """The outcome of a canceled operation. If *failure* is not a cancellation, this method turns it into one."""
        if not failure.HasField("canceled_failure_info"):
            failure.canceled_failure_info.SetInParent()
        return cls(state=OperationState.CANCELED, failure=failure)

    def within_size_limit(self) -> "Outcome":
        """This outcome, or the outcome of `too_large` if an activity cannot be completed with it."""
        part = self.result if self.failure is None else self.failure
        if part is None:
            return self
        if (size := part.ByteSize()) > MAX_PAYLOAD_BYTES:
            return too_large(size, MAX_PAYLOAD_BYTES)
        count = sum(1 for _ in payloads_in(part))
        return self if count <= MAX_PAYLOADS else too_large(count, MAX_PAYLOADS, unit="values")


def too_large(size: int, limit: int, *, unit: str = "bytes") -> Outcome:
    """The failed outcome that replaces an outcome of *size*, if at most *limit* can be delivered."""
    failure = Failure(message=f"the operation's outcome of {size} {unit} is over the limit of {limit} {unit}")
    failure.application_failure_info.type = OUTCOME_TOO_LARGE
    failure.application_failure_info.non_retryable = True
    return Outcome.failed(failure)


def encode_outcome(outcome: Outcome) -> tuple[dict[str, str], bytes]:
    """Content headers and body of *outcome*. The state is not part of the content."""
    if outcome.failure is None:
        return encode_payload(outcome.result)
    body = encode_failure(outcome.failure).to_json()
    if len(body) > MAX_BODY_BYTES:
        # JSON spells some characters in six bytes, and the stack trace twice.
        return encode_outcome(too_large(len(body), MAX_BODY_BYTES))
    return {CONTENT_TYPE: JSON}, body


def decode_outcome(state: OperationState, headers: Mapping[str, str], body: bytes) -> Outcome:
    """Read the content of an outcome with *state*.

    Raises:
        RemoteProtocolError: The content does not fit the state.
    """
    if state is OperationState.SUCCEEDED:
        return Outcome.succeeded(decode_payload(headers, body))
    if not is_json(headers):
        message = f"a {state.value} operation needs a Failure as {JSON}"
        raise RemoteProtocolError(message)
    failure = decode_failure(parse_failure(body), canceled=state is OperationState.CANCELED)
    return Outcome(state=state, failure=failure)
