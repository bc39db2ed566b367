"""`mlx-gpt download`."""

import re
from pathlib import Path

import click

from mlx_gpt.cli.options import SettingsCommand
from mlx_gpt.cli.prepare import out_option, overwrite_option, prepare, text_options
from mlx_gpt.cli.terminal import Terminal
from mlx_gpt.errors import UserError

HUB = "https://huggingface.co/datasets/"  # the address of a dataset's page begins with this


@click.command("download", cls=SettingsCommand)
@click.option(
    "--dataset",
    metavar="NAME",
    help="Dataset to download: owner/name from Kaggle, or hf:owner/name from the Hugging Face Hub.  "
    "[default: carlmcbrideellis/llm-7-prompt-training-dataset, essays by school pupils]",
)
@click.option(
    "--file",
    "patterns",
    multiple=True,
    metavar="PATTERN",
    help="Take the files of an hf: dataset that match PATTERN, such as 'data/train-*.parquet', instead of its training "
    "split; may be given several times.",
)
@click.option("--from-file", metavar="FILE", help="Zip or CSV that was downloaded by hand, to use instead of Kaggle.")
@click.option(
    "--raw", default="data/raw", show_default=True, metavar="FOLDER", help="Folder to keep the downloaded files in."
)
@out_option
@overwrite_option
@click.option("--force", is_flag=True, help="Download the dataset even if it is already there.")
@text_options
def command(
    dataset: str | None,
    patterns: tuple[str, ...],
    from_file: str | None,
    raw: str,
    out: str,
    overwrite: bool,
    force: bool,
    **settings: str,
) -> None:
    """Get a dataset from Kaggle or the Hugging Face Hub, or one downloaded by hand, and prepare it."""
    from mlx_gpt.data import hub, kaggle

    if dataset and from_file:
        raise UserError("--dataset and --from-file exclude each other: give one of them.")
    if dataset and dataset.startswith(HUB):
        owner_and_name = re.split("[?#]", dataset.removeprefix(HUB))[0].split("/")[:2]
        dataset = f"hf:{'/'.join(owner_and_name)}"
    on_hub = hub.is_hub_name(dataset)
    if patterns and not on_hub:
        raise UserError("--file chooses among the files of a dataset on the Hub: give --dataset hf:owner/name with it.")
    if from_file:
        files = kaggle.from_file(Path(from_file), Path(raw), echo=Terminal().line)
    elif dataset and on_hub:
        progress = Terminal().progress("Downloading")
        files = hub.download(
            dataset, Path(raw), patterns=patterns, force=force, echo=Terminal().line, progress=progress
        )
    else:
        files = kaggle.download(dataset or kaggle.DEFAULT_DATASET, Path(raw), force=force, echo=Terminal().line)
    prepare(files, out, overwrite, settings)
