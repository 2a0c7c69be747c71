"""Prefix tuning: learned keys and values in every layer, equal to transformers' own cache and to PEFT's."""

from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers

from onebase.adapters.bank import Bank
from onebase.adapters.layer import AdaptedLayer
from onebase.adapters.prefix import PrefixPart
from onebase.adapters.prompt import NAME
from onebase.base.flat import NotFlatError
from onebase.config.methods import Ia3, Lora, PrefixTuning, PromptTuning
from onebase.data.examples import Examples
from onebase.errors import ConfigError, TargetError
from onebase.measure.forward import batches_of, forward_loss
from onebase.measure.generate import generate
from onebase.ops.segments import Segments
from tests import tiny

FP64: dict[str, Any] = {"rtol": 1e-5, "atol": 2e-6}
COUNT = 5
EAGER: dict[str, Any] = {"experts_implementation": "eager"}  # fused experts know no fp64
CHANGES = {"mixtral": EAGER, "qwen3-moe": EAGER}
FLAT = sorted({*tiny.ARCHITECTURES} - tiny.PADDED)


def bank_of(name: str = "llama", *others: str, projection: bool = False) -> Bank:
    """Return a fp64 bank with the prefix adapters "one" and "two", and LoRA adapters before them."""
    dtype = torch.float64
    bank = tiny.bank_of(tiny.base_of(name, dtype=dtype, **CHANGES.get(name, {})), *others, dtype=dtype, dummy=False)
    for seed, adapter in enumerate(("one", "two")):
        settings = PrefixTuning(num_virtual_tokens=COUNT + seed, prefix_projection=projection)
        bank.add(adapter, settings, seed=seed)
        tiny.fill_(tiny.as_dtype_(bank.adapters[adapter], dtype), seed=20 + seed, size=1.0)
    return bank


def batch_of(bank, name, examples, budget=10_000):
    (batch,) = batches_of(bank, name, examples, range(len(examples)), budget)
    return batch


def logits_of(bank, batch):
    starts = zip(batch.layout.starts, batch.layout.nodes, strict=True)
    rows = [row for start, node in starts for row in range(start + node.virtual, start + node.length)]
    hidden = bank.base.hidden(batch.token_ids, bank.route(batch.layout))[rows]
    return bank.base.head.logits(hidden, Segments.of([len(hidden)], [-1]))


def cache_of(bank, learned, count=COUNT):
    """Return transformers' own cache that holds the learned keys and values, layer by layer."""
    config = bank.base.model.config.get_text_config()
    cache = transformers.DynamicCache(config=config)
    shape = bank.adapters["one"].parts[0].shape
    split = learned.view(count, 2 * shape.layers, shape.kv_heads, shape.width).permute(1, 2, 0, 3)[:, None]
    for layer in range(shape.layers):
        cache.update(split[2 * layer], split[2 * layer + 1], layer)
    return cache


def by_hand(bank, example):
    """Return the model's own logits at the text with the learned keys and values in its cache."""
    ids = torch.from_numpy(example.token_ids.astype("int64"))[None]
    with bank.base.native(bank.sole_route(None)) as model:
        cache = cache_of(bank, bank.adapters["one"].file_tensors[NAME])
        return model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0]


@pytest.mark.parametrize("projection", [False, True], ids=["plain", "projected"])
@pytest.mark.parametrize("name", FLAT)
def test_logits_equal_the_models_own_with_a_cache_made_by_hand(name, projection):
    bank = bank_of(name, projection=projection)
    examples = tiny.examples_of(9, 21, 4)
    with torch.no_grad():
        found = logits_of(bank, batch_of(bank, "one", examples))
        expected = torch.cat([by_hand(bank, example) for example in examples])
    torch.testing.assert_close(found, expected, **FP64)


