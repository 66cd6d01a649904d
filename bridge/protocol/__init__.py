"""Nexus RPC over HTTP as pure functions: messages to and from headers and bytes. Does no I/O."""
