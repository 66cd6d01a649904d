"""One-word commands: `demo`, `up`, `test`, `check`. Each sets itself up; the Python modules here are their insides."""
