"""A result names the machine it was measured on."""

import sys

import pytest

import facts
import report
from tests.benchmarks.test_report import RESULT

# The format of `system_profiler SPDisplaysDataType -json` on a Mac with an Apple chip and one display.
DISPLAYS = """
{
  "SPDisplaysDataType" : [
    {
      "_name" : "Apple M1 Pro",
      "spdisplays_mtlgpufamilysupport" : "spdisplays_metal3",
      "spdisplays_ndrvs" : [
        {
          "_name" : "Color LCD",
          "_spdisplays_pixels" : "3024 x 1964",
          "spdisplays_connection_type" : "spdisplays_internal",
          "spdisplays_main" : "spdisplays_yes"
        }
      ],
      "spdisplays_vendor" : "sppci_vendor_Apple",
      "sppci_bus" : "spdisplays_builtin",
      "sppci_cores" : "16",
      "sppci_device_type" : "spdisplays_gpu",
      "sppci_model" : "Apple M1 Pro"
    }
  ]
}
"""


def test_the_gpus_cores_are_found():
    assert facts.gpu_cores(DISPLAYS) == 16


@pytest.mark.parametrize(
    "displays",
    [
        "",
        "not JSON",
        "{}",
        '{"SPDisplaysDataType": []}',
        '{"SPDisplaysDataType": [{"sppci_model": "AMD Radeon Pro 5500M"}]}',
        '{"SPDisplaysDataType": [{"sppci_cores": "many"}]}',
    ],
)
def test_an_unknown_number_of_cores_is_left_out(displays):
    assert facts.gpu_cores(displays) is None


def test_a_macs_result_names_chip_gpu_cores_memory_and_system(monkeypatch):
    outputs = {"sysctl": "Apple M1 Pro", "system_profiler": DISPLAYS}
    monkeypatch.setattr(facts, "_output_of", lambda program, *arguments: outputs[program])
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr("platform.mac_ver", lambda: ("15.5", ("", "", ""), "arm64"))
    machine = facts.machine() | {"cores": 10, "memory_gib": 16.0}
    first, *_ = report.about(RESULT | {"machine": machine})
    assert first.startswith("- Apple M1 Pro, 10 cores, 16 GPU cores, 16 GiB, macOS 15.5; ")


def test_the_result_of_an_nvidia_gpu_names_it(monkeypatch):
    outputs = {"nvidia-smi": "NVIDIA H100 80GB HBM3\nNVIDIA H100 80GB HBM3"}
    monkeypatch.setattr(facts, "_output_of", lambda program, *arguments: outputs[program])
    monkeypatch.setattr(sys, "platform", "linux")
    machine = facts.machine() | {"chip": "Xeon", "cores": 16, "memory_gib": 128.0}
    first, *_ = report.about(RESULT | {"machine": machine})
    assert first.startswith("- Xeon, 16 cores, NVIDIA H100 80GB HBM3, 128 GiB, Linux ")


def test_other_systems_have_no_gpu(monkeypatch):
    monkeypatch.setattr(facts, "_output_of", lambda program, *arguments: "")
    monkeypatch.setattr(sys, "platform", "linux")
    assert not {"gpu", "gpu_cores"} & facts.machine().keys()


def test_the_command_names_no_folder_and_no_result_file():
    arguments = ["/somewhere/benchmarks/memory.py", "--json", "a.json", "--against", "/somewhere/else", "--json=b.json"]
    assert facts.command(arguments) == "python benchmarks/memory.py --against else"


def test_float32_on_a_gpu_says_whether_tf32_is_on():
    shape = {"sizes": "big", "dtype": "float32", "kind": "cuda"}
    assert report.about_shape(shape, False) == "big; float32; TF32 off"
    assert report.about_shape(shape, True) == "big; float32; TF32 on"
    assert report.about_shape(shape, None) == "big; float32"
    assert report.about_shape(shape | {"kind": "cpu"}, False) == "big; float32"
    assert report.about_shape(shape | {"dtype": "bfloat16"}, False) == "big; bfloat16"
