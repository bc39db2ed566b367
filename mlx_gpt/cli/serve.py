"""`mlx-gpt serve`."""

import os
from pathlib import Path
from typing import Any

import click

from mlx_gpt.cli.fetching import fetched
from mlx_gpt.cli.options import SettingsCommand, given, settings_options
from mlx_gpt.config import ServeConfig
from mlx_gpt.errors import UserError
from mlx_gpt.packages import install
from mlx_gpt.settings import build


@click.command("serve", cls=SettingsCommand)
@click.option(
    "--model",
    "models",
    metavar="PATH",
    multiple=True,
    help="A run, a model directory or hf:owner/name; repeat it to serve several.  [default: the newest run]",
)
@settings_options(ServeConfig)
def command(models: tuple[str, ...], **settings: Any) -> None:
    """Serve models to people on a page, and to programs through OpenAI's API."""
    config: ServeConfig = build(ServeConfig, {"api_key": os.environ.get("MLX_GPT_API_KEY", "")} | given(settings))
    try:
        from mlx_gpt.serving.server import check, serve
    except ImportError as error:
        raise UserError(f"Serving needs the package {error.name}: {install('serve')}.") from None
    from mlx_gpt.training.run_folder import newest_run

    check(config)
    paths = [Path(fetched(model)) for model in models] or [newest_run(Path("weights"), with_model=True)]
    serve(paths, config, click.echo)
