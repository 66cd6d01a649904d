"""Reads the calls that memos, attach signals and headers hold.

Another program may have written a payload under our name. Such a payload is not a call: one line of the log names the
run. The record of another workflow's call, which a target may pass to its children, is not a call of the run either.
"""

from temporalio.api.common.v1 import Payload
from temporalio.api.workflow.v1 import WorkflowExecutionInfo
from temporalio.converter import DataConverter, PayloadConverter

from bridge.errors import UnavailableError
from bridge.runtime.event_log import event_logger
from handler.delivery.records import MEMO_KEY, CallMemo

_log = event_logger(__name__)


async def read_memo(converter: DataConverter, run: WorkflowExecutionInfo) -> CallMemo | None:
    """Return the call that started *run*; None if no call did. Raises what `read_call` raises."""
    payload = run.memo.fields.get(MEMO_KEY)
    return None if payload is None else await read_call(converter, payload, target=run.execution.workflow_id)


async def read_call(converter: DataConverter, payload: Payload, *, target: str) -> CallMemo | None:
    """Return the call in *payload* as Temporal stores it; None if it is not a call of the workflow with id *target*.

    Memos and signals pass through the codec. By default the headers after continue-as-new do not.

    Raises:
        nexusrpc.HandlerError: UNAVAILABLE, the codec failed.
    """
    if (call := call_in(converter.payload_converter, payload)) is not None:
        return call if call.is_of(target) else None
    try:
        [decoded] = await converter.payload_codec.decode([payload]) if converter.payload_codec else [payload]
    except Exception as error:  # noqa: BLE001 - any error of the codec: its keys may be unavailable
        _log.warning("bridge.codec_failed", extra={"bridge.target": target, "bridge.error": type(error).__name__})
        message = "the handler cannot decode memos at the moment"
        raise UnavailableError(message) from None
    return decoded_call(converter, decoded, target=target)


def decoded_call(converter: DataConverter, payload: Payload, *, target: str) -> CallMemo | None:
    """Return the call in *payload*, which the codec has decoded already; None if it is not a call of *target*."""
    if (call := call_in(converter.payload_converter, payload)) is None:
        _log.warning("bridge.memo_unreadable", extra={"bridge.target": target})
        return None
    return call if call.is_of(target) else None


def call_in(converter: PayloadConverter, payload: Payload) -> CallMemo | None:
    """Return the call in *payload*, of any workflow and without the codec; None if it is another value."""
    try:
        [call] = converter.from_payloads([payload], [CallMemo])
    except Exception:  # noqa: BLE001 - any error that the converter raises on a foreign value
        return None
    return call if isinstance(call, CallMemo) else None
