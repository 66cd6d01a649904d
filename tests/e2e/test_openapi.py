"""The OpenAPI documents of both services are valid, complete, and as the services are."""

import json

import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from bridge.protocol.failure import WireFailure
from bridge.protocol.start import OperationInfo
from tests.support.exchanges import OPENAPI
from tests.support.world import Listener, World


@pytest.mark.parametrize("name", OPENAPI)
def test_the_document_is_openapi(name: str) -> None:
    """By the specification's own schema, references included."""
    document = json.loads(OPENAPI[name].read_text())
    assert document["openapi"].startswith("3.1.")
    assert not list(OpenAPIV31SpecValidator(document).iter_errors())


@pytest.mark.parametrize("name", OPENAPI)
def test_the_schemas_are_those_of_the_models(name: str) -> None:
    """Member for member: a member that a model gains has to be described."""
    schemas = json.loads(OPENAPI[name].read_text())["components"]["schemas"]
    for model in (WireFailure, OperationInfo):
        members = {field.alias or name for name, field in model.model_fields.items()}
        assert schemas[model.__name__]["properties"].keys() == members


@pytest.mark.parametrize("name", OPENAPI)
async def test_every_route_is_described(world: World, name: str) -> None:
    """The document describes no other route."""
    listener: Listener = getattr(world, name)
    routes = {
        (route.resource.canonical, route.method.lower())
        for route in listener._make().router.routes()
        if route.resource is not None and route.method != "HEAD"
    }
    paths = json.loads(OPENAPI[name].read_text())["paths"]
    assert {(path, method) for path, item in paths.items() for method in item.keys() - {"parameters"}} == routes
