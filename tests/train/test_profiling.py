"""Laws of a profile: it trains as the run does, its parts are the whole step, its products are those that torch counts."""

import gzip
import json
import re
from collections import Counter

import pytest
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

from onebase.config.reading import settings_from
from onebase.data.batches import batch_of_step
from onebase.errors import ConfigError
from onebase.measure.forward import batches_of
from onebase.ops import native
from onebase.train import step_parts
from onebase.train.job import start
from onebase.train.profiling import PROFILE_NAME, TRACE_NAME, profile_run
from onebase.train.progress import Quiet
from onebase.train.run import prepare
from onebase.train.step_parts import ADAPTER, ATTENTION, ELEMENTWISE, FROZEN, HEAD, PARTS, REST, STEP, marked, split
from tests.train import runs
from tests.train.runs import Watching, Workshop


def started(shop: Workshop, **sections):
    job, _ = prepare(shop.settings(**sections).resolved(), Quiet())
    return start(job, None, None, Quiet())


def profiled(member, steps=1):
    """Return the seconds of the steps, what their events are, and how they are split."""
    member.run_step()
    records = []
    with marked(member.bank.base.trunk), profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        for _ in range(steps):
            with record_function(STEP):
                records.append(member.run_step())
    events = found.events()
    return sum(record.seconds for record in records) / steps, events, split(events, on_device=False)


def by_part(found, value):
    sums: Counter[str] = Counter()
    for line in found:
        sums[line.part] += getattr(line, value)
    return sums


def test_the_parts_are_the_whole_step_and_nothing_is_counted_twice(shop: Workshop) -> None:
    seconds, events, found = profiled(started(shop, train={"steps": 9}), steps=3)
    assert sum(line.seconds for line in found) == pytest.approx(seconds, rel=0.05)  # by a clock of Python's
    # what is left by subtraction is what torch says of time in which no operation ran
    idle = [e for e in events if e.name == STEP or (e.name.startswith("onebase: part ") and "batching" not in e.name)]
    rest = by_part(found, "seconds")[REST]
    assert rest == pytest.approx(sum(e.self_cpu_time_total for e in idle) / 3e6, rel=1e-6)
    assert set(PARTS) == {line.part for line in found} and min(line.seconds for line in found) > 0


@pytest.mark.parametrize("recompute", [False, True])
def test_products_are_those_that_torch_counts(shop: Workshop, recompute: bool) -> None:
    member = started(shop, train={"steps": 9, "batch_size": 2})
    with member.bank.base.activation_checkpointing(recompute):
        _, _, found = profiled(member)
        member.books.step -= 1  # the same rows again
        with FlopCounterMode(display=False) as counter:
            member.run_step()
    counted = {
        name: count for name, count in counter.get_flop_counts()["Global"].items() if "attention" not in str(name)
    }
    flop = by_part(found, "flop")
    assert flop[FROZEN] + flop[HEAD] == sum(counted.values()) > 0  # torch does not look into an operation of ours
    # forward r (in + out) multiply-adds a token, backward twice that; the forward again where it is recomputed. Nothing
    # below the first block's queries, keys and values wants a gradient, unless the block is recomputed: r in are spared
    tokens, pairs = tokens_of_step(member, member.books.step - 1), pairs_of(member)
    sizes = sum(A.shape[0] * (A.shape[1] + B.shape[0]) for A, B in pairs.values())
    spared = sum(A.numel() for name, (A, _) in pairs.items() if re.search(r"layers\.0\..*[qkv]_proj", name))
    assert flop[ADAPTER] == 2 * tokens * (4 * sizes if recompute else 3 * sizes - spared)


def tokens_of_step(member, step):
    numbers = batch_of_step(len(member.examples), step, member.settings.batch_size, member.settings.seed).tolist()
    batches = batches_of(member.bank, member.adapter.name, member.examples, numbers, member.budget_tokens)
    return sum(batch.layout.token_count for batch in batches)


def pairs_of(member):
    state = member.adapter.state
    return {name: (A, state[name.replace("lora_A", "lora_B")]) for name, A in state.items() if "lora_A" in name}


def test_every_operation_goes_to_the_part_that_it_is_of(shop: Workshop) -> None:
    """Held against where the names of operations must lie."""
    member = started(shop, train={"steps": 9})
    _, events, _ = profiled(member)
    makers = step_parts.makers_of(events)
    where: dict[str, set] = {}
    for event in events:
        where.setdefault(event.name, set()).add(step_parts.part_of(event, makers))
    forward, backward = ["aten::silu"], ["aten::silu_backward", "RsqrtBackward0"]
    flash = "aten::_scaled_dot_product_flash_attention_for_cpu"
    attend, attend_back = [flash], [f"{flash}_backward", "_SlotsBackward", "_RowsBackward"]
    if native.in_use():
        forward, backward = ["_SwiGlu", "_RmsNorm"], ["_SwiGluBackward", "_RmsNormBackward"]
        attend, attend_back = ["_Attention"], ["_AttentionBackward"]
    only = {
        "aten::embedding": (step_parts.EMBEDDING, "forward"),
        **dict.fromkeys(attend, (ATTENTION, "forward")),
        **dict.fromkeys(attend_back, (ATTENTION, "backward")),
        "MmBackward0": (FROZEN, "backward"),
        "_AddLowRank": (ADAPTER, "forward"),
        "_AddLowRankBackward": (ADAPTER, "backward"),
        **dict.fromkeys(forward, (ELEMENTWISE, "forward")),
        **dict.fromkeys(backward, (ELEMENTWISE, "backward")),
        **({} if native.in_use() else {"aten::_log_softmax": (HEAD, "")}),
        "_HeadLossBackward": (HEAD, ""),
        "aten::_fused_adamw_": (step_parts.OPTIMISER, ""),
        "aten::linalg_vector_norm": (step_parts.OPTIMISER, ""),
    }
    assert {name: where.get(name) for name in only} == {name: {part} for name, part in only.items()}
    assert where["aten::linear"] == {(FROZEN, "forward"), (HEAD, "")}
    adapter = {(ADAPTER, "forward"), (ADAPTER, "backward")}
    assert where["aten::mm"] == {(FROZEN, "forward"), (FROZEN, "backward"), (HEAD, "")} | (
        set() if native.in_use() else adapter
    )


