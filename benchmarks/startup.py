"""Measures how long `mlx-gpt --help` takes, compared with a Python that does nothing.

python benchmarks/startup.py
"""

import installed  # noqa: F401  # isort: skip

import subprocess
import sys
import time

import click

import facts
import report
from harness import common_options, summary, turns_bar

NOTHING = "python -c pass"
# mlx-gpt's entry point is called by name, so that the Python of this benchmark runs it.
COMMANDS = {
    NOTHING: ["-c", "pass"],
    "mlx-gpt --help": ["-c", "import sys; from mlx_gpt.cli import main; sys.exit(main())", "--help"],
}


@click.command()
@common_options
def main(trials: int, threads: int, json_file: str | None) -> None:
    """Time the start of the command."""
    result = facts.begin("startup", threads=threads, trials=trials)
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    with turns_bar("startup", trials) as turn:
        for trial in range(trials + 1):
            for name, arguments in COMMANDS.items():
                started = time.perf_counter()
                subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
                if trial > 0:  # the first turn reads the files from the disk
                    seconds[name].append(time.perf_counter() - started)
            turn()
    above = [taken - nothing for taken, nothing in zip(seconds["mlx-gpt --help"], seconds[NOTHING], strict=True)]
    result["rows"] = [
        {"program": name, "seconds": summary(taken), "above_nothing": None if name == NOTHING else summary(above)}
        for name, taken in seconds.items()
    ]
    report.finish(result, json_file)


if __name__ == "__main__":
    main()
