"""The sandbox against the service's own OpenAPI document, with generated requests.

The document knows no other status than 200, so `status_code_conformance` (and what follows from it for the
bodies of errors) says nothing here. What is held: nothing is a 5xx, every 200 has the documented body and type,
what the document allows is answered with 200, and what it forbids with a 4xx.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    positive_data_acceptance,
    response_schema_conformance,
)

from flux_prefect.sandbox.launching import RunningSandbox

DOCUMENT = Path(__file__).parents[1] / "data" / "kontext-max-text-to-image.openapi.json"

schema = schemathesis.openapi.from_path(str(DOCUMENT))
schema.config.generation.update(modes=[GenerationMode.POSITIVE, GenerationMode.NEGATIVE])


@pytest.mark.parametrize("shape", ["images", "data", "both"])
@schema.parametrize()
@settings(
    max_examples=30,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
    derandomize=True,
)
def test_requests_are_judged_as_the_document_says(
    case: schemathesis.Case[Any], shape: str, running: RunningSandbox
) -> None:
    """Allowed requests are answered as documented, forbidden ones are refused, in every response shape."""
    running.control.settings(response_shape=shape, balance=10**15)
    case.call_and_validate(
        base_url=running.url,
        headers={"Authorization": f"Bearer {running.environment['AIMLAPI_KEY']}"},
        checks=[
            not_a_server_error,
            response_schema_conformance,
            content_type_conformance,
            positive_data_acceptance,
            negative_data_rejection,
        ],
    )
