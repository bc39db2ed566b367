"""`mlx-gpt download`."""

from pathlib import Path

import click

from mlx_gpt.cli.options import SettingsCommand, settings_options
from mlx_gpt.cli.prepare import prepare
from mlx_gpt.config import DataConfig


@click.command("download", cls=SettingsCommand)
@click.option(
    "--dataset", metavar="OWNER/NAME", help="The Kaggle dataset.  [default: the LLM-7 prompt training dataset]"
)
@click.option("--from-file", metavar="FILE", help="A zip or CSV that was fetched by hand, instead of Kaggle.")
@click.option("--raw", default="data/raw", show_default=True, metavar="FOLDER", help="Where the files as they come go.")
@click.option("--out", default="data/processed", show_default=True, metavar="FOLDER", help="Where the corpus goes.")
@click.option("--force", is_flag=True, help="Download again what is already here.")
@settings_options(DataConfig, only=("documents", "column", "val_fraction"))
def command(dataset: str | None, from_file: str | None, raw: str, out: str, force: bool, **settings: str) -> None:
    """Get a dataset from Kaggle, or one fetched by hand, and prepare it."""
    from mlx_gpt.data import kaggle
    from mlx_gpt.errors import UserError

    if dataset and from_file:
        raise UserError("--dataset and --from-file exclude each other: give one of them.")
    if from_file:
        files = kaggle.from_file(Path(from_file), Path(raw), echo=click.echo)
    else:
        files = kaggle.download(dataset or kaggle.DEFAULT_DATASET, Path(raw), force=force, echo=click.echo)
    prepare(files, out, settings)
