"""`onebase train --profile`: some steps of a run under torch's profiler, and where their time and memory went.

The steps are those that the run itself would do, on its rows and from its first step; what is learned is thrown away.
After the warm-up comes one for memory alone, because counting takes time; then a few that are timed, and the same again
under the profiler, whose own cost (some 3 us an operation) shows as the difference. `profile.json` and the trace (for
ui.perfetto.dev) go into a folder of their own, which is no run. On a GPU the time is that of its kernels.
"""

from __future__ import annotations

import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

import onebase
from onebase.base import memory
from onebase.base.device import use_threads
from onebase.config.settings import Settings
from onebase.data.batches import batch_of_step
from onebase.errors import ConfigError
from onebase.files.atomic import ensure_writable, new_folder, write_synced
from onebase.files.json_file import to_json
from onebase.measure.forward import batches_of
from onebase.train.job import start
from onebase.train.member import Member
from onebase.train.progress import Progress, StepRecord
from onebase.train.run import prepare
from onebase.train.step_parts import STEP, Line, marked, split

WARM_UP_STEPS, PROFILED_STEPS = 2, 3
PROFILE_NAME, TRACE_NAME = "profile.json", "trace.json.gz"
_ALL_STEPS = WARM_UP_STEPS + 1 + PROFILED_STEPS
_SCHEMA_VERSION = 1
_TRACE_BYTES = 100_000_000
_MEASURING_SECONDS = 0.5
Product = tuple[int, int, int]
_WEIGHTS = 8  # a step reads the weights of other layers before it comes back to one: it lies in no cache


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes: what always stands, the most that a step holds beyond it, and the peak of it all.

    `step` is activations, and gradients as they come. `peak` is the process's on a CPU, with Python and the libraries;
    on a GPU it is what torch held there.
    """

    base: int
    adapter: int
    optimizer: int
    gradients: int
    step: int
    peak: int


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Where a mean step's time and memory went.

    The same steps are timed twice: `seconds` without the profiler, and `profiled_seconds`, the sum of the lines, with it.
    """

    model: str
    dtype: str
    device: str
    threads: int
    torch: str
    onebase: str
    steps: int
    seconds: float
    profiled_seconds: float
    lines: tuple[Line, ...]
    tokens: float
    """Computed in a step, virtual ones included and shared prefixes once."""
    micro_batches: float
    largest_micro_batch_tokens: int
    flop: int
    """In matrix products; a multiply-add is two."""
    product: Product
    """The most usual one in the base's layers for a micro-batch: rows, inner size and columns."""
    flop_per_s: float
    """The best that this machine reached at products of that size alone."""
    memory: Memory
    losses: tuple[float, ...]
    profiled_losses: tuple[float, ...]

    @property
    def floor_seconds(self) -> float:
        """What a step's products would take at the rate measured."""
        return self.flop / self.flop_per_s


def profile_folder(out: Path) -> Path:
    """Return where the profile of the run `out` goes.

    Raises:
        ConfigError: something else is there.
    """
    if not out.name or out.name == "..":
        raise ConfigError(f"--out {out}: a profile goes beside a folder with a name. Give --out one, as runs/NAME.")
    folder = out.with_name(f"{out.name}-profile")
    if folder.is_dir():
        others = sorted({path.name for path in folder.iterdir()} - {PROFILE_NAME, TRACE_NAME})
        if others:
            raise ConfigError(
                f"{folder}: is where the profile goes, but holds {others[0]}, which is none of an earlier profile. Move it "
                "away, or name another --out."
            )
    return folder


def profile_run(settings: Settings, out: Path, progress: Progress) -> Profile:
    """Return where the time and memory of a run's steps go; nothing is written to `out` itself.

    Raises:
        OnebaseError: whatever would be wrong with the run; fewer steps than a profile takes; a device without times.
    """
    os.environ.setdefault(
        "KINETO_LOG_LEVEL", "6"
    )  # or torch's profiler says on standard error that it starts and stops
    settings = settings.resolved()
    folder = profile_folder(out)
    ensure_writable(folder, _TRACE_BYTES, writing="the profile")
    use_threads(settings.train.threads)
    job, _ = prepare(settings, progress)
    base = job.bank.base
    if base.device.type not in ("cpu", "cuda"):
        raise ConfigError(
            f"device: torch's profiler has no times of {base.device.type}. Profile on the CPU: --set device=cpu"
        )
    member = start(job, None, None, progress)
    if member.schedule.total_steps < _ALL_STEPS:
        raise ConfigError(
            f"train.steps: a profile takes {_ALL_STEPS} steps, these settings make {member.schedule.total_steps}. Profile "
            f"with more: --set train.steps={_ALL_STEPS}"
        )
    recomputing = base.activation_checkpointing(job.settings.activation_checkpointing)
    with job.bank.learning(job.adapter.name), recomputing, new_folder(folder, writing="the profile") as hidden:
        found = _profile(member, progress, hidden / TRACE_NAME)
        content = {"schema_version": _SCHEMA_VERSION, "floor_seconds": found.floor_seconds, **asdict(found)}
        write_synced(hidden / PROFILE_NAME, to_json(content))
    return found


