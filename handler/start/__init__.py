"""From a start to the run of a target: limits, the call, attaching, held starts, native Nexus calls, and cancels."""
