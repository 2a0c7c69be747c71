"""The `onebase` command: its verbs, and the options that every verb shares. Imports no torch, so that help comes at once.

A verb is a function in a module of its own; what it needs of torch it imports when it runs.
"""

import sys
from collections.abc import Callable
from typing import Annotated

import typer

from onebase import __version__
from onebase.cli import (
    chat,
    evaluate,
    export,
    failure,
    lint,
    listing,
    merge,
    predict,
    preview,
    raise_on_sigint,
    train,
    verify,
)

app = typer.Typer(
    name="onebase",
    help="One frozen base model, many adapters: fine-tune, compare and ship them.",
    epilog="Example: onebase train run.yaml --out runs/first",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["--help", "-h"]},
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
    debug: Annotated[
        bool, typer.Option("--debug", help=f"Show tracebacks (also: {failure.DEBUG_VARIABLE}=1).")
    ] = False,
) -> None:
    """Take the options that stand before the verb."""
    failure.show_tracebacks(debug or failure.debug_from_environment())


def _verb(group: typer.Typer, name: str, run: Callable[..., None], *examples: str) -> None:
    """Put a verb on the command line, with examples below its help."""
    word = "Examples" if len(examples) > 1 else "Example"
    lines = [f"{word}:", *(f"  onebase {example}" for example in examples)]
    group.command(name, help=_help(run), epilog="\n\n".join(lines))(failure.reported(run))


def _help(run: Callable[..., None]) -> str:
    """Return a verb's docstring with a line for each paragraph, for terminals of any width."""
    return "\n\n".join(" ".join(part.split()) for part in (run.__doc__ or "").split("\n\n"))


_verb(
    app,
    "train",
    train.train,
    "train run.yaml --out runs/first",
    "train run.yaml --out runs/r32 --set adapter.r=32",
    "train run.yaml --out runs/first --resume",
    "train run.yaml --out runs/first --profile",
    "train first.yaml second.yaml --out runs/both",
)
_verb(app, "eval", evaluate.evaluate, "eval runs/first", "eval runs/first --data test.jsonl --json")
_verb(
    app,
    "chat",
    chat.chat,
    "chat runs/first",
    "chat smollm2-135m-instruct --temperature 0.7",
    "chat runs/first < questions.txt",
)
_verb(app, "predict", predict.predict, "predict runs/first --data test.jsonl --out answers.jsonl")
_verb(
    app,
    "merge",
    merge.merge,
    "merge runs/first --out models/first",
    "merge runs/first --out models/half --dtype bfloat16",
    "merge runs/a runs/b --weights 0.7,0.3 --out adapters/both",
    "merge runs/a runs/b --weights 1,-0.5 --how ties --density 0.5 --out less",
)
_verb(app, "verify", verify.verify, "verify runs/first", "verify runs/first --data test.jsonl --json")
_verb(
    app,
    "export",
    export.export,
    "export runs/first --out adapters/first --portable",
    "export runs/first --out first.gguf --gguf --type F16",
    "export runs/first --out model.gguf --gguf --merged --base-gguf base.gguf --type Q8_0",
)
_verb(app, "lint", lint.lint, "lint runs/first", "lint runs/first --for vllm,llama.cpp --json")
_verb(app, "preview", preview.preview, "preview run.yaml --rows 5")
_verb(app, "targets", listing.targets, "targets smollm2-135m-instruct")
_verb(app, "runs", listing.runs, "runs runs")
_verb(app, "schema", listing.schema, "schema", "schema --json > onebase.schema.json")

models = typer.Typer(invoke_without_command=True, context_settings={"help_option_names": ["--help", "-h"]})
app.add_typer(models, name="models", epilog="Examples:\n\n  onebase models\n\n  onebase models fetch minilm-l6-v2")
models.callback()(failure.reported(listing.models))
_verb(models, "fetch", listing.fetch, "models fetch smollm2-135m-instruct")


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # an answer may hold what this terminal cannot show
    failure.leave_on_sigterm()
    arguments = sys.argv[1:]
    if "--debug" in arguments:  # wherever it stands
        arguments = ["--debug", *(word for word in arguments if word != "--debug")]
    raise_on_sigint()
    app(args=arguments, prog_name="onebase")
