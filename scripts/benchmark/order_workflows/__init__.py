"""The order workflow of the example, with the call itself replaced: what the bridge is measured against.

Each does what `examples.payments.orders.OrderWorkflow` does around its call, and is alone in its module, as that one
is: the SDK's sandbox runs the module anew for every run. Workflow code only.
"""
