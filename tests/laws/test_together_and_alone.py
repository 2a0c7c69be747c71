"""Together equals alone: neighbours, other adapters and the cut into micro-batches change no result, on CPU no bit."""

import os

import pytest
import torch

from onebase.data.batches import FlatBatch, flatten, micro_batches
from onebase.measure.forward import forward_loss
from onebase.ops.bits import VARIABLE, instruction_set
from onebase.ops.layout import Layout, Node
from tests import tiny

FLAT = sorted({*tiny.ARCHITECTURES} - tiny.PADDED)
# The shape of the routed experts' products depends on how many rows each gets, which MKL's strict mode covers too.
LENGTHS = {"one": (7, 20, 33), "two": (5, 16, 17, 40)}


def batch_with(*owners, dropout_example=0):
    """Return the examples of these members, member by member; what a member gets does not depend on the others."""
    pieces = []
    for owner in owners:
        examples = tiny.examples_of(*LENGTHS[owner], seed=len(owner) + ord(owner[0]))
        numbers = range(dropout_example, dropout_example + len(examples))
        pieces.append(flatten(list(examples), numbers, owner))
    return joined(pieces)


def joined(pieces):
    starts = torch.tensor([0, *(len(piece.token_ids) for piece in pieces)]).cumsum(0).tolist()
    return FlatBatch(
        torch.cat([piece.token_ids for piece in pieces]),
        Layout([node for piece in pieces for node in piece.layout.nodes]),
        torch.cat([piece.label_rows + start for piece, start in zip(pieces, starts, strict=False)]),
        torch.cat([piece.label_ids for piece in pieces]),
        sum((piece.examples for piece in pieces), ()),
    )


def results(bank, batch, owner, **step):
    tiny.clear_gradients(bank)
    with torch.no_grad():
        hidden = bank.base.hidden(batch.token_ids, bank.route(batch.layout))
    owners = [node.owner == owner for node in batch.layout.nodes]
    hidden = torch.cat(
        [h for h, own in zip(hidden.split([n.length for n in batch.layout.nodes]), owners, strict=True) if own]
    )
    loss, rows = forward_loss(bank, batch, 1 / 37, **step)
    loss.backward()
    losses = torch.cat(
        [r for r, own in zip(rows.loss.split([n.labels for n in batch.layout.nodes]), owners, strict=True) if own]
    )
    return [hidden, losses, *tiny.gradients(bank, owner).values()]


@pytest.fixture(autouse=True)
def strict_bits():
    if instruction_set() in ("AVX512", "AVX2"):
        assert os.environ.get(VARIABLE, "").endswith("STRICT"), "tests must import onebase before torch"


