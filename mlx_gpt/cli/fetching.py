"""Fetches models that commands open by their names on the Hugging Face Hub."""

import click

from mlx_gpt.cli.terminal import Terminal


def fetched(model: str) -> str:
    """Return the path to a model. A model named `hf:owner/name` is fetched unless it already was.

    Raises:
        UserError: the model cannot be fetched.
    """
    from mlx_gpt.data import hub

    if not hub.is_hub_name(model):
        return model

    def echo(line: str) -> None:
        click.echo(line, err=True)  # stdout is for the command's results

    return str(hub.model(model, echo=echo, progress=Terminal().progress("Downloading"))[0])
