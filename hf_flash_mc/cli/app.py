"""The ``hf-flash-mc`` command: each subcommand prints what a function elsewhere returns."""

from __future__ import annotations

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Exact, fast attention for transformers models.")


@app.callback()
def main() -> None:
    """Exact, fast attention for transformers models."""


@app.command()
def env() -> None:
    """Versions, GPU, and which back end runs and why: a block to paste into an issue."""
    from hf_flash_mc.cli.environment import describe_environment

    typer.echo("```text\n" + describe_environment() + "\n```")


@app.command()
def models() -> None:
    """Model families with a row of their own: what each needs, whether it is tested, what is refused and why."""
    from hf_flash_mc.patches.support import FAMILIES

    for family in FAMILIES:
        state = f"refused: {family.refused}" if family.refused else "tested" if family.tested else "not tested"
        typer.echo(f"{family.name}: {family.needs} ({state})")
    typer.echo("Other families run if their attention goes through transformers' attention interface.")
