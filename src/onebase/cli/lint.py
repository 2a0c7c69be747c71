"""`onebase lint`: whether an adapter loads in other tools, and with the right scale."""

from pathlib import Path
from typing import Annotated

import typer

from onebase.cli import options, terminal

_SCHEMA_VERSION = 1
_USUAL = "transformers,vllm,sglang,llama.cpp"


def lint(
    adapter: Annotated[Path, typer.Argument(help="An adapter's folder or a run's.")],
    tools: Annotated[
        str, typer.Option("--for", help="The tools: transformers, vllm, sglang, llama.cpp, diffusers, with commas.")
    ] = _USUAL,
    as_json: options.AsJson = False,
) -> None:
    """Say which tools load an adapter, which load it wrong, and what to do.

    Only the adapter's own files are read: its config and its tensor file. The exit code is 1 where one of
    the tools refuses the adapter or loads it wrong.
    """
    from onebase.files.lint import lint
    from onebase.files.serving import TOOLS

    path = adapter.expanduser()
    findings = lint(path, [name.strip().lower() for name in tools.split(",") if name.strip()])
    if as_json:
        rows = [
            {
                "tool": one.tool,
                "verdict": one.verdict,
                "reasons": list(one.reasons),
                "todo": one.todo or None,
                "version": TOOLS[one.tool].version,
                "sources": TOOLS[one.tool].sources,
            }
            for one in findings
        ]
        terminal.print_json({"schema_version": _SCHEMA_VERSION, "adapter": str(adapter), "tools": rows})
    else:
        shown = [(one.tool, one.verdict, " ".join(one.reasons) or "-", one.todo or "-") for one in findings]
        terminal.stdout().print(
            terminal.table(("tool", "verdict", "why", "what to do"), shown, left=4, fold=("why", "what to do"))
        )
    if any(one.verdict != "loads" for one in findings):
        raise typer.Exit(1)
