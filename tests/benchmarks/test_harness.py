"""All benchmarks share the workers' environment, the files of results, and the sentences about mistakes."""

import json
import os
import subprocess
import sys

import click
import pytest

import harness
from tests.benchmarks.conftest import ROOT

MAC = {"benchmark": "throughput", "machine": {"chip": "Apple M1 Pro", "cores": 10, "gpu_cores": 16}}
PROGRAMS = [
    *("data.py", "distributed.py", "generation.py", "loop.py", "memory.py"),
    *("report.py", "serving.py", "startup.py", "throughput.py"),
]


def test_no_worker_uses_tf32_even_if_the_users_environment_does(monkeypatch):
    for name in harness.TF32_SETTINGS:
        monkeypatch.setenv(name, "1")
    environment = harness.environment(threads=1)
    assert [environment[name] for name in harness.TF32_SETTINGS] == ["0", "0"]


def test_a_result_in_a_folder_is_named_after_benchmark_and_chip(tmp_path, capsys):
    harness.write_json(str(tmp_path), MAC)
    file = tmp_path / "throughput-apple-m1-pro-16-gpu-cores.json"
    assert json.loads(file.read_text()) == MAC
    assert capsys.readouterr().err == f"The result is in {file}.\n"


def test_a_result_of_an_nvidia_gpu_is_named_after_it(tmp_path):
    machine = {"chip": "Xeon", "cores": 16, "gpu": "NVIDIA H100 80GB HBM3"}
    harness.write_json(str(tmp_path), {"benchmark": "throughput", "machine": machine})
    assert [path.name for path in tmp_path.iterdir()] == ["throughput-nvidia-h100-80gb-hbm3.json"]


def test_a_second_result_keeps_the_first(tmp_path):
    xeon = {"benchmark": "startup", "machine": {"chip": "Intel(R) Xeon(R) Processor", "cores": 2}}
    for trial in range(3):
        harness.write_json(str(tmp_path), xeon | {"trial": trial})
    stem = "startup-intel-r-xeon-r-processor-2-cores"
    written = {path.name: json.loads(path.read_text())["trial"] for path in tmp_path.iterdir()}
    assert written == {f"{stem}.json": 0, f"{stem}-2.json": 1, f"{stem}-3.json": 2}


def test_a_missing_folder_is_refused_before_anything_is_measured(tmp_path):
    command = [sys.executable, "benchmarks/startup.py", "--json", str(tmp_path / "nowhere/result.json")]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert f"the folder {tmp_path / 'nowhere'} doesn't exist: create it first." in done.stderr


@pytest.mark.parametrize("program", PROGRAMS)
def test_without_mlx_gpt_a_program_ends_with_one_sentence(program):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    bare = [sys.executable, "-S", f"benchmarks/{program}"]  # -S hides every installed package
    done = subprocess.run(bare, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "mlx-gpt is not installed for this Python: run `pip install -e '.[bench]'` in the project's folder."
    ]


def test_what_is_missing_can_be_installed():
    with pytest.raises(click.ClickException, match=r"pip install -e '.\[bench\]'"):
        harness.need("no-such-package")
