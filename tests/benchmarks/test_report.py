"""The tables in benchmarks/README.md agree with the results."""

import json
import re

import report
from tests.benchmarks.conftest import ROOT

README = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
RESULTS = report.read_results(ROOT / "benchmarks/results")
RESULT = {
    "benchmark": "startup",
    "date": "2026-01-02",
    "command": "python benchmarks/startup.py",
    "commit": "0123456789",
    "machine": {"chip": "Chip", "cores": 2, "memory_gib": 8.0, "system": "OS 1", "python": "3.11", "load_before": 0.0},
    "versions": {"mlx": "1"},
    "settings": {"threads": 2, "trials": 3},
    "rows": [
        {"program": "nothing", "seconds": {"median": 0.01234, "low": 0.01, "high": 2000.0}, "above_nothing": None}
    ],
}


def test_the_tables_are_made_from_the_results():
    assert report.regenerate(README, RESULTS) == README, "run: python benchmarks/report.py"


def test_each_benchmark_has_a_section():
    assert re.findall("<!-- results: (.*) -->", README) == [
        "throughput",
        "learning",
        "loop",
        "generation",
        "memory",
        "finetuning",
        "data",
        "distributed",
        "serving",
        "startup",
    ]
    assert set(report.COLUMNS) == set(re.findall("<!-- results: (.*) -->", README))


def test_no_result_names_a_folder():
    for result in RESULTS:
        assert not re.search(r'"[^"]*(?<![\w.])/(tmp|home|Users|root|work|var|private)\b', json.dumps(result))


def test_a_section_without_results_says_so_and_can_be_filled():
    readme = "Before\n<!-- results: startup -->\n<!-- end -->\nAfter\n"
    empty = report.regenerate(readme, [])
    assert report.MISSING in empty
    filled = report.regenerate(empty, [RESULT])
    assert report.MISSING not in filled
    assert "| nothing | 0.0123 (0.01 to 2,000) |" in " ".join(filled.split())
    assert "- Chip, 2 cores, 8 GiB, OS 1; 2026-01-02, commit 0123456789, load before 0" in filled
    assert report.regenerate(filled, [RESULT]) == filled
    assert report.regenerate(filled, []) == empty
    assert (filled.startswith("Before\n"), filled.endswith("\nAfter\n")) == (True, True)
