"""`mlx-gpt plot`."""

from pathlib import Path

import click


@click.command("plot")
@click.argument("runs", nargs=-1, metavar="[RUN]...")
@click.option(
    "--out",
    metavar="FILE",
    help="PNG to write.  [default: curves.png in the run's folder, or in the current folder for several runs]",
)
def command(runs: tuple[str, ...], out: str | None) -> None:
    """Plot the curves of a run, or of several runs on one picture. Without RUN, plot the newest run.

    This needs the extra `plot`: pip install -e '.[plot]' in the project's folder.
    """
    from mlx_gpt.plot import draw
    from mlx_gpt.training.run_folder import newest_run

    folders = [Path(run) for run in runs] or [newest_run(Path("weights"), with_model=True)]
    target = Path(out) if out else (folders[0] if len(folders) == 1 else Path()) / "curves.png"
    draw(folders, target)
    click.echo(f"Written to {target}.")
