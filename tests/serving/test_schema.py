"""A small share of a fuzzing of the API from its own OpenAPI schema, by schemathesis: no 5xx.

All of it, over a running server: `schemathesis run http://127.0.0.1:8000/openapi.json`.
"""

from contextlib import suppress
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import CHECKS
from served import ADMIN

CHECKED = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
)


def fuzz(client: Any, examples: int) -> set[str]:
    """Send what the schema allows, and what it does not, to all operations; which there were."""
    schema = schemathesis.openapi.from_dict(client.get("/openapi.json").json())
    schema.app = client.app
    checks = CHECKS.get_by_names(CHECKED)
    found = set()
    for result in schema.get_all_operations():
        operation = result.ok()
        found.add(f"{operation.method.upper()} {operation.path}")
        for mode in schemathesis.GenerationMode:

            @settings(
                max_examples=examples,
                derandomize=True,
                database=None,
                deadline=None,
                phases=[Phase.generate],
                suppress_health_check=[*HealthCheck],
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def check(case: Any) -> None:
                head = {"Authorization": f"Bearer {ADMIN}"}
                response = case.call(session=client, headers=head, timeout=60)
                case.validate_response(response, checks=checks)

            with suppress(Unsatisfiable):  # nothing of an operation without input can be wrong
                check()
    return found


def test_language_models(here: Any) -> None:
    assert fuzz(here, 8) == {
        "GET /health",
        "GET /ready",
        "GET /metrics",
        "GET /v1/models",
        "GET /v1/models/{name}",
        "POST /v1/completions",
        "POST /v1/chat/completions",
        "GET /tasks",
        "POST /tasks",
        "PUT /tasks/{name}",
        "DELETE /tasks/{name}",
    }


def test_classifiers(sorter: Any) -> None:
    assert "POST /predict" in fuzz(sorter, 8)
