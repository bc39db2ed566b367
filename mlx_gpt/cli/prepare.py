"""`mlx-gpt prepare`."""

from pathlib import Path

import click

from mlx_gpt.cli.options import SettingsCommand, given, settings_options
from mlx_gpt.cli.terminal import Terminal
from mlx_gpt.config import PREPARED, DataConfig
from mlx_gpt.errors import typed
from mlx_gpt.settings import build

out_option = click.option(
    "--out", default=PREPARED, show_default=True, metavar="FOLDER", help="Folder to write the corpus to."
)
overwrite_option = click.option(
    "--overwrite", is_flag=True, help="Replace the corpus in --out, even if it was edited or made from other files."
)
text_options = settings_options(DataConfig, only=("documents", "column", "val_fraction"))


@click.command("prepare", cls=SettingsCommand)
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@out_option
@overwrite_option
@text_options
def command(paths: tuple[str, ...], out: str, overwrite: bool, **settings: str) -> None:
    """Turn files, or folders of files, into a corpus to train on.

    This reads CSV, TSV, JSON, JSONL, plain text and, with the extra `parquet`, Parquet. The columns of each row say
    whether it is a document, a conversation or a pair of a chosen and a rejected answer. This leaves out empty rows,
    repeated rows, and the few rows that are not of the same kind as the others. A hash of each row decides whether it
    goes to training or to validation. If that would give validation less than half or more than one and a half times
    its share, the text is split by length instead.
    """
    prepare([Path(path) for path in paths], out, overwrite, settings)


def prepare(paths: list[Path], out: str, overwrite: bool, settings: dict[str, str]) -> None:
    """Prepare files, with a progress bar and a report."""
    from mlx_gpt.data.prepare import prepare as prepare_corpus

    display = Terminal()
    config: DataConfig = build(DataConfig, given(settings))
    report = prepare_corpus(
        paths,
        Path(out),
        column=config.column,
        documents=config.documents,
        val_fraction=config.val_fraction,
        overwrite=overwrite,
        progress=display.progress("Preparing"),
    )
    for line in report.lines():
        display.line(line)
    where = [] if Path(out) == Path(PREPARED) else ["--data", out]
    if report.kind == "preferences":
        display.line(f"Written to {out}. mlx-gpt does not train on preferences.")
    else:
        display.line(f"Written to {out}. Train on it with: {typed('train', *where)}")
