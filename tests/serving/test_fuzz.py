"""Requests that the server's own description says are wrong."""

import httpx2 as httpx
import pytest
import schemathesis
from conftest import serving
from hypothesis import HealthCheck, assume, given, settings
from schemathesis import GenerationMode


@pytest.mark.filterwarnings("ignore")  # of the tools
def test_malformed_requests_get_an_error_document_and_the_server_goes_on(calm, tokenizer):
    statuses: dict[int, int] = {}
    with serving([("calm", (calm, tokenizer))]) as (address, _), httpx.Client(base_url=address) as http:
        schema = schemathesis.openapi.from_dict(http.get("/openapi.json").json())

        def send(case):
            # null stands for the default, which the description does not say of every parameter.
            assume(not isinstance(case.body, dict) or None not in case.body.values())
            body = {"content": case.body, "headers": {"content-type": "application/json"}}
            if not isinstance(case.body, bytes):
                body = {"json": case.body}
            answer = http.post(case.path, **body)
            assert 400 <= answer.status_code < 500, (case.body, answer.text)
            error = answer.json()["error"]
            assert error["message"]
            assert not any(word in error["message"] for word in ("Traceback", ".py", "site-packages"))
            statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1

        often = settings(
            max_examples=150, database=None, derandomize=True, deadline=None, suppress_health_check=[*HealthCheck]
        )
        for path in ("/v1/completions", "/v1/chat/completions"):
            wrong = schema[path]["POST"].as_strategy(generation_mode=GenerationMode.NEGATIVE)
            often(given(wrong)(send))()
        assert sum(statuses.values()) >= 300
        assert http.post("/v1/completions", json={"prompt": "a", "max_tokens": 3}).status_code == 200
