"""Many clients at once, and how a server ends."""

import asyncio
import json
import signal
import threading
import time

import httpx
import pytest

from tests.serving.conftest import served
from tests.serving.load import expected, load

BODY = {"prompt": "The duck", "max_tokens": 40, "logit_bias": {"0": -100, "1": -100, "2": -100}, "temperature": 0}


@pytest.mark.parametrize("clients", [1, 8, 24])
def test_every_answer_is_right_or_a_clean_refusal(folders, monkeypatch, clients):
    monkeypatch.setattr("mlx_gpt.cpu.decoding.WORTH_IT", 0)  # divided in two, as a larger model is
    with served(folders / "plain", max_batch=4, max_queue=4) as url:
        right = asyncio.run(expected(url, 20, tokens=24))
        tally = asyncio.run(load(url, clients, 120, right, tokens=24, enough=50))
        metrics = httpx.get(f"{url}/metrics").text
    assert (tally.wrong, tally.failed) == (0, [])
    assert tally.right >= 50
    assert tally.disconnected > 0
    assert (tally.refused > 0) == (clients > 8)
    assert "mlx_gpt_active_texts 0.0" in metrics


def test_two_models_answer_side_by_side(folders):
    with served(folders / "plain", folders / "chatty") as url:
        bodies = [BODY | {"model": name} for name in ("plain", "chatty")]
        alone = [httpx.post(f"{url}/v1/completions", json=body).json()["choices"] for body in bodies]

        async def both() -> list[httpx.Response]:
            async with httpx.AsyncClient(base_url=url, timeout=60) as client:
                return await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies * 6))

        answers = asyncio.run(both())
    assert [answer.json()["choices"] for answer in answers] == alone * 6
    assert alone[0] != alone[1]


@pytest.mark.parametrize("streams", [False, True])
def test_sigterm_finishes_the_answers_first(folders, start, streams):
    server = start("--model", folders / "plain")
    long = BODY | {"max_tokens": 3000, "stream": streams}
    answers: list[httpx.Response] = []
    threads = [
        threading.Thread(
            target=lambda: answers.append(httpx.post(f"{server.url}/v1/completions", json=long, timeout=60))
        )
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    while "mlx_gpt_active_texts 6.0" not in httpx.get(f"{server.url}/metrics").text:
        time.sleep(0.01)
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")
    for thread in threads:
        thread.join()
    assert server.process.wait(timeout=30) == 0
    assert [answer.status_code for answer in answers] == [200] * 6
    for answer in answers:
        if streams:
            assert answer.text.endswith("data: [DONE]\n\n")
        else:
            assert answer.json()["usage"]["completion_tokens"] == 3000
    assert "Traceback" not in server.log.read_text()


def test_sigterm_waits_no_longer_than_the_grace_period(folders, start):
    server = start("--model", folders / "plain", "--grace", 1, "--max-tokens", 10**7)
    endless = BODY | {"max_tokens": 10**7, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=endless) as answer:
        lines = answer.iter_lines()
        assert json.loads(next(lines).removeprefix("data: "))["choices"]
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(httpx.RemoteProtocolError):
            for _ in lines:
                pass
    assert server.process.wait(timeout=10) == 0
    assert "Traceback" not in server.log.read_text()


def test_two_signals_at_once_stop_it_without_a_traceback(folders, start):
    server = start("--model", folders / "plain")
    assert httpx.get(f"{server.url}/health").status_code == 200
    server.process.send_signal(signal.SIGINT)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(timeout=30) == 0
    assert "Traceback" not in server.log.read_text()


def test_after_sigkill_it_starts_again_at_the_same_address(folders, start):
    first = start("--model", folders / "plain")
    port = first.url.split(":")[-1]
    with httpx.stream(
        "POST", f"{first.url}/v1/completions", json=BODY | {"max_tokens": 3000, "stream": True}
    ) as answer:
        next(answer.iter_lines())
        first.process.kill()
        first.process.wait()
    second = start("--model", folders / "plain", "--port", port)
    assert second.url == first.url
    assert httpx.post(f"{second.url}/v1/completions", json=BODY).status_code == 200
