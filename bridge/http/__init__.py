"""HTTP with the peers: the listener and the routes of a service, the client, and what both keep of a peer."""
