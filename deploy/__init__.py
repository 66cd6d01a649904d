"""What the containers of `compose.yaml` need in addition to the package."""
