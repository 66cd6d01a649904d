"""From the close of a target to its callers: notice the close, read its event, deliver the outcome, try again."""
