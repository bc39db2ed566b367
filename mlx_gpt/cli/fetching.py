"""Fetches models that commands open by their names on the Hugging Face Hub."""

import click

from mlx_gpt.cli.terminal import Terminal


def fetched(model: str) -> str:
    """Return the path to a model. One that is named `hf:owner/name` is fetched if it was not before.

    Raises:
        UserError: it cannot be fetched.
    """
    from mlx_gpt.data import hub

    if not hub.is_hub_name(model):
        return model

    def echo(line: str) -> None:
        click.echo(line, err=True)  # stdout is for what the command makes

    return str(hub.model(model, echo=echo, progress=Terminal().progress("Downloading"))[0])
