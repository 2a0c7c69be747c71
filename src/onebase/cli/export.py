"""`onebase export`: an adapter in a form that other tools read, verified before it is there."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onebase.cli import options, terminal
from onebase.cli.opening import BaseOptions, Opened, open_adapter
from onebase.errors import ConfigError

if TYPE_CHECKING:
    from onebase.train.gguf_adapter import GgufExport
    from onebase.train.gguf_model import ModelExport
    from onebase.train.portable import Export

_SCHEMA_VERSION = 1


def export(  # noqa: PLR0913 (a verb's options are its parameters)
    adapter: Annotated[str, typer.Argument(help="An adapter's folder or a run's.")],
    out: Annotated[Path, typer.Option(help="The folder to write, with --gguf the file; it must not exist yet.")],
    portable: Annotated[
        bool, typer.Option("--portable", help="Plain LoRA: scale 1, one rank, plain names; what any server reads.")
    ] = False,
    gguf: Annotated[bool, typer.Option("--gguf", help="A GGUF file for llama.cpp: the adapter.")] = False,
    merged: Annotated[
        bool, typer.Option("--merged", help="With --gguf: base and adapter as one model; needs --base-gguf.")
    ] = False,
    base_gguf: Annotated[
        Path | None,
        typer.Option(help="The base's own GGUF file, whose sizes and vocabulary a merged model takes over."),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            "--type", help="With --gguf, the format of the numbers: F32 (the default), F16; Q8_0 with --merged."
        ),
    ] = None,
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
    if portable == gguf:
        raise ConfigError("export needs one form. Give --portable or --gguf.")
    if merged != (base_gguf is not None) or (merged and not gguf):
        raise ConfigError("a merged model needs all three: --gguf --merged --base-gguf FILE, the base's own GGUF file.")
    if kind is not None and not gguf:
        raise ConfigError("--type: is for --gguf; a portable adapter is stored in fp32. Remove it.")
    numbers = (kind or "F32").upper()
    from onebase.files.peft_format import find_adapter
    from onebase.train.gguf_adapter import export_gguf
    from onebase.train.gguf_model import export_merged
    from onebase.train.merging import check_out
    from onebase.train.portable import export_portable

    check_out(out)
    opened = open_adapter(adapter, BaseOptions(model, None, device, trust_remote_code, allow_base_mismatch, "none"))
    assert opened.adapter is not None, "an adapter was opened"
    folder = find_adapter(Path(adapter).expanduser())
    found: Export | GgufExport | ModelExport
    if base_gguf is not None:
        found = export_merged(opened.bank, opened.adapter, base_gguf.expanduser(), out, numbers)
        facts = _merged_facts(opened, found)
    elif gguf:
        found = export_gguf(opened.bank, opened.adapter, folder, out, numbers)
        facts = _gguf_facts(opened, found)
    else:
        found = export_portable(opened.bank, opened.adapter, folder, out)
        facts = _portable_facts(opened, found)
    if as_json:
        form = "merged gguf" if merged else "gguf" if gguf else "portable"
        terminal.print_json({"schema_version": _SCHEMA_VERSION, "adapter": adapter, "form": form, **asdict(found)})
    else:
        terminal.stdout().print(terminal.facts(facts))


def _portable_facts(opened: Opened, found: "Export") -> list[tuple[str, str]]:
    zeros = f", {terminal.counted(found.zero_pairs, 'pair')} of zeros" if found.zero_pairs else ""
    plain = f"plain LoRA of rank {found.r}, lora_alpha {found.r}"
    return [
        ("exported", f"{found.path}: {terminal.size(found.size_bytes)}, {plain}"),
        ("from", f"{opened.label} on {opened.base_line}, {terminal.counted(found.pairs, 'pair')}{zeros}"),
        ("updates", f"differ by at most {found.update_difference:.1e} of their size, read again"),
        ("outputs", f"differ by at most {found.output_difference:.1e} of the largest"),
        ("next", f"onebase lint {found.path}"),
    ]


def _gguf_facts(opened: Opened, found: "GgufExport") -> list[tuple[str, str]]:
    what = f"LoRA for {found.architecture}, {found.kind}, lora_alpha {found.lora_alpha:g}"
    return [
        ("exported", f"{found.path}: {terminal.size(found.size_bytes)}, {what}"),
        ("from", f"{opened.label} on {opened.base_line}, {terminal.counted(found.pairs, 'pair')}"),
        ("numbers", f"differ by at most {found.largest_rounding:.1e}, read again"),
        ("next", f"llama-cli -m BASE.gguf --lora {found.path}"),
    ]


def _merged_facts(opened: Opened, found: "ModelExport") -> list[tuple[str, str]]:
    what = f"a whole {found.architecture} model, {found.kind}"
    return [
        ("exported", f"{found.path}: {terminal.size(found.size_bytes)}, {what}"),
        ("from", f"{opened.label} on {opened.base_line}, {terminal.counted(found.tensors, 'tensor')}"),
        ("numbers", f"differ by at most {found.largest_rounding:.1e}, read again"),
        ("next", f"llama-cli -m {found.path}"),
    ]