@pytest.mark.parametrize("name", FLAT)
@pytest.mark.parametrize("place", ["first", "last"])
def test_a_members_rows_losses_and_gradients_are_byte_identical_together_and_alone(name, place):
    together = tiny.bank_of(tiny.base_of(name), "one", "two", lora_dropout=0.2)
    alone = tiny.bank_of(tiny.base_of(name), "one", lora_dropout=0.2, dummy=False)
    alone.adapters["one"].load_state_(together.adapters["one"].state)
    order = ("one", "two") if place == "first" else ("two", "one")
    found = results(together, batch_with(*order), "one", dropout_step=4)
    expected = results(alone, batch_with("one"), "one", dropout_step=4)
    for part, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(one, other), part


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"init_lora_weights": "pissa"}], ids=["dora", "pissa"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_what_goes_beyond_the_pair_is_byte_identical_together_and_alone_too(name, settings):
    together = tiny.bank_of(tiny.base_of(name), "one", "two", **settings)
    alone = tiny.bank_of(tiny.base_of(name), "one", dummy=False, **settings)
    alone.adapters["one"].load_state_(together.adapters["one"].state)
    found = results(together, batch_with("two", "one"), "one")
    expected = results(alone, batch_with("one"), "one")
    for part, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(one, other), part


@pytest.mark.parametrize("name", sorted(tiny.PADDED))
def test_padded_members_are_equal_together_and_alone_to_rounding(name):
    together = tiny.bank_of(tiny.base_of(name, dtype=torch.float64), "one", "two", lora_dropout=0.2)
    alone = tiny.bank_of(tiny.base_of(name, dtype=torch.float64), "one", lora_dropout=0.2, dummy=False)
    alone.adapters["one"].load_state_(together.adapters["one"].state)
    found = results(together, batch_with("two", "one"), "one", dropout_step=4)
    expected = results(alone, batch_with("one"), "one", dropout_step=4)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


def test_a_bank_of_many_equals_banks_of_one():
    names = [f"a{number}" for number in range(12)]
    many = tiny.bank_of(tiny.base_of(), *names, dummy=False)
    examples = tiny.examples_of(*range(3, 27, 2))
    batch = tiny.batch_of(examples, *names)
    forward_loss(many, batch, 0.1)[0].backward()
    hidden = many.base.hidden(batch.token_ids, many.route(batch.layout)).split(examples.lengths.tolist())
    for number, name in enumerate(names):
        own = tiny.bank_of(tiny.base_of(), *names[: number + 1], dummy=False)
        for other in names[:number]:
            own.remove(other)
        own.adapters[name].load_state_(many.adapters[name].state)
        single = tiny.batch_of(examples[number : number + 1], name)
        assert torch.equal(own.base.hidden(single.token_ids, own.route(single.layout)), hidden[number])
        forward_loss(own, single, 0.1)[0].backward()
        expected = tiny.gradients(own, name)
        assert all(torch.equal(g, expected[key]) for key, g in tiny.gradients(many, name).items())


@pytest.mark.parametrize("threads", [1, 2])
def test_every_length_gives_the_same_bits_whatever_stands_beside_it(threads):
    """Row counts from few to many, where products change their kernels."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        bank = tiny.bank_of(tiny.base_of(hidden_size=64, intermediate_size=192), "one", "two")
        probe = tiny.examples_of(19)
        single = tiny.batch_of(probe, "one")
        alone = bank.base.hidden(single.token_ids, bank.route(single.layout))
        for others in ([1], [2, 3], [16], [40, 5], [100, 128], [90, 77, 3], [128] * 5):
            neighbours = tiny.examples_of(*others, seed=4)
            first, last = tiny.batch_of(probe, "one"), tiny.batch_of(neighbours, "two")
            for order in ([first, last], [last, first]):
                both = joined(order)
                hidden = bank.base.hidden(both.token_ids, bank.route(both.layout))
                own = hidden[:19] if order[0] is first else hidden[-19:]
                assert torch.equal(own, alone), others
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------------ micro-batches


@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom"])
@pytest.mark.parametrize("budget", [1, 25, 60])
def test_micro_batches_add_up_to_one_large_batch(name, budget):
    bank = tiny.bank_of(tiny.base_of(name, dtype=torch.float64), "one", lora_dropout=0.3)
    examples = tiny.examples_of(9, 21, 4, 16, 13, 30)
    numbers = [4, 0, 2, 5, 1]
    weight = 1 / sum(int(examples[n].labelled.sum()) for n in numbers)

    def gradient(budget_tokens):
        tiny.clear_gradients(bank)
        batches = list(micro_batches(examples, numbers, budget_tokens, "one"))
        losses = [forward_loss(bank, batch, weight, dropout_step=2)[0] for batch in batches]
        for loss in losses:
            loss.backward()
        return len(batches), sum(loss.item() for loss in losses), tiny.gradients(bank, "one")

    pieces, loss, grads = gradient(budget)
    whole, large_loss, large = gradient(10**6)
    assert (whole, pieces > 1) == (1, True)
    assert loss == pytest.approx(large_loss, rel=1e-6)
    for key, tensor in large.items():
        torch.testing.assert_close(grads[key], tensor, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------------------ NaN isolation


def member_results(bank, batch, owner):
    tiny.clear_gradients(bank)
    loss, rows = forward_loss(bank, batch, 0.1)
    loss.backward()
    owners = [node.owner == owner for node in batch.layout.nodes]
    losses = rows.loss.split([node.labels for node in batch.layout.nodes])
    return [torch.cat([r for r, own in zip(losses, owners, strict=True) if own]), *tiny.gradients(bank, owner).values()]


@pytest.mark.parametrize("name", [*FLAT, *sorted(tiny.PADDED)])
@pytest.mark.parametrize("tensor", ["lora_A", "lora_B"])
def test_a_nan_in_one_members_weights_leaves_the_other_byte_identical(name, tensor):
    bank = tiny.bank_of(tiny.base_of(name), "one", "two")
    examples = tiny.examples_of(9, 21, 4, 16, 13)
    batch = tiny.batch_of(examples, "one", "two", "two", None, "one")
    clean = member_results(bank, batch, "one")
    other_clean = member_results(bank, batch, "two")
    for key, parameter in bank.adapters["two"].parameters():
        if tensor in key:
            parameter.data[0] = float("nan")
    dirty = member_results(bank, batch, "one")
    assert all(torch.equal(one, other) for one, other in zip(clean, dirty, strict=True))
    assert not any(part.isnan().any() for part in dirty)
    assert member_results(bank, batch, "two")[0].isnan().all()
    assert not other_clean[0].isnan().any()


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral", "bloom"])
def test_nan_tokens_of_one_member_leave_the_other_byte_identical(name):
    """A token whose embedding is NaN, as of a broken row in the base: only the member that has it is spoiled."""
    base = tiny.base_of(name)
    bank = tiny.bank_of(base, "one", "two")
    examples = tiny.examples_of(9, 21, 4, 16, 13, vocabulary=40)
    batch = tiny.batch_of(examples, "one", "two", "two", None, "one")
    rows = torch.arange(len(batch.token_ids))
    spoiled = FlatBatch(
        torch.where(rows == 12, 50, batch.token_ids), batch.layout, batch.label_rows, batch.label_ids, ()
    )
    clean = member_results(bank, spoiled, "one")
    hook = base.model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, out: torch.where((inputs[0] == 50)[..., None], float("nan"), out)
    )
    dirty = member_results(bank, spoiled, "one")
    assert all(torch.equal(one, other) for one, other in zip(clean, dirty, strict=True))
    assert member_results(bank, spoiled, "two")[0].isnan().any()
    hook.remove()


# --------------------------------------------------------------------------------------------------- keyed randomness


def dropped(bank, batch, step):
    return bank.base.hidden(batch.token_ids, bank.route(batch.layout, dropout_step=step))


def test_dropout_changes_with_step_seed_and_example_and_with_nothing_else():
    base = tiny.base_of()
    bank = tiny.bank_of(base, "one", lora_dropout=0.3)
    examples = tiny.examples_of(12, 12, 12)
    batch = tiny.batch_of(examples, "one")
    first = dropped(bank, batch, 5)
    assert torch.equal(first, dropped(bank, batch, 5))
    assert not torch.equal(first, dropped(bank, batch, 6))
    assert not torch.equal(first, bank.base.hidden(batch.token_ids, bank.route(batch.layout)))
    renumbered = [Node(n.length, n.owner, n.example + 1, n.parent, n.labels) for n in batch.layout.nodes]
    other = FlatBatch(batch.token_ids, Layout(renumbered), batch.label_rows, batch.label_ids, ())
    assert not torch.equal(first, dropped(bank, other, 5))
    pieces = [flatten([example], [number], "one") for number, example in enumerate(examples)]
    alone = torch.cat([dropped(bank, piece, 5) for piece in pieces])
    assert torch.equal(first, alone)
    assert torch.equal(
        first.flip(0),
        torch.cat([dropped(bank, joined(pieces[::-1]), 5)[24 - 12 * n : 36 - 12 * n] for n in range(3)]).flip(0),
    )
    state, settings = dict(bank.adapters["one"].state), bank.adapters["one"].settings
    bank.remove("one")
    bank.add("one", settings, seed=77, tensors=state)
    assert not torch.equal(first, dropped(bank, batch, 5))


def test_a_shared_prefix_has_the_mask_of_its_own_example_and_position():
    bank = tiny.bank_of(tiny.base_of(), "one", lora_dropout=0.3)
    ids = torch.arange(3, 15)
    whole = bank.base.hidden(ids, bank.route(Layout([Node(12, "one", 3)]), dropout_step=1))
    split = Layout([Node(5, "one", 3), Node(7, "one", 3, parent=0)])
    torch.testing.assert_close(bank.base.hidden(ids, bank.route(split, dropout_step=1)), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "opt", "bloom"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_training_step_leaves_the_global_generators_alone(name, recompute):
    bank = tiny.bank_of(tiny.base_of(name), "one", lora_dropout=0.3)
    batch = tiny.batch_of(tiny.examples_of(12, 5), "one")
    with tiny.global_randomness_untouched(), bank.base.activation_checkpointing(recompute):
        forward_loss(bank, batch, 0.1, dropout_step=0)[0].backward()


def test_masks_of_the_targets_of_a_model_are_unrelated():
    import math

    from onebase.base.route import RowSpace
    from onebase.ops.keyed import keep_mask, mix_rows

    bank = tiny.bank_of(tiny.base_of(), "one", lora_dropout=0.3)
    route = bank.route(Layout([Node(300, "one")]), dropout_step=0)
    masks = [
        keep_mask(mix_rows(route.row_keys[RowSpace.TOKEN], layer._key), 32, 0.3) for layer in bank._layers.values()
    ]
    share = 0.49
    for place, one in enumerate(masks):
        for other in masks[:place]:
            together = (one & other).double().mean().item()
            assert abs(together - share) < 5 * math.sqrt(share * (1 - share) / one.numel())
