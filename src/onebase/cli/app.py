"""The `onebase` command: the options every verb shares. Imports no torch, so that `--help` answers at once."""

from typing import Annotated

import typer

from onebase import __version__

app = typer.Typer(
    name="onebase",
    help="One frozen base model, many adapters: fine-tune, compare, ship and serve them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"onebase {__version__}")
        raise typer.Exit


@app.callback()
def shared_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Take the options that stand before the verb."""


def main() -> None:
    """Run the command line."""
    app()
