"""`onebase verify`: an adapter against its own promises, on its base and real rows: one table, exit code 1 if one fails."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onebase.cli import options, terminal
from onebase.cli.few_rows import few_rows
from onebase.cli.opening import BaseOptions, Opened, open_adapter, run_settings
from onebase.errors import ConfigError

if TYPE_CHECKING:
    from onebase.train.verifying import Check

_SCHEMA_VERSION = 1
_ROWS = 16


def verify(
    run: Annotated[str, typer.Argument(help="A run's folder or an adapter's.")],
    data: Annotated[
        str | None, typer.Option(help="The rows to verify on. Default: the run's data.valid, data.test or data.train.")
    ] = None,
    as_json: options.AsJson = False,
    model: options.Model = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
    allow_base_mismatch: options.AllowBaseMismatch = False,
) -> None:
    """Check on real rows that an adapter is what it says; the exit code is 1 if a check fails.

    Loaded is what was saved; merged and opened again does what it did unmerged; flat batches give what padded ones give;
    a training that is stopped and resumed gives the bytes of one that is not; chats are rendered as transformers does;
    the adapter has an effect; and no byte of the base has changed.
    """
    from onebase.files.peft_format import find_adapter
    from onebase.train.verifying import Subject
    from onebase.train.verifying import verify as checks_of

    opened = open_adapter(run, BaseOptions(model, dtype, device, trust_remote_code, allow_base_mismatch))
    folder, name = find_adapter(Path(run).expanduser()), opened.adapter
    assert name is not None, "an adapter was opened"
    few = few_rows(opened, data, _ROWS)
    if few.examples is None:
        raise ConfigError(f"--data: name the rows to verify on: {few.said}.")
    settings = run_settings(folder)
    subject = Subject(
        bank=opened.bank,
        name=name,
        folder=folder,
        task=opened.task,
        rows=few.rows,
        examples=few.examples,
        train=_train_settings(settings),
        reading=opened.data_settings("rows"),
        template=_template(opened, settings),
        trust_remote_code=trust_remote_code,
    )
    checks = checks_of(subject, note=lambda check: terminal.say(f"checking: {check}"))
    if as_json:
        terminal.print_json(_as_json(opened, few.said, len(few.rows), checks))
    else:
        _show(opened, few.said, len(few.rows), checks)
    if any(check.state == "failed" for check in checks):
        raise typer.Exit(1)


def _train_settings(run: dict[str, Any]) -> Any:
    from onebase.config.settings import TrainSettings

    return TrainSettings(**(run.get("train") or {}))


def _template(opened: Opened, run: dict[str, Any]) -> str | None:
    """Return the chat template that the run was trained with, where it was not the base's own."""
    path = (run.get("data") or {}).get("template")
    if path is None:
        return None
    if Path(path).is_file():
        return Path(path).read_text(encoding="utf-8")
    terminal.say(f"{path}: the template of the training is gone; the one saved with the adapter stands for it")
    template: str | None = opened.bank.base.tokenizer.chat_template
    return template


def _as_json(opened: Opened, rows: str, count: int, checks: "Sequence[Check]") -> dict[str, Any]:
    return {
        "schema_version": _SCHEMA_VERSION,
        "adapter": opened.label,
        "model": opened.bank.base.name,
        "base_fingerprint": opened.bank.base.fingerprint,
        "dtype": str(opened.bank.base.dtype).removeprefix("torch."),
        "device": str(opened.bank.base.device),
        "data": rows,
        "rows": count,
        "ok": not any(check.state == "failed" for check in checks),
        "checks": [vars(check) for check in checks],
    }


def _show(opened: Opened, rows: str, count: int, checks: "Sequence[Check]") -> None:
    out = terminal.stdout()
    out.print(f"{opened.label} on {opened.base_line}; {terminal.counted(count, 'row')} of {rows}", soft_wrap=True)
    head, lines = ("check", "", "found", "bound", ""), [_row(check) for check in checks]
    if terminal.fits(head, lines):
        out.print(terminal.table(head, lines, left=(0, 1, 4)))
    else:
        # Beside the numbers, what is said would be a word a line.
        out.print(terminal.table(head[:-1], [line[:-1] for line in lines], left=2))
        out.print()
        out.print(terminal.facts((check.name, check.said) for check in checks))
    states = Counter(check.state for check in checks)
    out.print()
    out.print(f"{states['ok']} ok, {states['failed']} failed, {states['not applicable']} not applicable")


def _row(check: "Check") -> tuple[str, ...]:
    bound = "" if check.bound is None else f"{'above' if check.above else 'at most'} {_number(check.bound)}"
    found = "" if check.found is None else _number(check.found)
    return check.name, check.state, found, bound, check.said


def _number(value: float) -> str:
    return f"{value:.0f}" if math.isfinite(value) and value == int(value) else f"{value:.1e}"
