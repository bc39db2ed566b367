"""The output of macOS's own commands is understood, whatever it says. The samples follow the commands' formats."""

import json
import subprocess
import sys

import pytest

from mlx_gpt import mac

DISPLAYS = {
    "SPDisplaysDataType": [
        {
            "_name": "Apple M3 Max",
            "spdisplays_mtlgpufamilysupport": "spdisplays_metal3",
            "spdisplays_ndrvs": [{"_name": "Color LCD", "spdisplays_main": "spdisplays_yes"}],
            "spdisplays_vendor": "sppci_vendor_Apple",
            "sppci_bus": "spdisplays_builtin",
            "sppci_cores": "40",
            "sppci_device_type": "spdisplays_gpu",
            "sppci_model": "Apple M3 Max",
        }
    ]
}
ANSWERS = {
    ("sysctl", "-n", "machdep.cpu.brand_string"): "Apple M3 Max",
    ("system_profiler", "SPDisplaysDataType", "-json"): json.dumps(DISPLAYS),
    ("sw_vers", "-productVersion"): "15.3.1",
    ("sysctl", "-n", "iogpu.wired_limit_mb"): "0",
}


def test_a_mac_says_what_it_is():
    assert mac.look(lambda *command: ANSWERS[command]) == mac.Mac("Apple M3 Max", 40, (15, 3, 1), 0)


def test_a_mac_that_does_not_answer_is_unknown():
    assert mac.look(lambda *command: "") == mac.Mac("", None, (), None)


@pytest.mark.parametrize(
    "report",
    [
        "",
        "no JSON",
        "[]",
        "{}",
        '{"SPDisplaysDataType": []}',
        '{"SPDisplaysDataType": [{"sppci_model": "AMD Radeon Pro 560X"}]}',
        '{"SPDisplaysDataType": [{"sppci_cores": "many"}]}',
        '{"SPDisplaysDataType": 3}',
    ],
)
def test_a_report_without_gpu_cores_has_none(report):
    assert mac.gpu_cores(report) is None


def test_the_gpu_with_cores_counts():
    both = {"SPDisplaysDataType": [{"sppci_model": "eGPU"}, *DISPLAYS["SPDisplaysDataType"]]}
    assert mac.gpu_cores(json.dumps(both)) == 40


@pytest.mark.parametrize(("text", "numbers"), [("26.2", (26, 2)), ("14.6.1", (14, 6, 1)), ("", ()), ("26.2 beta", ())])
def test_versions_are_numbers(text, numbers):
    assert mac.version(text) == numbers


@pytest.mark.parametrize(
    ("chip", "macos", "there", "used"),
    [
        ("Apple M1", (26, 2), False, False),
        ("Apple M4 Max", (26, 2), False, False),
        ("Apple M5", (26, 1, 9), True, False),
        ("Apple M5 Pro", (26, 2), True, True),
        ("Apple M10 Ultra", (27,), True, True),
        ("Intel(R) Core(TM) i7-9750H CPU @ 2.60GHz", (15, 0), False, False),
        ("Apple processor", (26, 2), False, False),
        ("", (), False, False),
    ],
)
def test_matrix_units_need_a_chip_and_a_system(chip, macos, there, used):
    machine = mac.Mac(chip, None, macos, None)
    assert (machine.has_matrix_units, machine.uses_matrix_units) == (there, used)


def test_a_command_that_fails_or_is_not_there_says_nothing(monkeypatch):
    assert mac.output("no-such-command-anywhere") == ""
    assert mac.output(sys.executable, "-c", "print('half'); raise SystemExit(1)") == ""
    assert mac.output(sys.executable, "-c", "print(' 26.2')") == "26.2"

    def hangs(command, **options):
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(subprocess, "run", hangs)
    assert mac.output("sysctl") == ""
