"""A run that is interrupted at a change to its files loses nothing. `interrupting.py` alone tries every change."""

import subprocess
import sys
from pathlib import Path


def test_an_interruption_at_a_change_to_a_file_loses_nothing():
    command = [sys.executable, "-m", "tests.training.interrupting", "--sample"]
    answer = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert int(answer.stdout.split()[0]) == 12
