"""What holds for tiny models holds for the packaged one, on rows that people write: `make test` without a GPU."""

import gc
import hashlib
import itertools
import os
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
import transformers

from onebase import api
from onebase.adapters.bank import Bank
from onebase.base import pretrained
from onebase.base.fingerprint import fingerprint_of_state
from onebase.base.model import Base, load
from onebase.config.methods import BitFit, Full, Lora
from onebase.config.reading import settings_from
from onebase.config.settings import DataPart, DataSettings
from onebase.data.batches import FlatBatch, flatten
from onebase.data.reading import read_rows
from onebase.errors import TargetError
from onebase.measure.forward import batches_of, forward_loss
from onebase.ops.bits import VARIABLE, instruction_set
from onebase.ops.segments import Segments
from onebase.train.data import load_rows
from onebase.train.stop import Stopped
from tests import families, tiny
from tests.base.tiny import hush
from tests.train import runs

pytestmark = pytest.mark.slow

MODEL = "smollm2-135m-instruct"
ROWS = Path(__file__).parents[2] / "examples" / "data"


@pytest.fixture(scope="module", autouse=True)
def few_threads():
    """SmolLM2's activations are 1536 wide, a multiple of 32 x threads for 1 and 2 (LOG.md, "Reproducible bits")."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(2, before))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base() -> Base:
    """The model as it lies in this machine's cache, fetched and converted if it is not there; at most one bank is on it."""
    pretrained.locate(MODEL, say=hush)
    return load(MODEL, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def examples(base):
    """Four rows of the sample data, of different lengths."""
    rows = itertools.islice(read_rows(ROWS / "define-valid.jsonl"), 4)
    made = load_rows(
        [dict(row.values) for row in rows], DataSettings(train=(DataPart(path="rows"),)), "chat", base
    ).examples
    assert len(set(made.lengths.tolist())) > 2
    return made


@pytest.fixture
def bank(base):
    """A bank of its own, taken off again."""
    made = Bank(base)
    yield made
    for name in made.adapters:
        made.remove(name)


class Taught(NamedTuple):
    """An adapter after three steps, written; and the base's bytes before and after, in memory and on disk."""

    adapter: Path
    before: tuple[str, str]
    after: tuple[str, str]


@pytest.fixture(scope="module")
def taught(base, tmp_path_factory) -> Taught:
    rows = [dict(row.values) for row in itertools.islice(read_rows(ROWS / "define-train.jsonl"), 6)]
    before = bytes_of(base)
    bank = api.Bank(base)
    bank.add("definitions", Lora(r=4, lora_alpha=8))
    api.train(bank, {"definitions": api.Job(data=rows, batch_size=2, steps=3, learning_rate=1e-3)})
    folder = bank.save("definitions", tmp_path_factory.mktemp("taught") / "adapter")
    bank.remove("definitions")
    return Taught(folder, before, bytes_of(base))


def bytes_of(base: Base) -> tuple[str, str]:
    assert base.folder is not None
    with (base.folder / "model.safetensors").open("rb") as file:  # file_sha256 trusts size and time
        return fingerprint_of_state(base.model), hashlib.file_digest(file, "sha256").hexdigest()


def theirs(base: Base, dtype: torch.dtype, adapter: Path | None = None):
    """Return the model as transformers alone opens it, with peft's adapter on it if one is named."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base.folder, dtype=dtype).eval()
    return model if adapter is None else peft.PeftModel.from_pretrained(model, adapter).eval()


@torch.no_grad()
def one_by_one(model, examples) -> torch.Tensor:
    """Return the model's own logits of every token, each row run alone: no padding, no mask."""
    ids = [torch.from_numpy(example.token_ids.astype("int64"))[None] for example in examples]
    return torch.cat([model(input_ids=row, use_cache=False).logits[0].double() for row in ids])


def check_is_as_true_as_theirs(own: torch.Tensor, base: Base, examples, adapter: Path | None = None) -> None:
    """Logits reach 36 and thirty layers round: what is fp32's own error here is what transformers' fp32 makes of fp64's."""
    single, double = (one_by_one(theirs(base, dtype, adapter), examples) for dtype in (torch.float32, torch.float64))
    error = float((single - double).abs().max())
    assert 1e-5 < error < 3e-4
    torch.testing.assert_close(own.double(), double, rtol=0.0, atol=1.5 * error)


@torch.no_grad()
def logits(bank: Bank, batch: FlatBatch) -> torch.Tensor:
    hidden = bank.base.hidden(batch.token_ids, bank.route(batch.layout))
    return bank.head.logits(hidden, Segments.of([len(hidden)], [-1]))


def test_flat_logits_of_real_rows_equal_the_models_own(bank, examples):
    assert bank.base.layout_kind == "flat"
    flat = logits(bank, flatten(list(examples), range(len(examples)), None))
    check_is_as_true_as_theirs(flat, bank.base, examples)


def test_a_fresh_adapter_changes_no_bit(bank, examples):
    alone = logits(bank, flatten(list(examples), range(len(examples)), None))
    bank.add("fresh", Lora())
    assert torch.equal(logits(bank, flatten(list(examples), range(len(examples)), "fresh")), alone)


def test_a_row_together_with_others_equals_the_row_alone_bit_for_bit(bank, examples):
    if instruction_set() in ("AVX512", "AVX2"):
        assert os.environ.get(VARIABLE, "").endswith("STRICT"), "tests must import onebase before torch"
    for number, name in enumerate(("one", "two")):
        tiny.fill_(bank.add(name, Lora(r=4 + number, lora_alpha=8)), seed=number, size=0.02)
    batch = tiny.batch_of(examples, "one", "two", None, "one")
    together = logits(bank, batch).split(examples.lengths.tolist())
    losses = losses_of(bank, batch).split([node.labels for node in batch.layout.nodes])
    plain = logits(bank, tiny.batch_of(examples, None)).split(examples.lengths.tolist())
    for number, node in enumerate(batch.layout.nodes):
        alone = flatten([examples[number]], [number], node.owner)
        assert torch.equal(together[number], logits(bank, alone)[0 : node.length])
        assert torch.equal(losses[number], losses_of(bank, alone))
        assert torch.equal(together[number], plain[number]) is (node.owner is None)


def test_every_method_in_one_mixed_batch_equals_itself_alone(bank, base, examples):
    """Two rows of each method, all methods in one forward and backward; and each alone, in the same bank."""
    for seed, (label, (kind, settings)) in enumerate(families.variants().items()):
        if kind is not Full:  # a copy of the whole model
            try:
                families.perturb_(bank.add(label, kind(**settings), seed=seed), seed, size=0.01)
            except TargetError:
                assert kind is BitFit or settings.get("bias")  # SmolLM2 has no biases
    bank.add("full", Full(target_modules=["layers.3.mlp.down_proj", "layers.7.input_layernorm"]), seed=99)
    families.perturb_(bank.adapters["full"], 99, size=0.01)
    members: list[str | None] = [*bank.adapters, None]
    together = by_method(bank, examples, members)
    plain = by_method(bank, examples, [None])[None][0]
    for member in members:
        rows, gradients = together[member]
        alone, own = by_method(bank, examples, [member])[member]
        assert float((rows - alone).abs().max()) <= 1e-4, member
        assert (member is None) is torch.equal(alone, plain), f"{member} changes nothing"
        for key, gradient in own.items():
            size = float(gradient.abs().max())
            assert size > 0, f"no gradient reaches {key}"
            off = float((gradients[key] - gradient).abs().max())
            assert off <= 1e-3 * size, f"{member}: the gradient of {key} is off by {off:.1e} of {size:.1e}"


def by_method(bank: Bank, examples, members) -> dict[Any, tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Return, for each of the owners of one batch, the losses of its rows (two examples each) and its gradients."""
    tiny.clear_gradients(bank)
    pieces = [next(batches_of(bank, member, examples, [0, 1], 10**6)) for member in members]
    loss, rows = forward_loss(bank, families.joined(pieces), 1e-2)
    if loss.requires_grad:
        loss.backward()
    losses = rows.loss.detach().split([piece.label_count for piece in pieces])
    return {
        member: (own, {} if member is None else tiny.gradients(bank, member))
        for member, own in zip(members, losses, strict=True)
    }


@torch.no_grad()
def losses_of(bank: Bank, batch: FlatBatch) -> torch.Tensor:
    return forward_loss(bank, batch, 1.0)[1].loss


def test_training_changes_no_byte_of_the_base(taught):
    assert taught.after == taught.before


def test_peft_opens_what_was_trained_and_gives_equal_logits(taught, base, examples):
    bank = api.Bank(base)
    plain = logits(bank.routed, flatten(list(examples), range(len(examples)), None))
    bank.load("definitions", taught.adapter)
    own = logits(bank.routed, flatten(list(examples), range(len(examples)), "definitions"))
    bank.remove("definitions")
    assert (own - plain).abs().max() > 0.1  # three steps are seen, far above what is allowed
    check_is_as_true_as_theirs(own, base, examples, taught.adapter)


def test_stopped_and_resumed_equals_never_stopped(tmp_path):
    values = {
        "model": MODEL,
        "dtype": "float32",
        "device": "cpu",
        "data": {"train": str(tmp_path / "train.jsonl")},
        "adapter": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1},
        "train": {"steps": 3, "batch_size": 2, "learning_rate": 1e-3},
    }
    lines = (ROWS / "define-train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(lines[:4]), encoding="utf-8")  # the second epoch begins at step 3
    settings = settings_from(values)
    runs.run(settings, tmp_path / "whole")
    gc.collect()  # the run's base is part of cycles
    with pytest.raises(Stopped):
        runs.run(settings, tmp_path / "halved", watching=runs.Watching(stop_after={2}))
    gc.collect()
    runs.run(settings, tmp_path / "halved", resume=True)
    gc.collect()
    assert runs.adapter_bytes(tmp_path / "halved") == runs.adapter_bytes(tmp_path / "whole")
    assert runs.metrics(tmp_path / "halved") == runs.metrics(tmp_path / "whole")
