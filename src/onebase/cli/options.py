"""The options that several verbs have, each written once."""

from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

Model = Annotated[str | None, typer.Option(help="Another name or place of the adapter's base.")]
Dtype = Annotated[
    str | None,
    typer.Option(help="The number format of the base: auto, float32, bfloat16. Default: the run's, or auto."),
]
Device = Annotated[
    str | None, typer.Option(help="Where to compute: auto, cpu, cuda, cuda:1, mps. Default: the run's, or auto.")
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run Python code that comes with the base; no run's settings allow it."),
]
AllowBaseMismatch = Annotated[
    bool, typer.Option("--allow-base-mismatch", help="Accept a base that the adapter was not trained on.")
]

MaxNewTokens = Annotated[int, typer.Option(min=1, metavar="NUMBER", help="The most tokens of an answer.")]
Temperature = Annotated[
    float, typer.Option(min=0, metavar="NUMBER", help="0 takes the likeliest token; above, tokens are drawn.")
]
Seed = Annotated[int, typer.Option(help="Decides what is drawn.")]
