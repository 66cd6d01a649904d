"""Keys, signatures, tokens, and the rules for where a request may be sent. Does no I/O."""
