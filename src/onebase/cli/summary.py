"""What a training is about to do, and what came of it, as tables."""

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from onebase.cli import terminal
from onebase.cli.scores import TOKEN_TASKS, named

if TYPE_CHECKING:
    from rich.console import Console

    from onebase.cli.scores import Judged
    from onebase.config.methods import AdapterSettings
    from onebase.config.settings import Settings
    from onebase.files.result import Result
    from onebase.train.progress import Plan


def show_plan(out: "Console", plan: "Plan", settings: "Settings") -> None:
    """Print what is about to be trained, and what it costs beside full fine-tuning."""
    out.print(terminal.facts(_facts(plan, settings)))
    out.print()
    out.print(_costs(plan, settings.adapter.title))
    for warning in plan.warnings:
        out.print(terminal.warning(warning), soft_wrap=True)
    out.print()


def _facts(plan: "Plan", settings: "Settings") -> Iterator[tuple[str, str]]:
    threads = f", {terminal.counted(plan.threads, 'thread')}" if plan.device == "cpu" else ""
    yield (
        "base",
        f"{plan.model}: {terminal.amount(plan.total_parameters)} parameters, {plan.dtype} on {plan.device}{threads}, {plan.layout}",
    )
    yield "adapter", describe_adapter(settings.adapter)
    done = f", {plan.first_step:,} of them done before" if plan.first_step else ""
    yield (
        "steps",
        f"{plan.steps:,}, each of {terminal.counted(plan.batch_size, 'row')}{done}; micro-batches of at most {plan.micro_batch_tokens:,} tokens",
    )
    yield "learning rate", _learning_rate(plan, settings)


_ALWAYS_SHOWN = ("r", "lora_alpha", "placement", "reduction_factor", "num_virtual_tokens", "prompt_tuning_init")


def describe_adapter(adapter: "AdapterSettings") -> str:
    """Return an adapter's settings in a line: its method, what gives its size, and what is not the default."""
    parts: list[str] = [adapter.method]
    targets = ""
    for name, value in adapter:
        if name == "target_modules":
            targets = "" if value is None else f", on {value if isinstance(value, str) else ', '.join(value)}"
        elif name in _ALWAYS_SHOWN or (name not in ("method", "init_from") and value != _default(adapter, name)):
            parts.append(name if value is True else f"{name} {_plainly(value)}")
    return ", ".join(parts) + targets


def _default(adapter: "AdapterSettings", name: str) -> object:
    return type(adapter).model_fields[name].get_default(call_default_factory=True, validated_data={})


def _plainly(value: object) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(str, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _learning_rate(plan: "Plan", settings: "Settings") -> str:
    adapter, schedule = settings.adapter, settings.train.lr_scheduler_type
    is_default = plan.learning_rate == adapter.usual_learning_rate
    origin = f"the default for {adapter.method}" if is_default else "train.learning_rate"
    warm_up = f", after {terminal.counted(plan.warmup_steps, 'step')} of warm-up" if plan.warmup_steps else ""
    return f"{plan.learning_rate:g} ({origin}), {schedule}{warm_up}"


def _costs(plan: "Plan", title: str) -> terminal.Trimmed:
    """Return the table of what this training needs and what full fine-tuning would."""
    total = plan.total_parameters
    share = terminal.percent(plan.trainable_parameters / total)
    rows = (
        ("trainable parameters", f"{plan.trainable_parameters:,}", f"{total:,}"),
        ("share of the base", share, "100 %"),
        ("gradients", terminal.size(plan.gradient_bytes), terminal.size(plan.full_parameter_bytes)),
        ("optimiser state", terminal.size(plan.optimizer_bytes), terminal.size(plan.full_optimizer_bytes)),
        ("file", terminal.size(plan.adapter_bytes), terminal.size(plan.full_parameter_bytes)),
    )
    return terminal.table(("", title, "full fine-tuning"), rows)


def show_result(out: "Console", result: "Result", scores: Mapping[int, "Judged"], run: Path, task: str) -> None:
    """Print the loss before and after, what it took, where the adapter is, and what to type next."""
    out.print()
    if result.valid_loss is not None and result.valid_loss_before is not None:
        out.print(_before_and_after(result, scores, task))
        out.print()
    memory = f"{terminal.size(result.peak_rss_bytes)} of memory at most"
    if result.peak_device_bytes:
        memory += f", {terminal.size(result.peak_device_bytes)} on the device"
    kept = f" (of step {result.best_step:,}, the best)" if result.best_step not in (None, result.steps) else ""
    out.print(
        terminal.facts(
            (
                ("steps", f"{result.steps:,}, mean training loss {terminal.loss(result.train_loss)}"),
                (
                    "time",
                    f"{terminal.duration(result.seconds)}: {result.examples_per_s:.2f} examples/s, "
                    f"{result.tokens_per_s:,.0f} tokens/s",
                ),
                ("memory", memory),
                ("adapter", f"{run / 'adapter'}, {terminal.size(result.adapter_bytes)}{kept}"),
            )
        )
    )
    out.print()
    place = shlex.quote(str(run))
    out.print(f"measure it:  onebase eval {place} --data FILE", soft_wrap=True)
    if task in TOKEN_TASKS:
        out.print(f"talk to it:  onebase chat {place}", soft_wrap=True)
    else:
        out.print(f"use it:      onebase predict {place} --data FILE", soft_wrap=True)


def _before_and_after(result: "Result", scores: Mapping[int, "Judged"], task: str) -> terminal.Trimmed:
    """Return the table of the validation rows' scores; accuracies of evaluations in an earlier process are not known."""
    last = result.best_step if result.best_step is not None else result.steps
    if 0 in scores and last in scores:
        ends = dict(named(scores[last]))  # a metric may be undefined at one of the two
        rows = [(name, value, ends.get(name, "-")) for name, value in named(scores[0])]
    else:
        before, after = result.valid_loss_before, result.valid_loss
        rows = [("loss", terminal.loss(before), terminal.loss(after))]
        rows += [("perplexity", terminal.perplexity(before), terminal.perplexity(after))] * (task in TOKEN_TASKS)
    return terminal.table(("on data.valid", "before", "after"), rows)
