"""The API does what its own description says."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.serving.conftest import served

SCHEMATHESIS = str(Path(sys.executable).with_name("schemathesis"))


def test_schemathesis_finds_nothing(folders, tmp_path):
    with served(folders / "chatty", max_tokens=8) as url:
        flags = ["--max-examples", "15", "--seed", "1", "--generation-database", "none"]
        # No schema can say how many tokens a prompt has, so what fits it may be too long all the same.
        flags += ["--exclude-checks", "positive_data_acceptance"]
        run = [SCHEMATHESIS, "run", f"{url}/openapi.json", *flags]
        done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "Tested: 7" in done.stdout


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_every_parameter_is_described(http, path):
    described = http.get("/openapi.json").json()
    reference = described["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    fields = described["components"]["schemas"][reference.split("/")[-1]]
    assert fields["additionalProperties"] is False
    assert {"temperature", "top_p", "n", "stop", "seed", "stream", "logit_bias"} <= fields["properties"].keys()
    assert "chatty" in fields["properties"]["model"]["enum"]