@pytest.mark.parametrize("projection", [False, True], ids=["plain", "projected"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma3", "opt", "mistral", "gpt-neox"])
def test_forward_and_gradients_equal_pefts(name, projection):
    bank = bank_of(name, projection=projection)
    examples = tiny.examples_of(9, 21, 4)
    batch = batch_of(bank, "one", examples)
    loss, _ = forward_loss(bank, batch, 1 / batch.label_count)
    loss.backward()
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=COUNT, prefix_projection=projection, init_weights=None
    )
    theirs: Any = peft.get_peft_model(tiny.model_of(name, dtype=torch.float64), config).eval()
    encoder = theirs.prompt_encoder["default"].double()
    own = dict(encoder.named_parameters())
    names = {key: "prompt_encoder." + key if projection else NAME for key in own}
    state = bank.adapters["one"].state
    for key, parameter in own.items():
        assert parameter.shape == state[names[key]].shape
        parameter.data = state[names[key]].clone()
    found, losses = [], []
    for example in examples:
        ids = torch.from_numpy(example.token_ids.astype("int64"))[None]
        labels = torch.where(torch.from_numpy(example.labelled.copy()), ids, -100)
        logits = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        found.append(logits[0].detach())
        losses.append(F.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum"))
    their_loss = torch.stack(losses).sum() / batch.label_count
    their_loss.backward()
    with torch.no_grad():
        torch.testing.assert_close(logits_of(bank, batch), torch.cat(found), **FP64)
    assert loss.item() == pytest.approx(their_loss.item(), rel=1e-7)
    grads = tiny.gradients(bank, "one")
    for key, parameter in own.items():
        scale = parameter.grad.abs().max()
        assert scale > 0
        torch.testing.assert_close(grads[names[key]] / scale, parameter.grad / scale, **FP64)


@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert"])
def test_every_example_of_an_encoder_sees_the_learned_keys_and_values(name):
    """Against attention written out: the learned ones joined before those of the text, whose positions are shifted."""
    bank = bank_of(name)
    model, adapter = bank.base.model, bank.adapters["one"]
    shape, window = adapter.parts[0].shape, tiny.WINDOW // 2  # type: ignore[attr-defined]
    split = adapter.state[NAME].view(COUNT, shape.layers, 2, shape.kv_heads, shape.width).permute(1, 2, 3, 0, 4)

    def joined(module, query, key, value, mask, scaling=None, sliding_window=None, **_):
        key, value = (torch.cat([s[None], x], 2) for s, x in zip(split[module.layer_idx], (key, value), strict=True))
        scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if sliding_window is not None:
            distance = torch.arange(COUNT, key.shape[2])[:, None] - torch.arange(key.shape[2])
            scores = scores.masked_fill(distance.abs() > window, float("-inf"))
        return (torch.softmax(scores, -1) @ value).transpose(1, 2), None

    examples = tiny.examples_of(9, 21, 4)
    batch = batch_of(bank, "one", examples)
    transformers.AttentionInterface.register("joined", joined)
    with torch.no_grad():
        found = bank.base.hidden(batch.token_ids, bank.route(batch.layout)).split([COUNT + n for n in examples.lengths])
        with bank.base.native(bank.sole_route(None)):
            model.set_attn_implementation("joined")
            for example, own in zip(examples, found, strict=True):
                ids = torch.from_numpy(example.token_ids.astype("int64"))[None]
                positions = torch.arange(COUNT, COUNT + ids.shape[1])[None] + bank.base.position_offset
                out = model(input_ids=ids, position_ids=positions).last_hidden_state[0]
                torch.testing.assert_close(own[COUNT:], out, **FP64)
            model.set_attn_implementation(bank.base._own_attention)


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt"])
def test_every_member_of_a_mixed_batch_equals_itself_alone(name):
    bank = bank_of(name, "lora")
    tiny.fill_(tiny.as_dtype_(bank.add("ia3", Ia3()), torch.float64), seed=7)
    prompt = bank.add("prompt", PromptTuning(num_virtual_tokens=3))
    tiny.fill_(tiny.as_dtype_(prompt, torch.float64), seed=8)
    parts = {
        "one": tiny.examples_of(9, 17),
        "lora": tiny.examples_of(12, 3, seed=1),
        "two": tiny.examples_of(5, 20, seed=2),
        None: tiny.examples_of(8, seed=3),
        "prompt": tiny.examples_of(7, 9, seed=4),
        "ia3": tiny.examples_of(11, seed=5),
    }
    batches = [batch_of(bank, owner, examples) for owner, examples in parts.items()]
    alone = []
    for batch in batches:
        loss, rows = forward_loss(bank, batch, 0.1)
        if loss.requires_grad:
            loss.backward()
        alone.append(rows.loss)
    grads = {owner: tiny.gradients(bank, owner) for owner in bank.adapters}
    tiny.clear_gradients(bank)
    loss, rows = forward_loss(bank, tiny.together(*batches), 0.1)
    loss.backward()
    torch.testing.assert_close(rows.loss, torch.cat(alone), **FP64)
    for owner in ("one", "two", "lora", "prompt", "ia3"):
        for key, gradient in tiny.gradients(bank, owner).items():
            assert gradient.abs().max() > 0
            torch.testing.assert_close(gradient, grads[owner][key], **FP64)


def results(bank, batches, labels):
    tiny.clear_gradients(bank)
    losses = []
    for batch in batches:
        loss, rows = forward_loss(bank, batch, 1 / labels)
        loss.backward()
        losses.append(rows.loss.detach())
    return torch.cat(losses), tiny.gradients(bank, "one")


def assert_same(one, other):
    torch.testing.assert_close(one[0], other[0], **FP64)
    for key, gradient in one[1].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, other[1][key], **FP64)


@pytest.mark.parametrize("projection", [False, True], ids=["plain", "projected"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt2"])
def test_a_shared_root_equals_virtual_tokens_repeated_and_many_micro_batches_equal_one(name, projection):
    bank = bank_of(name, projection=projection)
    examples = tiny.examples_of(9, 21, 4, 13)
    shared = batch_of(bank, "one", examples)
    expected = results(bank, [shared], shared.label_count)
    many = list(batches_of(bank, "one", examples, range(4), 30))
    assert len(many) > 1
    assert_same(results(bank, many, shared.label_count), expected)
    bank.base.shares_prefixes = False
    repeated = batch_of(bank, "one", examples)
    assert [n.virtual for n in repeated.layout.nodes] == [COUNT] * 4
    assert_same(results(bank, [repeated], shared.label_count), expected)


def test_the_rows_where_virtual_tokens_stand_reach_nobody():
    bank = bank_of()
    batch = batch_of(bank, "one", tiny.examples_of(9, 4))
    with torch.no_grad():
        before = logits_of(bank, batch)
        bank.places.module(str(bank.places.embedding_path)).weight[0] = float(
            "nan"
        )  # what a placeholder's id is looked up as
        assert torch.equal(logits_of(bank, batch), before)


def test_a_file_holds_what_the_network_made_and_is_the_same_adapter_without_it():
    bank = bank_of("llama", projection=True)
    files = bank.adapters["one"].file_tensors
    assert {name: tuple(t.shape) for name, t in files.items()} == {NAME: (COUNT, 2 * 2 * 2 * 8)}
    assert sorted(bank.adapters["one"].state) == [
        "prompt_encoder.embedding.weight",
        "prompt_encoder.transform.0.bias",
        "prompt_encoder.transform.0.weight",
        "prompt_encoder.transform.2.bias",
        "prompt_encoder.transform.2.weight",
    ]
    again = tiny.as_dtype_(bank.add("again", bank.adapters["one"].settings), torch.float64)
    again.load_state_(bank.adapters["one"].state)
    stored = tiny.as_dtype_(bank.add("stored", PrefixTuning(num_virtual_tokens=COUNT)), torch.float64)
    stored.load_state_(files)
    with torch.no_grad():
        logits = [logits_of(bank, batch_of(bank, name, tiny.examples_of(9))) for name in ("one", "again", "stored")]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    plain = bank_of("llama").adapters["one"]
    assert plain.file_tensors.keys() == plain.state.keys()


def test_first_values_are_drawn_as_pefts_are_from_the_seed_alone():
    bank = Bank(tiny.base_of())
    with tiny.global_randomness_untouched():
        state = bank.add(
            "one", PrefixTuning(num_virtual_tokens=50, prefix_projection=True, encoder_hidden_size=64)
        ).state
    embedding, inner = state["prompt_encoder.embedding.weight"], state["prompt_encoder.transform.2.weight"]
    assert embedding.shape == (50, 16)
    assert float(embedding.std()) == pytest.approx(1, rel=0.1)
    assert inner.shape == (64, 64)
    assert 0.124 < float(inner.abs().max()) <= 0.125  # uniform within 1 / sqrt(64)
    plain = bank.add("plain", PrefixTuning(num_virtual_tokens=50)).state[NAME]
    assert plain.shape == (50, 64)
    assert torch.equal(plain, bank.add("again", PrefixTuning(num_virtual_tokens=50)).state[NAME])
    assert not torch.equal(plain, bank.add("other", PrefixTuning(num_virtual_tokens=50), seed=1).state[NAME])


@pytest.mark.parametrize(
    ("name", "why"),
    [("bloom", "its attention is its own"), ("distilbert", "does not say which layer it is")],
)
def test_a_base_whose_attention_takes_no_other_keys_is_refused_with_what_to_use(name, why):
    bank = Bank(tiny.base_of(name))
    with pytest.raises(TargetError, match=rf"prefix-tuning .* cannot take: .*{why}. Use prompt-tuning"):
        bank.add("one", PrefixTuning())
    assert not bank.adapters
    assert not isinstance(bank.base.input_embedding, AdaptedLayer)


def test_a_sequence_without_its_virtual_tokens_is_an_error_and_never_another_result():
    bank = bank_of()
    with pytest.raises(ValueError, match="a sequence of 'one' begins with 0 virtual tokens, not 5"):
        bank.route(tiny.batch_of(tiny.examples_of(4), "one").layout)


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_an_encoders_hidden_states_equal_pefts(name):
    bank = bank_of(name)
    example = tiny.examples_of(9)
    config = peft.PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=COUNT)
    theirs: Any = peft.get_peft_model(tiny.model_of(name, dtype=torch.float64), config).eval()
    theirs.prompt_encoder["default"].embedding.weight.data = bank.adapters["one"].state[NAME].clone()
    ids = torch.from_numpy(example.token_ids.astype("int64"))[None]
    batch = batch_of(bank, "one", example)
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
        found = bank.base.hidden(batch.token_ids, bank.route(batch.layout))
    torch.testing.assert_close(found[COUNT:], expected, **FP64)


def test_answers_do_not_depend_on_the_cache_that_the_model_would_like():
    bank = bank_of("llama")
    prompts = [[5, 6, 7, 8], [9, 10, 11]]
    before = generate(bank, "one", prompts, max_new_tokens=6)
    bank.base.model.generation_config.cache_implementation = "static"
    assert generate(bank, "one", prompts, max_new_tokens=6) == before
    assert generate(bank, None, prompts, max_new_tokens=6) != before


def test_a_cache_of_fixed_length_is_refused_where_learned_keys_would_be_lost_in_it():
    bank = bank_of("llama")
    ids = torch.tensor([[*bank.virtual_ids("one"), 5, 6, 7]])
    cache = transformers.StaticCache(config=bank.base.model.config, max_cache_len=32)
    with (
        bank.base.native(bank.sole_route("one", virtual_starts=(0,))) as model,
        pytest.raises(NotFlatError, match="cache"),
        torch.no_grad(),
    ):
        model(input_ids=ids, past_key_values=cache, use_cache=True)


@pytest.mark.parametrize("graded", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox", "phi3", "qwen3", "gemma3", "mistral"])
def test_forwards_with_a_cache_equal_one_without_gradients_included(name, graded):
    """The text comes in two or more forwards; where gradients are wanted in all, they are those of one forward."""
    bank = bank_of(name)
    [example] = tiny.examples_of(6)
    batch = batch_of(bank, "one", Examples([example]))
    expected = logits_of(bank, batch)
    ids = torch.tensor([[*bank.virtual_ids("one"), *example.token_ids.tolist()]])
    cache, found = transformers.DynamicCache(config=bank.base.model.config), []
    with bank.base.native(bank.sole_route("one", virtual_starts=(0,))) as model:
        for number, piece in enumerate([ids[:, :-3], *ids[:, -3:].split(1, 1)]):
            with torch.set_grad_enabled(graded[min(number, 1)]):
                found.append(model(input_ids=piece, past_key_values=cache, use_cache=True).logits[0])
    logits = torch.cat(found)[COUNT:]
    torch.testing.assert_close(logits, expected, **FP64)
    if all(graded):
        weights = torch.randn(logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        (expected * weights).sum().backward()
        wanted = tiny.gradients(bank, "one")
        tiny.clear_gradients(bank)
        (logits * weights).sum().backward()
        for key, gradient in tiny.gradients(bank, "one").items():
            torch.testing.assert_close(gradient, wanted[key], rtol=1e-4, atol=1e-6)


def test_learned_keys_beside_a_copied_block_are_refused_and_never_dropped():
    bank = Bank(tiny.base_of("llama"))
    bank.add("one", PrefixTuning(num_virtual_tokens=3))
    bank.add("block", Lora(r=2, target_modules=["up_proj"], modules_to_save=["self_attn"]))
    ids = torch.tensor([[*bank.virtual_ids("one"), 5, 6, 7], [4, 4, 4, 5, 6, 7]])
    route = bank.batch_route(["one", "block"], virtual_starts=(0, 0))
    with bank.base.native(route) as model, pytest.raises(ConfigError, match="one adapter at a time"):
        model(input_ids=ids)


def test_a_new_prefix_has_values_of_zero_and_keys_that_are_not():
    bank = Bank(tiny.base_of("llama"))
    (part,) = bank.add("one", PrefixTuning(num_virtual_tokens=3), seed=1).parts
    assert isinstance(part, PrefixPart)
    layers = part.embedding.view(3, part.shape.layers, 2, -1)
    assert layers[:, :, 1].abs().max() == 0
    assert layers[:, :, 0].abs().min() > 0 and 0.5 < layers[:, :, 0].std() < 1.5
