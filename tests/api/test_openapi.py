"""The schema's examples are what the service would answer."""

import httpx
import pytest

from app.api import openapi
from app.api.problems import MEDIA_TYPE
from app.api.schemas import Predictions, Problem
from app.errors import ClientDisconnected, RequestError


def test_every_kind_of_error_has_an_example_that_fits() -> None:
    assert {*openapi.DETAILS, ClientDisconnected} == set(RequestError.__subclasses__())
    for status, answer in openapi.ERRORS.items():
        for slug, example in answer["content"][MEDIA_TYPE]["examples"].items():
            problem = Problem.model_validate(example["value"])
            assert problem.status == status
            assert problem.type.endswith(f":{slug}")


def test_the_examples_of_an_answer_fit() -> None:
    for example in openapi.ANSWERS.values():
        Predictions.model_validate(example["value"])


@pytest.mark.slow
def test_the_examples_are_in_the_schema_and_no_other_errors(client: httpx.Client) -> None:
    schema = client.get("/openapi.json").json()
    answers = schema["paths"]["/predict"]["post"]["responses"]
    assert answers["200"]["content"]["application/json"]["examples"] == openapi.ANSWERS
    assert answers["429"]["headers"]["Retry-After"]
    assert "HTTPValidationError" not in schema["components"]["schemas"]
    assert {"Bearer", "X-API-Key"} == set(schema["components"]["securitySchemes"])