def _profile(member: Member, progress: Progress, trace: Path) -> Profile:
    base, seconds, losses = member.bank.base, [], []
    for _ in range(WARM_UP_STEPS):
        progress.stepped(member.run_step())
    member.optimizer.zero_grad()  # as a step begins: what it frees of an earlier one would not be seen
    step_bytes, peak_bytes = _memory_of(lambda: progress.stepped(member.run_step()), base.device)
    member.check_moved()
    tokens = _micro_batch_tokens(member)
    tensors, books = member.state()
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    product = _largest_product(base.trunk, round(sum(tokens) / len(tokens)))
    numbers = torch.int8 if base.quantize == "int8" else base.dtype
    rate = measured_flop_per_s(product, numbers, base.device)
    for _ in range(PROFILED_STEPS):
        began = time.perf_counter()
        record = _run_step(member)
        seconds.append(time.perf_counter() - began)
        losses.append(record.loss)
        progress.stepped(record)
    member.load_state(before, books, None)
    rate = max(rate, measured_flop_per_s(product, numbers, base.device))
    lines, again = _profiled(member, trace)
    return Profile(
        model=base.name,
        dtype=base.format,
        device=str(base.device),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        onebase=onebase.__version__,
        steps=PROFILED_STEPS,
        seconds=statistics.mean(seconds),
        profiled_seconds=sum(line.seconds for line in lines),
        lines=lines,
        tokens=sum(tokens) / PROFILED_STEPS,
        micro_batches=len(tokens) / PROFILED_STEPS,
        largest_micro_batch_tokens=max(tokens),
        flop=sum(line.flop for line in lines),
        product=product,
        flop_per_s=rate,
        memory=Memory(
            base=_bytes([*base.model.parameters(), *base.model.buffers()]),
            adapter=_bytes(member.adapter.state.values()),
            gradients=_bytes(p.grad for p in member.parameters if p.grad is not None),
            optimizer=member.optimizer_bytes,
            step=step_bytes,
            peak=peak_bytes,
        ),
        losses=tuple(losses),
        profiled_losses=again,
    )


def _profiled(member: Member, trace: Path) -> tuple[tuple[Line, ...], tuple[float, ...]]:
    """Return where the member's next steps go, and their losses; write their trace."""
    base, losses = member.bank.base, []
    on_device = base.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_device else [])]
    with marked(base.trunk), profile(activities=activities, record_shapes=True) as found:
        for _ in range(PROFILED_STEPS):
            with record_function(STEP):
                losses.append(_run_step(member).loss)
    found.export_chrome_trace(str(trace))
    return split(found.events(), on_device=on_device), tuple(losses)


def _run_step(member: Member) -> StepRecord:
    """Do a step, and wait until its device is done with it."""
    record = member.run_step()
    if member.bank.base.device.type == "cuda":
        torch.cuda.synchronize(member.bank.base.device)
    return record


def _micro_batch_tokens(member: Member) -> list[int]:
    """Return the tokens that each micro-batch of the steps to be profiled computes."""
    settings, count, tokens = member.settings, len(member.examples), []
    for step in range(member.books.step, member.books.step + PROFILED_STEPS):
        numbers = batch_of_step(count, step, settings.batch_size, settings.seed, member.shuffle).tolist()
        batches = batches_of(member.bank, member.adapter.name, member.examples, numbers, member.budget_tokens)
        tokens += [batch.layout.token_count for batch in batches]
    return tokens


def _memory_of(step: Callable[[], None], device: torch.device) -> tuple[int, int]:
    """Return the most bytes that a step holds beyond what stands before it, and the peak of process or device."""
    if device.type == "cuda":
        memory.reset_peak_device_bytes(device)
        before = torch.cuda.memory_allocated(device)
        step()
        peak = memory.peak_device_bytes(device)
        return peak - before, peak
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    assert found.profiler is not None and found.profiler.kineto_results is not None
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most, memory.peak_rss_bytes()


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the tensors, shared ones once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _largest_product(trunk: nn.Module, rows: int) -> Product:
    """Return the product of rows with the size of weight that most of a model's numbers, embeddings apart, are in."""
    numbers: Counter[tuple[int, int]] = Counter()
    for module in trunk.modules():
        sides = getattr(module, "in_features", None), getattr(module, "out_features", None)
        if isinstance(sides[0], int) and isinstance(sides[1], int):  # in 8 or 4 bits, too
            numbers[sides[0], sides[1]] += sides[0] * sides[1]
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.dim() == 2 and not isinstance(module, nn.Embedding):
                columns, inner = parameter.shape
                numbers[inner, columns] += parameter.numel()
    inner, columns = max(numbers, key=numbers.__getitem__)
    return rows, inner, columns


def measured_flop_per_s(size: Product, dtype: torch.dtype, device: torch.device) -> float:
    """Return the best rate of products of rows with a layer's weight, as a forward makes them, a multiply-add being two.

    The best, because other programs on the machine can only make it less.
    """
    rows, inner, columns = size
    x = torch.linspace(-1, 1, rows * inner, device=device).view(rows, inner).to(dtype)
    weight = torch.linspace(-1, 1, columns * inner, device=device).view(columns, inner).to(dtype)
    weights = [weight.clone() for _ in range(_WEIGHTS)]
    multiply = torch._int_mm if dtype is torch.int8 else torch.mm
    groups = [weights] if device.type == "cuda" else [[weight] for weight in weights]  # starting a kernel takes time
    taken: list[float] = []
    while sum(taken) < _MEASURING_SECONDS or len(taken) < 2 * _WEIGHTS:
        for group in groups:
            began = time.perf_counter()
            for weight in group:
                multiply(x, weight.T)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken.append((time.perf_counter() - began) / len(group))
    return 2 * rows * inner * columns / min(taken)
