"""`mlx-gpt prepare`."""

from pathlib import Path

import click

from mlx_gpt.cli.options import SettingsCommand, given, settings_options
from mlx_gpt.cli.terminal import Terminal
from mlx_gpt.config import DataConfig
from mlx_gpt.settings import build


@click.command("prepare", cls=SettingsCommand)
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option("--out", default="data/processed", show_default=True, metavar="FOLDER", help="Where the corpus goes.")
@settings_options(DataConfig, only=("documents", "column", "val_fraction"))
def command(paths: tuple[str, ...], out: str, **settings: str) -> None:
    """Turn files, or folders of them, into a corpus to train on.

    Reads CSV, TSV, JSONL, plain text and, with the extra mlx-gpt[parquet], Parquet. Empty and repeated documents are
    left out, and each document goes to training or validation by a hash of its text.
    """
    prepare([Path(path) for path in paths], out, settings)


def prepare(paths: list[Path], out: str, settings: dict[str, str]) -> None:
    """Prepare files, with a progress bar and a report."""
    from mlx_gpt.data.corpus import prepare as prepare_corpus

    display = Terminal()
    config: DataConfig = build(DataConfig, given(settings))
    report = prepare_corpus(
        paths,
        Path(out),
        column=config.column,
        documents=config.documents,
        val_fraction=config.val_fraction,
        progress=display.progress("Preparing"),
    )
    for line in report.lines():
        display.line(line)
    where = "" if Path(out) == Path("data/processed") else f" --data {out}"
    display.line(f"Written to {out}. Train on it with: mlx-gpt train{where}")
