"""`onebase eval`: an adapter on a file. Tokens beside the base alone: loss, perplexity, accuracy. The rest: judging.py."""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onebase.cli import options, terminal
from onebase.cli.judging import judge_whole
from onebase.cli.opening import BaseOptions, Opened, open_adapter_or_model
from onebase.cli.scores import TOKEN_TASKS, check_number
from onebase.errors import ConfigError

if TYPE_CHECKING:
    from onebase.measure.evaluate import Scores
    from onebase.train.data import Prepared

_SCHEMA_VERSION = 1


@dataclass(frozen=True)
class _Measured:
    """The scores of one evaluation and how long it took."""

    scores: "Scores"
    seconds: float


def evaluate(  # noqa: PLR0913 (a verb's options are its parameters)
    adapter: Annotated[str, typer.Argument(help="An adapter's folder or a run's; a model, to measure it alone.")],
    data: Annotated[
        str | None, typer.Option(help="The rows to measure on. Default: the run's data.test, or else data.valid.")
    ] = None,
    as_json: options.AsJson = False,
    slices: Annotated[
        list[str] | None,
        typer.Option(
            "--slice", metavar="COLUMN", help="Measure classes or numbers by a column, too. Default: the run's."
        ),
    ] = None,
    base_only: Annotated[bool, typer.Option("--base-only", help="Measure the base without the adapter.")] = False,
    model: options.Model = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
    allow_base_mismatch: options.AllowBaseMismatch = False,
) -> None:
    """Measure an adapter on a file.

    Chats and texts, beside the base alone: loss (nats a labelled token), perplexity, and the share of labelled tokens
    ranked first. Classes: accuracy, macro F1, AUROC, ECE and Brier; numbers: MSE, MAE and R2; each with a bootstrap interval, also by slices.
    """
    opened = open_adapter_or_model(adapter, BaseOptions(model, dtype, device, trust_remote_code, allow_base_mismatch))
    if slices and opened.task in TOKEN_TASKS:
        raise ConfigError(
            f"--slice: is for classify and regress, but {opened.label} is for task {opened.task!r}. Leave it away."
        )
    prepared, name = _rows(opened, data)
    report = prepared.report
    if report.dropped_rows or report.truncated:
        terminal.warn(
            f"{name}: {terminal.counted(report.dropped_rows, 'row')} dropped, {report.truncated:,} truncated of {report.rows:,}"
        )
    if opened.task not in TOKEN_TASKS:
        judge_whole(opened, None if base_only else opened.adapter, prepared, name, slices, as_json=as_json)
        return
    base = _measure(opened, None, prepared, f"base {opened.bank.base.name}")
    own = None
    check_number(base.scores.loss, f"base {opened.bank.base.name}", name)
    if opened.adapter is not None and not base_only:
        own = _measure(opened, opened.adapter, prepared, f"adapter {adapter}")
        check_number(own.scores.loss, f"adapter {adapter}", name)
    if as_json:
        terminal.print_json(_as_json(opened, name, own, base))
    else:
        _show(opened, name, own, base)


def _rows(opened: Opened, data: str | None) -> tuple["Prepared", str]:
    """Return the examples to measure on and what to call them."""
    from onebase.train.data import load_rows

    base, virtual = opened.bank.base, len(opened.bank.virtual_ids(opened.adapter))
    if data is not None:
        return load_rows(data, opened.data_settings(data), opened.task, base, virtual), data
    for part in ("test", "valid"):
        source = opened.sources.get(part)
        if isinstance(source, float):
            from onebase.train.data import load_data

            settings = opened.data_settings(opened.sources["train"])
            held_out = load_data(settings.model_copy(update={"valid": source}), opened.task, base, virtual).valid
            assert held_out is not None, "a fraction holds rows out"
            return held_out, ", ".join(held_out.files)
        if source is not None:
            prepared = load_rows(source, opened.data_settings(source), opened.task, base, virtual)
            return prepared, source if isinstance(source, str) else f"the run's data.{part}"
    raise ConfigError(
        f"--data: name the rows to measure on; {opened.label} has no data.test and no data.valid of its own."
    )


def _measure(opened: Opened, adapter: str | None, prepared: "Prepared", label: str) -> _Measured:
    """Return the scores of the adapter, or of the base alone, with a progress line where standard error is a terminal."""
    from onebase.cli.counting import counting
    from onebase.measure.evaluate import EVALUATION_TOKENS
    from onebase.measure.evaluate import evaluate as scores_of

    started = time.perf_counter()
    with counting(label, len(prepared.examples), "rows") as advance:
        scores = scores_of(
            opened.bank,
            adapter,
            prepared.examples,
            batch_tokens=opened.batch_tokens or EVALUATION_TOKENS,
            on_progress=lambda done, _: advance(done),
        )
    return _Measured(scores, time.perf_counter() - started)


def _as_json(opened: Opened, data: str, own: _Measured | None, base: _Measured) -> dict[str, Any]:
    """Return what is printed: the scores asked for at the top, the base's under `base` beside an adapter's."""
    asked = own or base
    numbers: dict[str, Any] = {
        "schema_version": _SCHEMA_VERSION,
        "adapter": opened.label if own else None,
        "model": opened.bank.base.name,
        "base_fingerprint": opened.bank.base.fingerprint,
        "dtype": str(opened.bank.base.dtype).removeprefix("torch."),
        "device": str(opened.bank.base.device),
        "task": opened.task,
        "data": data,
        **asked.scores.as_dict(),
        "seconds": asked.seconds,
        "examples_per_s": asked.scores.examples / asked.seconds,
    }
    if own:
        kept = ("loss", "perplexity", "token_accuracy")
        numbers["base"] = {name: value for name, value in base.scores.as_dict().items() if name in kept}
    return numbers


def _show(opened: Opened, data: str, own: _Measured | None, base: _Measured) -> None:
    rows = [_row("base alone", base)]
    if own:
        better = base.scores.loss - own.scores.loss
        rows += [
            _row("with the adapter", own),
            (
                "difference",
                f"{-better:+.4f}",
                f"{own.scores.perplexity - base.scores.perplexity:+,.2f}",
                f"{100 * (own.scores.token_accuracy - base.scores.token_accuracy):+.2f} pp",
                "",
            ),
        ]
    out = terminal.stdout()
    scores = base.scores
    out.print(
        f"{data}: {terminal.counted(scores.examples, 'example')}, {scores.labelled_tokens:,} labelled tokens; base "
        f"{opened.base_line}",
        soft_wrap=True,
    )
    out.print(terminal.table(("", "loss", "perplexity", "token accuracy", "examples/s"), rows))


def _row(name: str, measured: _Measured) -> tuple[str, ...]:
    scores = measured.scores
    return (
        name,
        terminal.loss(scores.loss),
        terminal.perplexity(scores.loss),
        f"{100 * scores.token_accuracy:.2f} %",
        f"{scores.examples / measured.seconds:.1f}",
    )
