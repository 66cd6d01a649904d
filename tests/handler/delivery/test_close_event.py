"""What a caller may get of a close event."""

import pytest
from temporalio.api.failure.v1 import ApplicationFailureInfo, Failure, TerminatedFailureInfo
from temporalio.converter import DataConverter

from bridge.protocol.outcome import Outcome
from handler.delivery.close_event import sendable
from handler.settings import CallerPeer

WORDS = "operation terminated by jane@payments: out of paper"


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        pytest.param(Failure(terminated_failure_info=TerminatedFailureInfo()), "operation terminated", id="ours"),
        pytest.param(
            Failure(application_failure_info=ApplicationFailureInfo(type="Stopped")), WORDS, id="the target's"
        ),
    ],
)
async def test_only_our_text_about_a_termination_is_shortened(failure: Failure, message: str) -> None:
    """A target may fail with the same words. Its failure arrives as the close event has it."""
    failure.message = WORDS
    before = Outcome.failed(failure)
    sent = await sendable(DataConverter.default, before, CallerPeer(auth="none", operations=()))
    assert sent.failure is not None
    assert sent.failure.message == message
    assert sent.failure.WhichOneof("failure_info") == failure.WhichOneof("failure_info")
    assert (sent == before) is (message == WORDS)
