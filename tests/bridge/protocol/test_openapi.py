"""The OpenAPI documents are valid, complete, and served."""

import aiohttp
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from bridge.protocol.failure import WireFailure
from bridge.protocol.openapi import Json, describe_handler_service, describe_receiver
from bridge.protocol.start import OperationInfo
from tests.support.world import Listener, World

DOCUMENTS = {"service": describe_handler_service(), "receiver": describe_receiver()}


@pytest.mark.parametrize("document", DOCUMENTS.values(), ids=DOCUMENTS)
def test_the_document_is_openapi(document: Json) -> None:
    """By the specification's own schema, references included."""
    assert document["openapi"].startswith("3.1.")
    assert not list(OpenAPIV31SpecValidator(document).iter_errors())


@pytest.mark.parametrize("document", DOCUMENTS.values(), ids=DOCUMENTS)
def test_the_schemas_are_those_of_the_models(document: Json) -> None:
    """Member for member, so that a new one is described without anybody thinking of it."""
    schemas = document["components"]["schemas"]
    for model in (WireFailure, OperationInfo):
        members = {field.alias or name for name, field in model.model_fields.items()}
        assert schemas[model.__name__]["properties"].keys() == members


@pytest.mark.parametrize("name", DOCUMENTS)
async def test_every_route_is_described_and_the_document_is_served(world: World, name: str) -> None:
    """And nothing is described that is not there."""
    listener: Listener = getattr(world, name)
    routes = {
        (route.resource.canonical, route.method.lower())
        for route in listener._make().router.routes()
        if route.resource is not None and route.method != "HEAD"
    }
    async with aiohttp.ClientSession() as session, session.get(f"{listener.url}/openapi.json") as answer:
        assert answer.headers["Content-Type"] == "application/json"
        document = await answer.json()
    described = {(path, method) for path, item in document["paths"].items() for method in item.keys() - {"parameters"}}
    assert described == routes
    assert document == DOCUMENTS[name]
