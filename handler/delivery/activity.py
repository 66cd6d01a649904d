"""Bring one completion home: the activity that POSTs it, and the workflow that keeps trying.

The target's own interceptor runs the activity first, within a short budget. What that leaves undelivered, a workflow of
its own carries on with, so that nobody's payment stays open because somebody else's receiver is down. A delivery that
was refused for good is a failed workflow: listed, and repeatable.
"""

import logging
import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import assert_never

from google.protobuf.message import DecodeError
from temporalio import activity
from temporalio.api.common.v1 import Payload
from temporalio.api.failure.v1 import Failure
from temporalio.client import Client
from temporalio.common import RawValue
from temporalio.exceptions import ApplicationError

from bridge.errors import BridgeError, DestinationRefusedError
from bridge.protocol.answers import Meaning, Sent
from bridge.protocol.completion import Completion, DeliveryAnswer, encode_completion
from bridge.protocol.headers import OperationState
from bridge.protocol.link import WorkflowRef
from bridge.protocol.outcome import Outcome
from handler.delivery.callback_client import Courier
from handler.delivery.records import Delivery
from handler.delivery.workflow import COMPLETION_REFUSED, DELIVER_ACTIVITY, RECEIVER_NOT_READY

_MAX_STEP = timedelta(minutes=5)

CONTRADICTED_METRIC = "bridge_outcomes_contradicted"
"""Counter on the worker's own metrics, where the SDK's runtime exports them."""

_DELIVERY_ANSWERS = {
    Meaning.ACCEPTED: DeliveryAnswer.ACCEPTED,
    Meaning.CONFLICT: DeliveryAnswer.GONE,
    Meaning.GONE: DeliveryAnswer.GONE,
    Meaning.REFUSED: DeliveryAnswer.REFUSED,
}

_log = logging.getLogger(__name__)


class DeliveryActivities:
    """The handler's activities, for one worker."""

    def __init__(
        self,
        *,
        client: Client,
        courier: Courier,
        clock: Callable[[], datetime],
        spread: Callable[[], float] = random.random,
    ) -> None:
        self._client = client
        self._courier = courier
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
        answer, retry_after = await self._deliver(delivery, content.payload)
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

    async def _deliver(self, delivery: Delivery, content: Payload) -> tuple[DeliveryAnswer, timedelta | None]:
        headers, body = encode_completion(
            await self._completion(delivery, content), callback_headers=delivery.callback_headers
        )
        try:
            answer = await self._courier.post(
                Sent.COMPLETION, delivery.caller, delivery.callback_url, headers, body, more=delivery.callback_headers
            )
        except DestinationRefusedError:
            # The same on every try; mending the settings and sending it again helps.
            return DeliveryAnswer.REFUSED, None
        except BridgeError:
            return DeliveryAnswer.AGAIN_LATER, None
        if answer.meaning is Meaning.CONFLICT:
            # The caller has another outcome: the target was terminated just after it had delivered its own.
            activity.metric_meter().create_counter(
                CONTRADICTED_METRIC, "Outcomes that a caller refused because it has another"
            ).add(1)
        return _DELIVERY_ANSWERS.get(answer.meaning, DeliveryAnswer.AGAIN_LATER), answer.retry_after

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
