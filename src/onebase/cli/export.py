"""`onebase export`: an adapter in a form that other tools read, verified before it is there."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onebase.cli import options, terminal
from onebase.cli.opening import BaseOptions, Opened, open_adapter
from onebase.errors import ConfigError

if TYPE_CHECKING:
    from onebase.train.portable import Export

_SCHEMA_VERSION = 1


def export(
    adapter: Annotated[str, typer.Argument(help="An adapter's folder or a run's.")],
    out: Annotated[Path, typer.Option(help="The folder to write; it must not exist yet.")],
    portable: Annotated[
        bool, typer.Option("--portable", help="Plain LoRA: scale 1, one rank, plain names; what any server reads.")
    ] = False,
    as_json: options.AsJson = False,
    model: options.Model = None,
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
    allow_base_mismatch: options.AllowBaseMismatch = False,
) -> None:
    """Write an adapter in a form that other tools read.

    What was written is read again and compared with the adapter before it gets its name. An adapter with more than
    low-rank pairs is refused with what can hold it.
    """
    if not portable:
        raise ConfigError("export needs a form. Give one: --portable")
    from onebase.files.peft_format import find_adapter
    from onebase.train.merging import check_out
    from onebase.train.portable import export_portable

    check_out(out)
    opened = open_adapter(adapter, BaseOptions(model, None, device, trust_remote_code, allow_base_mismatch))
    assert opened.adapter is not None, "an adapter was opened"
    found = export_portable(opened.bank, opened.adapter, find_adapter(Path(adapter).expanduser()), out)
    if as_json:
        terminal.print_json(
            {
                "schema_version": _SCHEMA_VERSION,
                "adapter": adapter,
                "form": "portable",
                "path": str(found.path),
                "size_bytes": found.size_bytes,
                "r": found.r,
                "pairs": found.pairs,
                "zero_pairs": found.zero_pairs,
                "update_difference": found.update_difference,
                "output_difference": found.output_difference,
            }
        )
    else:
        _show(opened, found)


def _show(opened: Opened, found: "Export") -> None:
    zeros = f", {terminal.counted(found.zero_pairs, 'pair')} of zeros" if found.zero_pairs else ""
    facts = [
        (
            "exported",
            f"{found.path}: {terminal.size(found.size_bytes)}, plain LoRA of rank {found.r}, lora_alpha {found.r}",
        ),
        ("from", f"{opened.label} on {opened.base_line}, {terminal.counted(found.pairs, 'pair')}{zeros}"),
        ("updates", f"differ by at most {found.update_difference:.1e} of their size, read again"),
        ("outputs", f"differ by at most {found.output_difference:.1e} of the largest"),
        ("next", f"onebase lint {found.path}"),
    ]
    terminal.stdout().print(terminal.facts(facts))
