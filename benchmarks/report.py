"""Makes the tables in README.md, and the picture learning.png, from the files in results/.

python benchmarks/report.py
"""

import installed  # noqa: F401  # isort: skip

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from harness import need, write_json

HERE = Path(__file__).parent
MISSING = "No result has been handed in yet."


def text(value: Any) -> str:
    """The value itself."""
    return str(value)


def number(value: float | Mapping[str, float]) -> str:
    """Three significant digits, or an integer from 100 on; for a summary its median, lowest and highest value."""
    if isinstance(value, Mapping):
        return f"{number(value['median'])} ({number(value['low'])} to {number(value['high'])})"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def ratio(value: float | Mapping[str, float]) -> str:
    """Two decimals; for a summary its median, lowest and highest value."""
    if isinstance(value, Mapping):
        return f"{ratio(value['median'])} ({ratio(value['low'])} to {ratio(value['high'])})"
    return f"{value:.2f}"


def scientific(value: float) -> str:
    """A small number, as 1e-07."""
    return f"{value:.0e}"


def percent(value: float) -> str:
    """A fraction as a percentage."""
    return f"{value:.0%}"


def with_spread(value: Mapping[str, float | None]) -> str:
    """A mean with its standard deviation over the seeds, if there are several."""
    spread = value["spread"]
    return f"{value['mean']:.3f}" + (f" ± {spread:.3f}" if spread is not None else "")


def megabytes(value: float) -> str:
    """Millions of bytes."""
    return f"{value / 1e6:,.0f}"


NUMBERED = (("BLAS", "blas"), ("steps a trial:", "steps"))
Column = tuple[str, str, Callable[[Any], str]]
COLUMNS: dict[str, Sequence[Column]] = {
    "throughput": (
        ("shape", "shape", text),
        ("program", "program", text),
        ("tokens/s", "tokens_per_second", number),
        ("TFLOP/s", "tflops", number),
        ("MFU", "mfu", percent),
        ("peak MB", "peak_memory", megabytes),
        ("resident MB", "resident_memory", megabytes),
        ("mlx-gpt over it", "ours_over_this", ratio),
    ),
    "generation": (
        ("batch", "batch", text),
        ("program", "program", text),
        ("prefill tokens/s", "prefill", number),
        ("decode tokens/s", "decode", number),
        ("GB/s", "gb_per_second", number),
        ("of the copy", "bandwidth_share", percent),
        ("peak MB", "peak_memory", megabytes),
        ("mlx-gpt over it", "ours_over_this", ratio),
        ("over batch 1 in turn", "over_single", ratio),
    ),
    "memory": (
        ("shape", "shape", text),
        ("step", "program", text),
        ("peak MB", "peak_memory", megabytes),
        ("of plain", "peak_over_plain", ratio),
        ("seconds a step", "seconds_per_step", number),
        ("of plain", "time_over_plain", ratio),
        ("resident MB", "resident_memory", megabytes),
    ),
    "data": (
        ("text MB", "megabytes", number),
        ("what", "program", text),
        ("seconds", "seconds", number),
        ("MB/s", "megabytes_per_second", number),
        ("resident MB", "resident_memory", megabytes),
    ),
    "loop": (
        ("shape", "shape", text),
        ("program", "program", text),
        ("tokens/s", "tokens_per_second", number),
        ("resident MB", "resident_memory", megabytes),
        ("of the bare step", "over_bare", ratio),
    ),
    "distributed": (
        ("shape", "shape", text),
        ("program", "program", text),
        ("tokens/s", "tokens_per_second", number),
        ("over one process", "over_one", ratio),
        ("losses differ by", "loss_difference", scientific),
        ("resident MB, each", "resident_memory", megabytes),
    ),
    "serving": (
        ("clients", "clients", text),
        ("program", "program", text),
        ("tokens/s together", "tokens_per_second", number),
        ("seconds to the first", "first_token", number),
        ("over one client", "over_one_client", ratio),
        ("mlx-gpt over it", "ours_over_this", ratio),
        ("connections lost", "lost", text),
    ),
    "learning": (
        ("program", "program", text),
        ("parameters", "parameters", number),
        ("steps", "steps", number),
        ("bits per byte", "bits_per_byte", with_spread),
        ("of GPT-2 with AdamW", "over_adamw", ratio),
        ("minutes to GPT-2's best", "minutes_to_adamw", number),
    ),
    "finetuning": (
        ("program", "program", text),
        ("tokens/s", "tokens_per_second", number),
        ("seconds", "seconds", number),
        ("peak MB", "peak_memory", megabytes),
        ("resident MB", "resident_memory", megabytes),
        ("loss", "loss", number),
        ("mlx-gpt over it", "ours_over_this", ratio),
    ),
    "startup": (
        ("command", "program", text),
        ("seconds", "seconds", number),
        ("seconds above", "above_nothing", number),
    ),
}


