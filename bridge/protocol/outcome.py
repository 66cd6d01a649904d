"""How an operation ended, and its form as HTTP content.

One type for all that can tell an outcome: the completion, the answer to a start, the closing event of a target.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from temporalio.api.common.v1 import Payload
from temporalio.api.failure.v1 import Failure

from bridge.errors import RemoteProtocolError
from bridge.protocol.failure import decode_failure, encode_failure, parse_failure
from bridge.protocol.headers import OperationState
from bridge.protocol.payload import CONTENT_TYPE, JSON, MAX_PAYLOAD_BYTES, decode_payload, encode_payload, is_json

OUTCOME_TOO_LARGE = "OutcomeTooLarge"
"""Error type of the failure that stands for an outcome too large to cross."""

CANCELED_MESSAGE = "operation canceled"
"""What every canceled operation is told by, as by Temporal's server: a closing event keeps no words of the target's."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A final state with its result or its failure, both as their data converter and codec made them."""

    state: OperationState
    """Never RUNNING."""
    result: Payload | None = None
    """Only of a success; None where the target gave no value."""
    failure: Failure | None = None
    """Of a failure or cancellation, with its whole cause chain."""

    @classmethod
    def succeeded(cls, result: Payload | None) -> "Outcome":
        return cls(state=OperationState.SUCCEEDED, result=result)

    @classmethod
    def failed(cls, failure: Failure) -> "Outcome":
        return cls(state=OperationState.FAILED, failure=failure)

    @classmethod
    def canceled(cls, failure: Failure) -> "Outcome":
        """*failure* carries a cancellation; one is made of it if not."""
        if not failure.HasField("canceled_failure_info"):
            failure.canceled_failure_info.SetInParent()
        return cls(state=OperationState.CANCELED, failure=failure)

    def within_size_limit(self) -> "Outcome":
        """This outcome, or, where it is too large to complete an activity with, a failure that says so."""
        part = self.result if self.failure is None else self.failure
        size = 0 if part is None else part.ByteSize()
        return self if size <= MAX_PAYLOAD_BYTES else too_large(size, MAX_PAYLOAD_BYTES)


def too_large(size: int, limit: int) -> Outcome:
    """The outcome told in place of one that has *size* bytes where *limit* can be carried."""
    failure = Failure(message=f"the operation's outcome of {size} bytes is over the limit of {limit} bytes")
    failure.application_failure_info.type = OUTCOME_TOO_LARGE
    failure.application_failure_info.non_retryable = True
    return Outcome.failed(failure)


def encode_outcome(outcome: Outcome) -> tuple[dict[str, str], bytes]:
    """Content headers and body of *outcome*; the state travels beside them."""
    if outcome.failure is None:
        return encode_payload(outcome.result)
    return {CONTENT_TYPE: JSON}, encode_failure(outcome.failure).to_json()


def decode_outcome(state: OperationState, headers: Mapping[str, str], body: bytes) -> Outcome:
    """Read the content that goes with *state*.

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
