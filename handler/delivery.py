"""Bring one completion home: the activity that POSTs it, and the workflow that keeps trying.

The target's own interceptor runs the activity first, within a short budget. What that leaves undelivered, a workflow of
its own carries on with, so that nobody's payment stays open because somebody else's receiver is down. A delivery that
was refused for good is a failed workflow: listed, and repeatable.
"""

import logging
import random
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import assert_never

from google.protobuf.message import DecodeError
from multidict import CIMultiDict
from temporalio import activity
from temporalio.api.common.v1 import Payload
from temporalio.api.failure.v1 import Failure
from temporalio.client import Client
from temporalio.common import RawValue
from temporalio.exceptions import ApplicationError

from bridge.completions import Completion, DeliveryAnswer, classify_answer, encode_completion
from bridge.errors import BridgeError, DestinationRefusedError
from bridge.http import HttpClient
from bridge.links import WorkflowRef
from bridge.outcomes import Outcome
from bridge.signatures import MessageKind, MessageSigner
from bridge.wire import OperationState
from handler.calls import Delivery
from handler.deliveries import COMPLETION_REFUSED, DELIVER_ACTIVITY, RECEIVER_NOT_READY
from handler.settings import HandlerSettings

_MAX_STEP = timedelta(minutes=5)

_log = logging.getLogger(__name__)


class DeliveryActivities:
    """The handler's activities, for one worker."""

    def __init__(
        self,
        *,
        client: Client,
        settings: HandlerSettings,
        http: HttpClient,
        clock: Callable[[], datetime],
        spread: Callable[[], float] = random.random,
    ) -> None:
        self._client = client
        self._callers = settings.callers
        self._signers: Mapping[str, MessageSigner] = {
            name: MessageSigner(peer.completion_keys)
            for name, peer in settings.callers.items()
            if peer.completion_keys is not None
        }
        self._http = http
        self._clock = clock
        self._spread = spread

    @activity.defn(name=DELIVER_ACTIVITY)
    async def deliver_completion(self, delivery: Delivery, content: RawValue) -> str:
        """One attempt: the same URL and bytes each time, a fresh signature. Returns what the receiver said.

        Raises:
            ApplicationError: Retryable with the next delay, or non-retryable where the receiver refused. Its text is
                constant, because it stands in the handler's history.
        """
        attempt = activity.info().attempt
        answer, retry_after = await self._deliver(delivery, content.payload, attempt)
        extra = {
            "bridge.request_id": delivery.request_id,
            "bridge.attempt": attempt,
            "bridge.target": delivery.workflow_id,
            "bridge.answer": answer.value,
        }
        match answer:
            case DeliveryAnswer.ACCEPTED | DeliveryAnswer.GONE:
                _log.info("bridge.completion_delivered", extra=extra)
                return str(answer.value)
            case DeliveryAnswer.AGAIN_LATER:
                _log.info("bridge.completion_not_delivered", extra=extra)
                # Full jitter: many deliveries wait for the same receiver to come back.
                step = min(timedelta(seconds=2.0 ** min(attempt - 1, 9)), _MAX_STEP)
                message = "the receiver is not ready"
                raise ApplicationError(
                    message,
                    type=RECEIVER_NOT_READY,
                    next_retry_delay=max(step * self._spread(), retry_after or timedelta(milliseconds=50)),
                )
            case DeliveryAnswer.REFUSED:
                _log.error("bridge.completion_refused", extra=extra)
                message = "the receiver refused the completion"
                raise ApplicationError(message, type=COMPLETION_REFUSED, non_retryable=True)
            case _:
                assert_never(answer)

    async def _deliver(
        self, delivery: Delivery, content: Payload, attempt: int
    ) -> tuple[DeliveryAnswer, timedelta | None]:
        peer = self._callers.get(delivery.caller)
        if peer is None:
            # Not in these settings (any more): mending them and sending again helps, waiting does not.
            return DeliveryAnswer.REFUSED, None
        headers, body = encode_completion(
            await self._completion(delivery, content), callback_headers=delivery.callback_headers
        )
        signed = CIMultiDict(headers)
        try:
            # Checked again, not only at the start: the list may have been narrowed since.
            destination = peer.allow_list.check(delivery.callback_url)
            if (signer := self._signers.get(delivery.caller)) is not None:
                signer.sign(MessageKind.COMPLETION, delivery.callback_url, signed, body, more=delivery.callback_headers)
            response = await self._http.post(delivery.callback_url, signed, body, networks=destination.networks)
        except (DestinationRefusedError, ValueError):
            # Not allowed, or of a form that cannot be signed: the same on every try.
            return DeliveryAnswer.REFUSED, None
        except BridgeError:
            return DeliveryAnswer.AGAIN_LATER, None
        if response.status == 401 and attempt == 1:
            # A clock or a key may be rolling: once more with a fresh time.
            return DeliveryAnswer.AGAIN_LATER, None
        return classify_answer(response.status, response.headers, response.body, now=self._clock())

    async def _completion(self, delivery: Delivery, content: Payload) -> Completion:
        outcome = await self._encoded(OperationState(delivery.state), content)
        return Completion(
            outcome=outcome.fitted(),
            target=WorkflowRef(
                namespace=self._client.namespace, workflow_id=delivery.workflow_id, run_id=delivery.run_id
            ),
            operation_token=delivery.operation_token,
            start_time=datetime.fromtimestamp(delivery.start_time_ms / 1000, UTC),
            close_time=datetime.fromtimestamp(delivery.close_time_ms / 1000, UTC),
        )

    async def _encoded(self, state: OperationState, content: Payload) -> Outcome:
        # The worker has undone our codec to show us the content; what crosses is what the codec makes of it.
        codec = self._client.data_converter.payload_codec
        if state is OperationState.SUCCEEDED:
            if codec is not None:
                [content] = await codec.encode([content])
            return Outcome.succeeded(content)
        try:
            failure = Failure.FromString(content.data)
        except DecodeError:
            message = "the delivery's failure is unreadable"
            raise ApplicationError(message, non_retryable=True) from None
        if codec is not None:
            await codec.encode_failure(failure)
        return Outcome.canceled(failure) if state is OperationState.CANCELED else Outcome.failed(failure)
