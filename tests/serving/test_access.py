"""The server's guard limits who may send requests, how large, and for how long."""

import json
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from mlx_gpt.config import ServeConfig
from mlx_gpt.errors import UserError
from mlx_gpt.generation.engine import Engine
from mlx_gpt.serving import access, connection
from mlx_gpt.serving.server import Server
from tests.serving.conftest import served

OURS = ["localhost", "localhost:8080", "127.0.0.1:1", "[::1]:8080", "192.168.1.7", "LOCALHOST"]
NOT_OURS = ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "", "[", "a b", "evil.example:8080"]
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
BODY = {"prompt": "The duck", "max_tokens": 3}
NEVER_ENDS = {"0": -100, "1": -100, "2": -100}  # the ids of the special tokens


def post(url, body=BODY, **headers):
    return httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=30)


def raw(url, data, wait=10.0, most=2**30):
    """Send bytes; the answer up to the end of the connection, `wait` seconds of silence, or `most` bytes."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=wait) as client:
        client.sendall(data)
        answer = b""
        try:
            while len(answer) < most and (more := client.recv(65536)):
                answer += more
        except (TimeoutError, ConnectionError):
            pass
    return answer


# ---- hosts and origins ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", OURS)
def test_addresses_and_localhost_name_this_server(url, host):
    assert post(url, Host=host).status_code == 200


@pytest.mark.parametrize("host", NOT_OURS)
def test_another_host_name_is_refused(url, host):
    answer = post(url, Host=host)
    assert answer.status_code == 421
    assert "--allow-host" in answer.json()["error"]["message"]
    assert httpx.get(f"{url}/", headers={"Host": host}).status_code == 421


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://localhost:1", "http://127.0.0.1", "file://"]
)
def test_pages_of_other_sites_are_refused(url, origin):
    answer = post(url, Origin=origin)
    assert answer.status_code == 403
    assert "access-control-allow-origin" not in answer.headers
    assert "--allow-origin" in answer.json()["error"]["message"]


def test_the_servers_own_page_may_ask(url):
    assert post(url, Origin=url).status_code == 200


def test_only_json_is_accepted_since_other_sites_forms_cannot_send_it(url):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/ld+json", ""):
        answer = httpx.post(f"{url}/v1/completions", content=json.dumps(BODY), headers={"Content-Type": kind})
        assert answer.status_code == 415


def test_head_answers_like_get_without_a_body(url):
    for path in ("/", "/health", "/v1/models"):
        head, get = httpx.head(f"{url}{path}"), httpx.get(f"{url}{path}")
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == get.headers["content-length"]


def test_a_site_and_a_host_name_can_be_allowed(folders):
    site = "https://a.example"
    with served(folders / "plain", allow_origin=(site,), allow_host=("gpt.local",)) as url:
        assert post(url, Host="gpt.local", Origin=site).headers["access-control-allow-origin"] == site
        asked = {
            "Origin": site,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization",
        }
        before = httpx.options(f"{url}/v1/completions", headers=asked)
        assert (before.status_code, before.headers["access-control-allow-origin"]) == (200, site)
        assert post(url, Origin="https://b.example").status_code == 403


# ---- keys -----------------------------------------------------------------------------------------------------------


def test_everything_but_the_page_and_health_needs_the_key(folders):
    with served(folders / "plain", api_key="sésame") as url:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Basic abc"},
            {"Authorization": "Bearer"},
        ):
            answer = post(url, **headers)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["error"]["code"] == "invalid_api_key"
        key = "Bearer sésame".encode()
        assert httpx.post(f"{url}/v1/completions", json=BODY, headers={b"Authorization": key}).status_code == 200
        assert httpx.get(f"{url}/metrics").status_code == 401
        for path in ("/", "/page/main.js", "/health"):
            assert httpx.get(f"{url}{path}").status_code == 200


def test_other_machines_are_let_in_only_with_a_key_or_knowingly(folders, caplog):
    with pytest.raises(UserError, match=r"Other machines can reach 0\.0\.0\.0: set an --api-key, or --insecure"):
        Server([folders / "plain"], ServeConfig(host="0.0.0.0", port=0))
    with served(folders / "plain", host="0.0.0.0", insecure=True) as url:
        assert post(url.replace("0.0.0.0", "127.0.0.1")).status_code == 200
    assert caplog.text.count("INSECURE") == 2


# ---- limits ---------------------------------------------------------------------------------------------------------


def test_a_large_body_is_refused_before_it_has_arrived(url):
    answer = raw(url, HEAD + b"Content-Length: 99999999999\r\n\r\n{")
    assert b" 413 " in answer.splitlines()[0]
    chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
    answer = raw(url, HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 17, most=12)
    assert b" 413 " in answer
    assert post(url).status_code == 200


def test_slow_clients_are_cut_off(folders, monkeypatch):
    monkeypatch.setattr(access, "READ_SECONDS", 0.5)
    monkeypatch.setattr(connection, "IDLE_SECONDS", 0.5)
    with served(folders / "plain") as url:
        began = time.monotonic()
        assert raw(url, b"") == b""  # a client that sends nothing
        assert raw(url, HEAD) == b""  # and one that sends part of a head
        answer = raw(url, HEAD + b"Content-Length: 100\r\n\r\n{")
        assert b" 408 " in answer.splitlines()[0]
        assert time.monotonic() - began < 9
        with httpx.Client(base_url=url) as client:
            client.get("/health")
            time.sleep(0.8)  # longer than the limit: the client connects again
            assert client.get("/health").status_code == 200


def test_a_client_that_reads_nothing_frees_its_slot(folders, monkeypatch):
    monkeypatch.setattr(access, "WRITE_SECONDS", 0.5)
    with served(folders / "plain", max_batch=1, max_queue=0, max_tokens=10**6) as url:
        host, port = url.removeprefix("http://").split(":")
        asked = {"prompt": "The duck", "max_tokens": 10**6, "stream": True, "logprobs": 20, "logit_bias": NEVER_ENDS}
        body = json.dumps(asked).encode()
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect((host, int(port)))
            client.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            client.recv(10)
            assert post(url).status_code == 429
            until(lambda: post(url).status_code == 200)
        with socket.socket() as client:  # the same with a request sent ahead
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect((host, int(port)))
            before = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
            client.sendall(before + HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            until(lambda: post(url).status_code == 429)
            until(lambda: post(url).status_code == 200)


def until(condition, seconds=30):
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_client_that_never_reads_the_end_of_an_answer_is_cut_off(folders, monkeypatch, caplog):
    caplog.set_level("INFO", "mlx_gpt")
    monkeypatch.setattr(connection, "IDLE_SECONDS", 0.5)
    asked = {"prompt": "The duck", "n": 32, "max_tokens": 200, "logprobs": 20, "logit_bias": NEVER_ENDS}
    body = json.dumps(asked).encode()
    with served(folders / "plain", max_batch=32, max_queue=0) as url, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        host, port = url.removeprefix("http://").split(":")
        client.connect((host, int(port)))
        client.sendall(HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        until(lambda: "POST /v1/completions 200" in caplog.text)  # the application has written all of it
        time.sleep(1)
        client.settimeout(10)
        answer = b""
        while more := client.recv(65536):
            answer += more
    head, _, body = answer.partition(b"\r\n\r\n")
    assert len(body) < int(head.lower().partition(b"content-length: ")[2].split()[0])


def test_a_client_that_sends_requests_ahead_and_disconnects_frees_its_slot(folders):
    with served(folders / "plain", max_batch=1, max_queue=0, max_tokens=10**7) as url:
        body = json.dumps(BODY | {"max_tokens": 10**7, "logit_bias": NEVER_ENDS}).encode()
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as client:
            client.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            until(lambda: post(url).status_code == 429)
            client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        until(lambda: post(url).status_code == 200)
        with socket.create_connection((host, int(port))) as client:
            client.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            with pytest.raises(ConnectionError):
                client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 10**6)
        until(lambda: post(url).status_code == 200)


def test_a_client_that_disconnects_frees_its_slot(folders, caplog):
    with served(folders / "plain", max_batch=1, max_queue=0, max_tokens=10**7) as url:
        endless = BODY | {"max_tokens": 10**7, "logit_bias": NEVER_ENDS}
        for streams in (True, False):
            body = json.dumps(endless | {"stream": streams}).encode()
            raw(url, HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body, wait=0.3, most=1)
            until(lambda: post(url).status_code == 200, seconds=5)
    assert "Traceback" not in caplog.text
    assert "Unexpected" not in caplog.text


def test_beyond_the_queue_a_client_learns_when_to_try_again(folders):
    with served(folders / "plain", max_batch=1, max_queue=1, max_tokens=10**7) as url:
        endless = BODY | {"max_tokens": 10**7, "stream": True, "logit_bias": NEVER_ENDS}
        asked = ("POST", f"{url}/v1/completions")
        # Both streams start at once, although the second waits for its first token.
        with httpx.stream(*asked, json=endless), httpx.stream(*asked, json=endless):
            answer = post(url)
            assert answer.status_code == 429
            assert answer.json()["error"]["type"] == "rate_limit_error"
            assert 1 <= int(answer.headers["retry-after"]) <= 60
            metrics = httpx.get(f"{url}/metrics").text
            assert re.search(r"^mlx_gpt_active_texts 1\.0$", metrics, re.M)
            assert re.search(r"^mlx_gpt_queued_texts 1\.0$", metrics, re.M)
        until(lambda: "mlx_gpt_active_texts 0.0" in httpx.get(f"{url}/metrics").text)


# ---- the log, the metrics and the page ------------------------------------------------------------------------------


def test_the_log_has_a_line_per_request_and_no_prompt(folders, caplog):
    caplog.set_level("INFO", "mlx_gpt")
    with served(folders / "plain") as url:
        post(url, {"prompt": "A secret duck", "max_tokens": 3, "seed": 1, "logit_bias": NEVER_ENDS})
        httpx.get(f"{url}/a%0Ab%1b[31mc")
    lines = [record.getMessage() for record in caplog.records if record.name == "mlx_gpt"]
    assert re.fullmatch(r"POST /v1/completions 200 \d+\.\d+ s \d+ \+ 3 tokens", lines[0])
    assert "secret" not in caplog.text
    assert "\x1b" not in lines[1]
    assert "\n" not in lines[1]
    with served(folders / "plain", log_prompts=True) as url:
        post(url, {"prompt": "A secret duck"})
    assert "A secret duck" in caplog.text


def test_metrics_count_requests_and_tokens(folders):
    with served(folders / "plain") as url:
        post(url, BODY | {"logit_bias": {"0": -100, "2": -100}})
        post(url, {"prompt": 1})
        metrics = httpx.get(f"{url}/metrics").text
    assert 'mlx_gpt_requests_total{path="/v1/completions",status="200"} 1.0' in metrics
    assert 'mlx_gpt_requests_total{path="/v1/completions",status="400"} 1.0' in metrics
    assert "mlx_gpt_generated_tokens_total 3.0" in metrics
    for name in ("time_to_first_token_seconds", "request_seconds", "tokens_per_second"):
        assert f"mlx_gpt_{name}_count 1.0" in metrics


def test_the_page_loads_only_its_own_files(url):
    answer = httpx.get(f"{url}/")
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'")
    assert "unsafe" not in policy
    paths = re.findall(r'(?:src|href)="(?!data:)([^"]*)"', answer.text)
    for path in paths:
        file = httpx.get(f"{url}{path}")
        assert (file.status_code, file.headers["x-content-type-options"]) == (200, "nosniff")
        assert file.headers["content-type"].startswith(("text/css", "text/javascript"))
        assert not re.search(r"https?://(?!www\.w3\.org)|@import", answer.text + file.text)
        paths += [
            f"/page/{name}" for name in re.findall(r'from "\./([^"]*)"', file.text) if f"/page/{name}" not in paths
        ]
    assert paths
    for name in ("__init__.py", "..%2fapp.py"):
        assert httpx.get(f"{url}/page/{name}").status_code == 404


def test_the_page_is_never_sent_without_its_policy(url):
    assert httpx.get(f"{url}/page/index.html").status_code == 404


@pytest.mark.parametrize("where", ["step", "add"])
def test_an_engine_that_fails_loses_only_the_texts_in_it(folders, monkeypatch, caplog, where):
    with served(folders / "plain") as url:
        whole = getattr(Engine, where)
        monkeypatch.setattr(Engine, where, lambda *arguments: 1 / 0)
        answer = post(url)
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
        assert "Traceback" not in answer.text
        streamed = post(url, BODY | {"stream": True})
        assert json.loads(streamed.text.removeprefix("data: "))["error"]["code"] == "engine_failed"
        monkeypatch.setattr(Engine, where, whole)
        assert post(url).status_code == 200
    assert "ZeroDivisionError" in caplog.text


def break_engine(monkeypatch, step=lambda *arguments: 1 / 0):
    """Have an engine's next step fail, and every attempt to replace it: its thread ends."""
    monkeypatch.setattr(Engine, "step", step)
    monkeypatch.setattr(Engine, "__init__", lambda *arguments: 1 / 0)


def test_a_server_whose_engine_has_ended_says_so(folders, monkeypatch):
    with served(folders / "plain") as url:
        break_engine(monkeypatch)
        assert post(url).status_code == 500
        until(lambda: httpx.get(f"{url}/health").status_code == 503)
        assert post(url).json()["error"]["code"] == "engine_ended"


def test_waiting_clients_get_an_error_when_the_engine_ends(folders, monkeypatch):
    fail = threading.Event()

    def step(*arguments):
        fail.wait(20)
        raise ZeroDivisionError

    with served(folders / "plain") as url, ThreadPoolExecutor(5) as pool:
        break_engine(monkeypatch, step)
        answers = [pool.submit(post, url) for _ in range(5)]  # the engine has one; the others are still on their way
        until(lambda: "mlx_gpt_active_texts 5" in httpx.get(f"{url}/metrics").text)
        fail.set()
        assert {answer.result().status_code for answer in answers} == {500}


def test_an_allowed_site_can_read_refusals(folders):
    site = "https://a.example"
    with served(folders / "plain", allow_origin=(site,), api_key="sesame") as url:
        answer = post(url, Origin=site)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (401, site)
