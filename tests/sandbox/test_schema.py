"""The sandbox against the service's own OpenAPI documents, with generated requests.

The documents know no other status than 200, so `status_code_conformance` (and what follows from it for the
bodies of errors) says nothing here. What is held: nothing is a 5xx, every 200 has the documented body and type,
what a document allows is answered with 200, and what it forbids with a 4xx.
"""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from PIL import Image
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    positive_data_acceptance,
    response_schema_conformance,
)

from flux_prefect.sandbox.launching import RunningSandbox

DOCUMENTS = sorted((Path(__file__).parents[1] / "data" / "models").glob("*.json"))
EXAMPLES = int(os.environ.get("FLUX_PREFECT_SCHEMA_EXAMPLES", "6"))
"""Generated requests a document and response shape."""


def _reference(colour: str) -> str:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


# The documents' only URIs are reference images: any other URI is allowed by them, and leads to no image.
schemathesis.openapi.format("uri", st.sampled_from([_reference("red"), _reference("blue")]))


@pytest.fixture
def of_shape(request: pytest.FixtureRequest, running: RunningSandbox) -> RunningSandbox:
    """The sandbox, with answers of one shape. Set once for all requests of a document: they are most of the time."""
    running.control.reset()
    running.control.settings(response_shape=request.param, balance=10**15)
    return running


def _test_of(document: Path) -> Any:
    schema = schemathesis.openapi.from_path(str(document)).include(path="/v1/images/generations")
    schema.config.generation.update(modes=[GenerationMode.POSITIVE, GenerationMode.NEGATIVE])

    @pytest.mark.parametrize(
        "of_shape", ["images", "data", "both"] if "kontext-max-text" in document.name else ["both"], indirect=True
    )
    @schema.parametrize()
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
        derandomize=True,
    )
    def test(case: schemathesis.Case[Any], of_shape: RunningSandbox) -> None:
        """Allowed requests are answered as documented, forbidden ones are refused, in every response shape."""
        case.call_and_validate(
            base_url=of_shape.url,
            headers={"Authorization": f"Bearer {of_shape.environment['AIMLAPI_KEY']}"},
            checks=[
                not_a_server_error,
                response_schema_conformance,
                content_type_conformance,
                positive_data_acceptance,
                negative_data_rejection,
            ],
        )

    return test


for _document in DOCUMENTS:
    _name = _document.stem.replace("-", "_").replace(".", "_")
    globals()[f"test_requests_to_{_name}_are_judged_as_its_document_says"] = _test_of(_document)