@pytest.mark.parametrize("adapter", [{"method": "ia3"}, {"method": "lora", "use_dora": True}, {"method": "full"}])
def test_what_other_methods_add_is_the_adapters(shop: Workshop, adapter) -> None:
    values = shop.values(train={"steps": 9})
    values["adapter"] = adapter
    job, _ = prepare(settings_from(values).resolved(), Quiet())
    _, _, found = profiled(start(job, None, None, Quiet()))
    parts = by_part(found, "seconds")
    assert parts[ADAPTER] > 0
    flop = by_part(found, "flop")
    # the layers that `full` trains are no frozen ones
    assert (flop[FROZEN] == 0 < flop[ADAPTER]) if adapter["method"] == "full" else flop[FROZEN] > 0


def test_a_profile_learns_what_the_run_learns_and_leaves_it_alone(shop: Workshop, tmp_path) -> None:
    settings = shop.settings(train={"steps": 12}, valid=False)
    watching, ordinary = Watching(), Watching()
    runs.run(settings, tmp_path / "run", watching=ordinary)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    found = profile_run(settings, tmp_path / "run", watching)
    assert [(r.step, r.loss, r.grad_norm) for r in watching.steps] == [
        (r.step, r.loss, r.grad_norm) for r in ordinary.steps[: len(watching.steps)]
    ]
    assert found.losses == found.profiled_losses == tuple(r.loss for r in watching.steps[-found.steps :])
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    assert 0 < found.floor_seconds < found.seconds
    folder = tmp_path / "run-profile"
    assert {path.name for path in folder.iterdir()} == {PROFILE_NAME, TRACE_NAME}
    written = json.loads((folder / PROFILE_NAME).read_text())
    assert sum(line["seconds"] for line in written["lines"]) == pytest.approx(written["profiled_seconds"])
    trace = json.loads(gzip.decompress((folder / TRACE_NAME).read_bytes()))
    assert sum(event.get("name") == STEP and event["ph"] == "X" for event in trace["traceEvents"]) == found.steps


def test_memory_is_what_the_tensors_weigh(shop: Workshop, tmp_path) -> None:
    found = profile_run(shop.settings(train={"steps": 12}), tmp_path / "run", Quiet())
    member = started(shop, train={"steps": 12})
    trained = 4 * member.adapter.parameter_count
    assert found.memory.base == 4 * member.bank.base.parameter_count + buffers_of(member.bank.base.model)
    assert (found.memory.adapter, found.memory.gradients) == (trained, trained)
    assert 2 * trained < found.memory.optimizer < 2 * trained + 8 * len(member.parameters) + 1
    assert found.memory.gradients < found.memory.step < found.memory.peak
    assert found.tokens * found.steps == pytest.approx(sum(tokens_of_step(member, step) for step in (3, 4, 5)))


def buffers_of(model):
    return sum({b.data_ptr(): b.numel() * b.element_size() for b in model.buffers()}.values())


@pytest.mark.slow
def test_a_larger_micro_batch_takes_more_memory_in_a_step(shop: Workshop, tmp_path) -> None:
    whole, cut = (
        profile_run(shop.settings(train={"steps": 12, "micro_batch_tokens": n}), tmp_path / f"{n}", Quiet())
        for n in (1000, 60)
    )
    assert cut.micro_batches > whole.micro_batches == 1
    assert cut.memory.step < 0.75 * whole.memory.step


def test_what_cannot_be_profiled_is_refused_before_anything_is_written(shop: Workshop, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"takes 6 steps, these settings make 4\. .*--set train.steps=6"):
        profile_run(shop.settings(train={"steps": 4}), tmp_path / "run", Quiet())
    assert not list(tmp_path.iterdir())
    (tmp_path / "run-profile").mkdir()
    (tmp_path / "run-profile/mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"mine\.txt, which is none of an earlier profile"):
        profile_run(shop.settings(train={"steps": 12}), tmp_path / "run", Quiet())
    assert (tmp_path / "run-profile/mine.txt").read_text() == "mine"


@pytest.mark.gpu
def test_on_a_gpu_the_parts_are_kernels_and_their_pauses(shop: Workshop, tmp_path) -> None:
    found = profile_run(shop.settings("device=cuda", train={"steps": 12}), tmp_path / "run", Quiet())
    assert sum(line.seconds for line in found.lines) == pytest.approx(found.profiled_seconds)
    assert min(line.seconds for line in found.lines) >= 0
    assert {ATTENTION, FROZEN, ADAPTER, ELEMENTWISE, HEAD} < {line.part for line in found.lines if line.seconds}
    assert 0 < found.memory.step < found.memory.peak