def finish(result: Mapping[str, Any], json_file: str | None) -> None:
    """Print a result, and write it to a file if one is given."""
    if json_file:
        write_json(json_file, result)
    click.echo("\n".join(lines(result)))


def lines(result: Mapping[str, Any]) -> list[str]:
    """A result in Markdown that reads well on a terminal: where it was measured, then its table."""
    columns = COLUMNS[result["benchmark"]]
    rows = [["-" if row.get(key) is None else show(row[key]) for _, key, show in columns] for row in result["rows"]]
    return [*about(result), "", *table([heading for heading, _, _ in columns], rows)]


def about(result: Mapping[str, Any]) -> list[str]:
    """One line each on the machine, the versions, the command, and every shape."""
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    settings = ", ".join(f"{value} {name}" for name, value in result["settings"].items())
    cores = f"{machine['cores']} cores"
    if "gpu_cores" in machine:
        cores += f", {machine['gpu_cores']} GPU cores"
    if "gpu" in machine:
        cores += f", {machine['gpu']}"
    summarised = "means ± standard deviations" if result["benchmark"] == "learning" else "medians (lowest to highest)"
    found = [
        f"{machine['chip']}, {cores}, {machine['memory_gib']:g} GiB, {machine['system']}; "
        f"{result['date']}, commit {result['commit'] or 'unknown'}, load before {machine['load_before']:g}",
        f"Python {machine['python']}, {versions}",
        f"`{result['command']}`: {settings}; {summarised}",
    ]
    found += [f"{name}: {about_shape(shape, result.get('tf32'))}" for name, shape in result.get("shapes", {}).items()]
    return [f"- {line}" for line in found]


def about_shape(shape: Mapping[str, Any], tf32: bool | None) -> str:
    """Sizes and dtype of a shape, and the limits of the device. TF32 is mentioned where a GPU computes in float32."""
    parts = [shape[key] for key in ("sizes", "dtype") if key in shape]
    if tf32 is not None and shape.get("dtype") == "float32" and shape.get("kind") != "cpu":
        parts.append("TF32 on" if tf32 else "TF32 off")
    parts += [f"{what} {shape[key]}" for what, key in NUMBERED if shape.get(key)]
    if "product_tflops" in shape:
        products = " and ".join(f"{number(tflops)} ({name})" for name, tflops in shape["product_tflops"].items())
        parts.append(f"large product {products} TFLOP/s")
    if "copy_gb_per_second" in shape:
        parts.append(f"large copy {number(shape['copy_gb_per_second'])} GB/s")
    return "; ".join(parts)


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table with aligned columns: the first two to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [headings, *rows]) for i in range(len(headings))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if i < 2 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return [line(headings), f"| {' | '.join(rule)} |", *map(line, rows)]


def regenerate(readme: str, results: Sequence[Mapping[str, Any]]) -> str:
    """The README with the tables of `results` between its markers."""

    def section(match: re.Match[str]) -> str:
        name = match["name"]
        parts = ["\n".join(lines(result)) for result in results if result["benchmark"] == name]
        return f"<!-- results: {name} -->\n\n{(chr(10) * 2).join(parts) or MISSING}\n\n<!-- end -->"

    return re.sub(r"<!-- results: (?P<name>\w+) -->.*?<!-- end -->", section, readme, flags=re.DOTALL)


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Every result in a folder, ordered by file name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def draw(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw what contenders of learning.py learn over time: a panel for each result, and a line for each seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1 + 4.5 * len(results), 4.5), layout="constrained")
    for axes, result in zip(figure.subplots(1, len(results), squeeze=False)[0], results, strict=True):
        for i, contender in enumerate(result["rows"]):
            for j, curve in enumerate(contender["curves"]):
                minutes, bits = ([point[what] for point in curve[1:]] for what in ("minutes", "bits_per_byte"))
                label = "" if j else contender["program"]
                axes.plot(minutes, bits, color=f"C{i}", alpha=0.8, linewidth=1.2, label=label)
        axes.set(xlabel="minutes", ylabel="bits per byte (validation)", title=result["settings"]["data"])
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=75)


@click.command()
def main() -> None:
    """Make the tables in README.md, and learning.png, from results/*.json."""
    readme, results = HERE / "README.md", read_results(HERE / "results")
    readme.write_text(regenerate(readme.read_text(encoding="utf-8"), results), encoding="utf-8")
    if learned := [result for result in results if result["benchmark"] == "learning"]:
        need("matplotlib")
        draw(learned, HERE / "learning.png")


if __name__ == "__main__":
    main()
