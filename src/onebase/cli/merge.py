"""`onebase merge`: a plain model folder from an adapter and its base, verified before it is there."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onebase.cli import options, terminal
from onebase.cli.few_rows import few_rows
from onebase.cli.opening import BaseOptions, Opened, open_adapter

if TYPE_CHECKING:
    from onebase.train.merging import Merge

_SCHEMA_VERSION = 1
_ROWS = 16


def merge(  # noqa: PLR0913 (a verb's options are its parameters)
    adapter: Annotated[str, typer.Argument(help="An adapter's folder or a run's.")],
    out: Annotated[Path, typer.Option(help="The model's folder; it must not exist yet.")],
    dtype: Annotated[
        str | None, typer.Option(help="The number format to store: float32, bfloat16, float16. Default: the base's.")
    ] = None,
    rows: Annotated[
        str | None,
        typer.Option(
            help="The rows to verify on. Default: the run's data.valid, data.test or data.train, or a few texts."
        ),
    ] = None,
    as_json: options.AsJson = False,
    model: options.Model = None,
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
    allow_base_mismatch: options.AllowBaseMismatch = False,
) -> None:
    """Write an adapter into its base: a plain model that needs no onebase.

    Weights are merged in fp32. Before the folder gets its name it is opened again by transformers, and its logits are
    compared with those of base and adapter: what differs by more than rounding is refused, with the layer.
    """
    from onebase.base.device import resolve_dtype
    from onebase.train.merging import adapter_load_seconds, check_out, merge, rows_for

    stored = None if dtype is None else resolve_dtype(dtype)
    check_out(out)
    opened = open_adapter(adapter, BaseOptions(model, None, device, trust_remote_code, allow_base_mismatch))
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
        trust_remote_code=trust_remote_code,
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
        "worst_module_difference": differences.worst[1],
        "module_bound": differences.module_bound,
        "merge_seconds": found.merge_seconds,
        "merged_load_seconds": found.load_seconds,
        "adapter_load_seconds": adapter_seconds,
    }


def _show(opened: Opened, found: "Merge", rows: str, adapter_seconds: float) -> None:
    differences = found.differences
    path, value = differences.worst
    facts = [
        ("merged", f"{found.folder}: {terminal.size(found.size_bytes)}, {found.dtype}"),
        ("from", f"{opened.label} on {opened.base_line}, {terminal.counted(found.modules, 'module')}"),
        ("verified on", f"{terminal.counted(found.rows, 'row')}: {rows}"),
        (
            "largest difference",
            f"{differences.results:.1e} of the largest result (bound {differences.results_bound:.0e})",
        ),
        ("worst layer", f"{path}: {value:.1e} (bound {differences.module_bound:.0e})"),
        ("merging", terminal.duration(found.merge_seconds)),
        (
            "loading it",
            f"{terminal.duration(found.load_seconds)}; the adapter onto a loaded base: {adapter_seconds:.2f} s",
        ),
    ]
    if found.untied:
        facts.insert(
            2, ("untied", "embedding and head, one weight in the base, are two here (tie_word_embeddings: false)")
        )
    terminal.stdout().print(terminal.facts(facts))
