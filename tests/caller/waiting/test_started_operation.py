"""What people read about a started operation."""

from bridge.protocol.link import WorkflowRef
from caller.waiting.started_operation import describe_target


def test_the_name_of_a_target_controls_no_terminal() -> None:
    """A handler's link may hold any characters, percent-encoded. The pending activity shows the decoded names."""
    ref = WorkflowRef(namespace="payment\x1b[31m", workflow_id="\u202e7-tnemyap\r" + "x" * 2000, run_id="r\x07")
    text = describe_target(WorkflowRef.from_links([ref.to_link()]))
    assert text.startswith("payment\ufffd[31m/\ufffd7-tnemyap\ufffdx")
    assert len(text) == 1000
    assert describe_target(None) == "the operation"
