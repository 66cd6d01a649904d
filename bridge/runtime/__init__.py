"""What a running process needs: HTTP client and server, settings, calls to Temporal, and the base of both plugins."""
