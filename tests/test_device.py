"""The device is found, a run learns what it may take, and limits are set before it trains."""

import dataclasses
import os
import subprocess
import sys

import mlx.core as mx
import pytest

import mlx_gpt.device
from mlx_gpt.device import GIB, Device, available, describe, device
from mlx_gpt.errors import UserError

WORKING_SET = 11_453_251_584  # bytes, as macOS recommends on a Mac with 16 GB
MAC: dict[str, str | int] = {
    "device_name": "a Mac",
    "memory_size": 16 * GIB,
    "max_recommended_working_set_size": WORKING_SET,
}


# ---- which it is ----------------------------------------------------------------------------------------------------


def test_the_device_is_the_one_that_mlx_describes(monkeypatch):
    """As on a Mac: MLX is asked whether Metal and CUDA are there, and then Metal is."""
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    assert device().kind == ("metal" if mx.metal.is_available() else "cuda" if mx.cuda.is_available() else "cpu")
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: MAC)
    assert device() == Device("metal", "a Mac", 16 * GIB, WORKING_SET, accelerated=False)


def test_a_fork_of_a_process_that_computes_gets_an_error_and_does_not_wait_for_ever():
    device()
    child = os.fork()
    if not child:
        try:
            device()
        except UserError as error:
            os._exit(0 if "spawn" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_cuda_gpu_has_what_is_free_on_it():
    info: dict[str, str | int] = {"device_name": "a GPU", "total_memory": 80 * GIB, "free_memory": 60 * GIB}
    assert describe(False, True, info) == Device("cuda", "a GPU", 80 * GIB, 60 * GIB)


def test_the_cpu_has_a_name_and_the_memory_of_this_machine():
    found = device()
    assert found.kind == "cpu"
    assert found.name
    assert 0 < found.usable <= found.memory
    assert str(found) == f"{found.name} (cpu, {found.memory / GIB:.0f} GiB)"


@pytest.mark.parametrize(
    ("wanted", "said"),
    [("tpu", "MLX_GPT_DEVICE=tpu is not a device"), ("gpu", "MLX_GPT_DEVICE=gpu, but MLX finds no GPU here")],
)
def test_a_device_that_is_not_here_is_refused(monkeypatch, wanted, said):
    monkeypatch.setattr(mlx_gpt.device, "WANTED", wanted)
    monkeypatch.setattr(mx, "is_available", lambda kind: kind == mx.cpu)
    with pytest.raises(UserError, match=f"^{said}.*\\.$"):
        device()


@pytest.mark.skipif(sys.platform != "linux", reason="macOS has a BLAS of its own")
def test_a_blas_that_was_named_and_is_not_there_is_refused(tmp_path):
    """By the first command that computes, not by the import."""
    code = "import mlx_gpt.device as d\ntry: d.device()\nexcept d.UserError as error: print(error)"
    environment = {**os.environ, "MLX_GPT_BLAS": str(tmp_path / "libblas.so")}
    asked = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert asked.stdout.startswith(f"MLX_GPT_BLAS={tmp_path / 'libblas.so'} can't be loaded")


def test_the_variable_chooses_the_device():
    """conftest.py sets it for all tests, and it is inherited."""
    code = "import mlx_gpt.device, mlx.core as mx; print(mx.default_device() == mx.cpu)"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert asked.stdout == "True\n"


@pytest.mark.parametrize(
    ("kind", "precision", "dtype"),
    [
        ("cpu", "auto", mx.float32),
        ("metal", "auto", mx.bfloat16),
        ("cuda", "auto", mx.bfloat16),
        ("cpu", "bfloat16", mx.bfloat16),
        ("metal", "float32", mx.float32),
    ],
)
def test_a_gpu_computes_in_bfloat16_unless_asked_for_float32(kind, precision, dtype):
    assert Device(kind, "", GIB, GIB).dtype(precision) == dtype


# ---- memory ---------------------------------------------------------------------------------------------------------


def test_a_container_s_limit_counts(tmp_path):
    """The files of Linux, version 2 of its control groups; on other systems there are none."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 64 kB\nMemAvailable: 32 kB\n")
    assert available(tmp_path) == 32 * 1024
    groups = tmp_path / "sys/fs/cgroup"
    groups.mkdir(parents=True)
    (groups / "memory.current").write_text("1000\n")
    (groups / "memory.max").write_text("max\n")
    assert available(tmp_path) == 32 * 1024
    (groups / "memory.max").write_text("5000\n")
    assert available(tmp_path) == 4000
    assert available(tmp_path / "elsewhere") == 0


def test_the_older_files_of_a_container_count_too(tmp_path):
    groups = tmp_path / "sys/fs/cgroup/memory"
    groups.mkdir(parents=True)
    (groups / "memory.limit_in_bytes").write_text("5000\n")
    (groups / "memory.usage_in_bytes").write_text("1000\n")
    assert available(tmp_path) == 4000
    (groups / "memory.usage_in_bytes").write_text("6000\n")
    assert available(tmp_path) == 0


def test_processes_on_one_host_divide_its_memory(monkeypatch):
    """On CUDA each has a GPU of its own. On a CPU they divide the cores as well, which is not done to this process."""
    divided = []
    for name in ("take_cores", "use_own_kernels", "let_the_launcher_idle"):
        monkeypatch.setattr(
            f"mlx_gpt.cpu.processes.{name}", lambda *numbers, name=name: divided.append((name, *numbers))
        )
    for kind, usable in (("metal", GIB // 3), ("cpu", GIB // 3), ("cuda", GIB)):
        alone = Device(kind, "", GIB, GIB)  # type: ignore[arg-type]
        assert alone.share_host(0, 1) == alone
        assert alone.share_host(1, 3) == dataclasses.replace(alone, usable=usable)
    assert divided == [("take_cores", 1, 3), ("use_own_kernels", 1), ("let_the_launcher_idle",)]


def test_metal_is_given_its_limits(monkeypatch):
    """Memory that training needs in every step stays wired."""
    limits: dict[str, int] = {}
    monkeypatch.setattr(mx, "set_wired_limit", lambda size: limits.update(wired=size))
    monkeypatch.setattr(mx, "set_memory_limit", lambda size: limits.update(memory=size))
    Device("cpu", "", 2 * GIB, GIB).prepare()
    assert limits == {"memory": GIB}
    describe(True, False, MAC).prepare()
    assert limits == {"memory": WORKING_SET, "wired": WORKING_SET}


# ---- the threads of a CPU -------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="only Linux schedules in batches")
def test_a_computing_thread_is_not_interrupted_by_the_one_that_hands_it_work():
    """In a new process that begins like any other, since the policy is inherited."""
    code = """
import os
from mlx_gpt.device import device
os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
device().prepare()
print(os.sched_getscheduler(0))
"""
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(asked.stdout) == os.SCHED_BATCH


def test_a_thread_that_may_not_ask_how_it_is_scheduled_computes_all_the_same(monkeypatch):
    """As in some sandboxes."""

    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr("os.sched_getscheduler", refuse, raising=False)
    monkeypatch.setattr("os.sched_setscheduler", refuse, raising=False)
    monkeypatch.setattr("os.SCHED_BATCH", 3, raising=False)
    monkeypatch.setattr("os.SCHED_OTHER", 0, raising=False)
    device().prepare()
