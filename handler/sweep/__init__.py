"""Finding closed targets whose outcome no worker could deliver."""
