"""Examples: a payment between two namespaces, and peers without Temporal."""
