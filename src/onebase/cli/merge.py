"""`onebase merge`: an adapter and its base as a plain model folder; several adapters as one. Verified before it is there."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onebase.cli import options, terminal
from onebase.cli.combine import CombineOptions, combine
from onebase.cli.few_rows import few_rows
from onebase.cli.opening import BaseOptions, Opened, open_adapter, run_settings
from onebase.errors import ConfigError, list_problems

if TYPE_CHECKING:
    from onebase.train.merging import Merge

_SCHEMA_VERSION = 1
_ROWS = 16
_INTO = ("original", "dequantised")


def merge(  # noqa: PLR0913 (a verb's options are its parameters)
    adapters: Annotated[
        list[str],
        typer.Argument(metavar="ADAPTER", help="An adapter's folder or a run's; several to combine them."),
    ],
    out: Annotated[Path, typer.Option(help="The folder of the model or the adapter; it must not exist yet.")],
    weights: Annotated[
        str | None, typer.Option(metavar="NUMBERS", help="The weight of each adapter, below zero too: 0.7,-0.3")
    ] = None,
    how: Annotated[
        str | None,
        typer.Option(
            help="How to combine: cat (the exact sum; the default), svd, linear, ties, dare_linear, dare_ties, "
            "magnitude_prune; the last four also with _svd behind."
        ),
    ] = None,
    density: Annotated[
        float | None, typer.Option(help="The share of numbers that ties, dare and magnitude_prune keep.")
    ] = None,
    svd_rank: Annotated[
        int | None, typer.Option(help="The rank that svd cuts to. Default: the largest of a layer's adapters.")
    ] = None,
    majority_sign_method: Annotated[
        str | None,
        typer.Option(metavar="METHOD", help="How ties elects a sign: total (the sum's; the default), frequency."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Decides what dare drops. Default: 0.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="A model's number format: float32, bfloat16, float16. Default: the base's."),
    ] = None,
    into: Annotated[
        str | None,
        typer.Option(
            help="The base's weights to write into: original, those of its files (the default), or dequantised, those "
            "that an adapter was trained on with quantize: nf4."
        ),
    ] = None,
    rows: Annotated[
        str | None,
        typer.Option(
            help="The rows to verify a model on. Default: the run's data.valid, data.test or data.train, or a few texts."
        ),
    ] = None,
    as_json: options.AsJson = False,
    model: options.Model = None,
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
    allow_base_mismatch: options.AllowBaseMismatch = False,
) -> None:
    """Write an adapter into its base, or several adapters as one.

    One adapter gives a plain model that needs no onebase. Weights are merged in fp32. Before the folder gets its name it
    is opened again by transformers, and its logits are compared with those of base and adapter: what differs by more than
    rounding is refused, with the layer.

    Several LoRA adapters of one base, with --weights, give one adapter. It is read again and compared with what it was
    made from before the folder gets its name. One adapter with --weights or --how is scaled, pruned or cut so.
    """
    on = BaseOptions(model, None, device, trust_remote_code, allow_base_mismatch, "none")
    wanted = CombineOptions(weights, how, density, svd_rank, majority_sign_method, seed)
    if len(adapters) > 1 or wanted.wanted:
        others = {"--dtype": dtype, "--into": into, "--rows": rows}
        combine(adapters, out, wanted, on, not_for_this=others, as_json=as_json)
    elif wanted.details:
        problems = [f"{name}: is for combining adapters. Remove it, or say --how." for name in wanted.details]
        raise ConfigError(list_problems("the options of merge", problems))
    else:
        on = replace(on, quantize=_held_in(adapters[0], into or "original"))
        _merge_into_base(adapters[0], out, dtype, rows, on, as_json=as_json)


def _held_in(adapter: str, into: str) -> str:
    """Return how the base's layers are to be held for merging into these weights; say where others were trained on.

    Raises:
        ConfigError: there are no such weights.
    """
    from onebase.files.peft_format import find_adapter, read_adapter

    if into not in _INTO:
        raise ConfigError(f"--into: must be {' or '.join(_INTO)}, got {into}.")
    folder = find_adapter(Path(adapter).expanduser())
    record = read_adapter(folder).record
    trained_on = str(run_settings(folder).get("quantize") or "none") if record is None else record.quantize
    if into == "original":
        if trained_on != "none":
            todo = " For the weights that it was trained on: --into dequantised" if trained_on == "nf4" else ""
            terminal.say(f"trained on a base in {trained_on}; on the original weights its results differ.{todo}")
        return "none"
    if trained_on == "int8":
        raise ConfigError(
            "--into dequantised: the adapter was trained on a base in int8, whose layers round what goes into them too, so "
            "no weights do the same. Merge it --into original."
        )
    if trained_on != "nf4":
        raise ConfigError(
            f"--into dequantised: the adapter was trained on a base that is not quantised (quantize: {trained_on}). "
            "Leave --into out."
        )
    return trained_on


def _merge_into_base(
    adapter: str, out: Path, dtype: str | None, rows: str | None, on: BaseOptions, *, as_json: bool
) -> None:
    """Write the plain model that an adapter and its base are together, and say what was found."""
    from onebase.base.device import resolve_dtype
    from onebase.train.merging import adapter_load_seconds, check_out, merge, rows_for

    stored = None if dtype is None else resolve_dtype(dtype)
    check_out(out)
    opened = open_adapter(adapter, on)
    bank, name = opened.bank, opened.adapter
    assert name is not None, "an adapter was opened"
    few = few_rows(opened, rows, _ROWS)
    said = few.said if few.sequences else f"a few built-in texts: {few.said}"
    found = merge(
        bank,
        name,
        out,
        rows_for(bank, few.sequences),
        dtype=stored,
        trust_remote_code=on.trust_remote_code,
        note=terminal.say,
    )
    seconds = adapter_load_seconds(bank, Path(adapter).expanduser())
    if as_json:
        terminal.print_json(_as_json(opened, found, said, seconds))
    else:
        _show(opened, found, said, seconds)


def _as_json(opened: Opened, found: "Merge", rows: str, adapter_seconds: float) -> dict[str, Any]:
    differences = found.differences
    return {
        "schema_version": _SCHEMA_VERSION,
        "adapter": opened.label,
        "model": opened.bank.base.name,
        "into": "original" if opened.bank.base.quantize == "none" else "dequantised",
        "base_fingerprint": opened.bank.base.fingerprint,
        "merged": str(found.folder),
        "dtype": found.dtype,
        "size_bytes": found.size_bytes,
        "modules": found.modules,
        "untied": found.untied,
        "data": rows,
        "rows": found.rows,
        "largest_difference": differences.results,
        "largest_difference_bound": differences.results_bound,
        "worst_module": differences.worst[0],
        "worst_module_difference": differences.worst[1].value,
        "module_bound": differences.worst[1].bound,
        "merge_seconds": found.merge_seconds,
        "merged_load_seconds": found.load_seconds,
        "adapter_load_seconds": adapter_seconds,
    }


def _show(opened: Opened, found: "Merge", rows: str, adapter_seconds: float) -> None:
    differences = found.differences
    path, worst = differences.worst
    facts = [
        ("merged", f"{found.folder}: {terminal.size(found.size_bytes)}, {found.dtype}"),
        ("from", f"{opened.label} on {opened.base_line}, {terminal.counted(found.modules, 'module')}"),
        ("verified on", f"{terminal.counted(found.rows, 'row')}: {rows}"),
        (
            "largest difference",
            f"{differences.results:.1e} of the largest result (bound {differences.results_bound:.0e})",
        ),
        ("worst layer", f"{path}: {worst.value:.1e} (bound {worst.bound:.0e})"),
        ("merging", terminal.duration(found.merge_seconds)),
        (
            "loading it",
            f"{terminal.duration(found.load_seconds)}; the adapter onto a loaded base: {adapter_seconds:.2f} s",
        ),
        ("next", f"onebase eval {found.folder} --data FILE"),
    ]
    if found.untied:
        facts.insert(
            2, ("untied", "embedding and head, one weight in the base, are two here (tie_word_embeddings: false)")
        )
    terminal.stdout().print(terminal.facts(facts))
