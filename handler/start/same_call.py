"""Whether a call is the call of a run: may it get the outcome, and may a caller cancel the run? Pure functions.

Workflow ids are business ids that all callers share. The memo of a run names the call that started the run, and
decides. If the memo refuses a call, the answer does not show more than a start would.
"""

import hashlib
import hmac

from nexusrpc import HandlerError, HandlerErrorType
from temporalio.api.common.v1 import Payload

from bridge.errors import OutcomeUnknownError, bad_request
from bridge.workflow.targets import Target
from handler.delivery.records import NATIVE_CALLER
from handler.start.call import Call
from handler.start.runs import Run

OUTCOME_UNKNOWN = "the handler keeps no run of this operation any more: outcome unknown"


def keyed_hash(key: bytes, purpose: str, *parts: bytes) -> str:
    """Return a hash of *parts* that cannot be computed without *key*."""
    digest = hmac.new(key, digestmod=hashlib.sha256)
    for part in (purpose.encode(), *parts):
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def input_hash(key: bytes, opened: Payload) -> str:
    """Return the keyed hash of an input that the codec has decoded."""
    metadata = [part for name in sorted(opened.metadata) for part in (name.encode(), opened.metadata[name])]
    return keyed_hash(key, "input", *metadata, opened.data)


def is_same_call(call: Call, run: Run, *, may_start: bool) -> bool:
    """Whether *call* started *run*. False if it did not, but may attach to the run.

    Raises:
        nexusrpc.HandlerError: BAD_REQUEST or CONFLICT, the call must not get the outcome of this run.
        bridge.errors.OutcomeUnknownError: The same, for a call that must not start a run (*may_start* is false).
    """
    memo = run.memo
    is_own = memo is not None and memo.caller == call.caller
    is_same = is_own and memo is not None and memo.request_id == call.request.request_id
    # Servers from 1.31 may not name the calling namespace. Then only the call that started the run counts as its owner.
    if call.caller == NATIVE_CALLER:
        is_own = is_same
    if not _is_of(call.target, run) or not (is_own or call.target.attach_across_callers):
        if not may_start:
            # The answer must not reveal whether the id is held: such starts could probe ids without starting a run.
            raise OutcomeUnknownError(OUTCOME_UNKNOWN)
        message = "the workflow id that this input leads to is taken"
        raise bad_request(message)
    # A run that was started without the bridge has no hash. It counts as a run with another input.
    is_same_input = memo is not None and memo.input_hash == call.input_hash
    if is_same and not is_same_input:
        message = "this request id was used before with another input"
        raise bad_request(message)
    if call.target.on_input_mismatch == "refuse" and not is_same_input:
        message = "the workflow id that this input leads to belongs to a run with another input"
        raise HandlerError(message, type=HandlerErrorType.CONFLICT)
    return is_same


def may_cancel(caller: str | None, target: Target, request_id: str, run: Run) -> bool:
    """Whether *caller* may cancel *run* as the operation of *target* with *request_id*.

    *caller* is None for a native Nexus call. Temporal does not name its caller. Only the call that started the run may
    then cancel it, because no other caller can know the request id.
    """
    if run.memo is None or not _is_of(target, run):
        return False
    if caller is None:
        return run.memo.caller.startswith(NATIVE_CALLER) and run.memo.request_id == request_id
    return run.memo.caller == caller


def _is_of(target: Target, run: Run) -> bool:
    """Whether *run* carries out the operation of *target*. Operations that lead to one id have different outcomes.

    A target may continue as another workflow, and a deployment may give the operation another one. The record of the
    call still names the operation.
    """
    is_recorded = run.memo is not None and (run.memo.service, run.memo.operation) == (target.service, target.operation)
    return is_recorded or run.workflow_type == target.workflow_type
