"""The API does what /openapi.json says."""

import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from mlx_gpt.config import GenerationConfig
from mlx_gpt.settings import settings_of
from tests.serving.conftest import served

SCHEMATHESIS = str(Path(sys.executable).with_name("schemathesis"))


def test_schemathesis_finds_no_difference(folders, tmp_path):
    with served(folders / "chatty", max_tokens=8) as url:
        flags = ["--max-examples", "15", "--seed", "1", "--generation-database", "none"]
        # A schema cannot say how many tokens a prompt may have, so a body that fits it may still be refused.
        flags += ["--exclude-checks", "positive_data_acceptance"]
        run = [SCHEMATHESIS, "run", f"{url}/openapi.json", *flags]
        done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "Tested: 7" in done.stdout


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_the_fields_of_bodies_are_described(http, path):
    described = http.get("/openapi.json").json()
    reference = described["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    fields = described["components"]["schemas"][reference.split("/")[-1]]
    assert fields["additionalProperties"] is False
    assert {"temperature", "top_p", "n", "stop", "seed", "stream", "logit_bias"} <= fields["properties"].keys()
    assert "chatty" in fields["properties"]["model"]["enum"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_sampling_settings_have_the_words_and_bounds_of_the_config(http, path):
    described = http.get("/openapi.json").json()["components"]["schemas"]
    fields = described["ChatRequest" if "chat" in path else "CompletionRequest"]["properties"]
    settings = {setting.name: setting.metadata for setting in settings_of(GenerationConfig)}
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "seed"):
        assert fields[name]["description"] == settings[name]["help"]
    number = fields["presence_penalty"]["anyOf"][0]
    assert (number["minimum"], number["maximum"]) == (-2, 2)
    assert (fields["temperature"]["default"], fields["temperature"]["anyOf"][0]["maximum"]) == (1, 2)


def test_a_key_is_described_only_where_it_is_needed(http, folders):
    assert "securitySchemes" not in http.get("/openapi.json").json()["components"]
    with served(folders / "plain", api_key="sesame") as url:
        described = httpx.get(f"{url}/openapi.json", headers={"Authorization": "Bearer sesame"}).json()
    assert described["paths"]["/v1/completions"]["post"]["security"] == [{"HTTPBearer": []}]
    assert "security" not in described["paths"]["/health"]["get"]


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
def test_there_are_no_pages_that_load_scripts_from_elsewhere(http, path):
    assert http.get(path).status_code == 404
