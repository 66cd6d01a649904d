"""A project outside the repository, made by the quick start page, and the ways in which it can go wrong."""
