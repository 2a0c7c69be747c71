"""Prompt tuning: learned embeddings before every sequence, equal to PEFT's and to embeddings fed in by hand."""

from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers

from onebase.adapters.bank import Bank
from onebase.adapters.prompt import NAME
from onebase.base.model import Base
from onebase.config.methods import Lora, PrefixTuning, PromptTuning
from onebase.errors import ConfigError, TargetError
from onebase.measure.forward import batches_of, forward_loss
from onebase.ops.segments import Segments
from tests import tiny

FP64: dict[str, Any] = {"rtol": 1e-5, "atol": 2e-6}
COUNT = 5
EAGER: dict[str, Any] = {"experts_implementation": "eager"}  # fused experts know no fp64
CHANGES = {"mixtral": EAGER, "qwen3-moe": EAGER}


def bank_of(name: str = "llama", *others: str, dtype: torch.dtype = torch.float64, count: int = COUNT) -> Bank:
    """Return a bank with the prompt adapter "one", a second one, and LoRA adapters behind."""
    bank = tiny.bank_of(
        tiny.base_of(name, dtype=dtype, **CHANGES.get(name, {})), *others, dtype=dtype, dummy=name != "gpt2"
    )
    for seed, adapter in enumerate(("one", "two")):
        bank.add(adapter, PromptTuning(num_virtual_tokens=count + seed), seed=seed)
        tiny.fill_(tiny.as_dtype_(bank.adapters[adapter], dtype), seed=20 + seed)
    return bank


def batch_of(bank, name, examples, budget=10_000):
    (batch,) = batches_of(bank, name, examples, range(len(examples)), budget)
    return batch


def text_rows(batch):
    """Return the flat rows of the text, not of virtual tokens."""
    starts = zip(batch.layout.starts, batch.layout.nodes, strict=True)
    return [row for start, node in starts for row in range(start + node.virtual, start + node.length)]


def logits_of(bank, batch):
    hidden = bank.base.hidden(batch.token_ids, bank.route(batch.layout))[text_rows(batch)]
    return bank.base.head.logits(hidden, Segments.of([len(hidden)], [-1]))


def by_hand(bank, example, name="one"):
    """Return the model's own logits at the text, the learned rows put before what its embedding returns."""
    ids = torch.from_numpy(example.token_ids.astype("int64"))[None]
    with bank.base.native(bank.sole_route(None)) as model:
        embedded = model.get_input_embeddings()(ids)
        learned = bank.adapters[name].state[NAME][None].to(embedded.dtype)
        mask = torch.ones(1, learned.shape[1] + ids.shape[1], dtype=torch.int64)
        out = model(inputs_embeds=torch.cat([learned, embedded], 1), attention_mask=mask, use_cache=False)
    return out.logits[0, learned.shape[1] :]


@pytest.mark.parametrize("name", sorted(tiny.ARCHITECTURES))
def test_logits_equal_learned_embeddings_put_before_those_of_the_text(name):
    bank = bank_of(name)
    examples = tiny.examples_of(9, 21, 4)
    with torch.no_grad():
        found = logits_of(bank, batch_of(bank, "one", examples))
        expected = torch.cat([by_hand(bank, example) for example in examples])
    torch.testing.assert_close(found, expected, **FP64)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma3", "opt", "granite", "bloom"])
def test_forward_and_gradients_equal_pefts(name):
    bank = bank_of(name)
    examples = tiny.examples_of(9, 21, 4)
    batch = batch_of(bank, "one", examples)
    loss, _ = forward_loss(bank, batch, 1 / batch.label_count)
    loss.backward()
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=COUNT)
    theirs: Any = peft.get_peft_model(tiny.model_of(name, dtype=torch.float64), config).eval()
    weight = theirs.prompt_encoder["default"].embedding.weight
    weight.data = bank.adapters["one"].state[NAME].clone()
    found, losses = [], []
    for example in examples:
        ids = torch.from_numpy(example.token_ids.astype("int64"))[None]
        labels = torch.where(torch.from_numpy(example.labelled.copy()), ids, -100)
        logits = theirs(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        found.append(logits[0, COUNT:].detach())
        labels = F.pad(labels, (COUNT, 0), value=-100)
        losses.append(F.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum"))
    their_loss = torch.stack(losses).sum() / batch.label_count
    their_loss.backward()
    with torch.no_grad():
        torch.testing.assert_close(logits_of(bank, batch), torch.cat(found), **FP64)
    assert loss.item() == pytest.approx(their_loss.item(), rel=1e-7)
    scale = weight.grad.abs().max()
    assert scale > 0
    torch.testing.assert_close(tiny.gradients(bank, "one")[NAME] / scale, weight.grad / scale, **FP64)


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt", "bloom"])
def test_every_member_of_a_mixed_batch_equals_itself_alone(name):
    bank = bank_of(name, "lora")
    parts = {
        "one": tiny.examples_of(9, 17),
        "lora": tiny.examples_of(12, 3, seed=1),
        "two": tiny.examples_of(5, 20, seed=2),
        None: tiny.examples_of(8, seed=3),
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
    for owner in ("one", "two", "lora"):
        for key, gradient in tiny.gradients(bank, owner).items():
            assert gradient.abs().max() > 0
            torch.testing.assert_close(gradient, grads[owner][key], **FP64)
    assert not any(g.any() for g in tiny.gradients(bank, "dummy").values())


def results(bank, batches, labels):
    tiny.clear_gradients(bank)
    losses = []
    for batch in batches:
        loss, rows = forward_loss(bank, batch, 1 / labels)
        loss.backward()
        losses.append(rows.loss.detach())
    return torch.cat(losses), tiny.gradients(bank, "one")[NAME]


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt2"])
def test_a_shared_root_equals_virtual_tokens_repeated_and_equals_padded(name):
    bank = bank_of(name)
    examples = tiny.examples_of(9, 21, 4, 13)
    found = []
    kind: Any
    for shares, kind in ((True, "flat"), (False, "flat"), (True, "padded")):
        if (name, kind) == ("gemma2", "padded"):
            continue  # transformers' eager attention makes NaN of fp64 padding beyond a window
        bank.base.shares_prefixes, bank.base.layout_kind = shares, kind
        batch = batch_of(bank, "one", examples)
        roots = [n for n in batch.layout.nodes if n.virtual]
        assert len(roots) == (1 if shares and kind == "flat" else len(examples))
        found.append(results(bank, [batch], batch.label_count))
    for losses, gradient in found[1:]:
        torch.testing.assert_close(losses, found[0][0], **FP64)
        torch.testing.assert_close(gradient, found[0][1], **FP64)


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_many_micro_batches_equal_one_and_count_virtual_tokens(name):
    bank = bank_of(name)
    examples = tiny.examples_of(9, 21, 4, 13, 16)
    one = batch_of(bank, "one", examples)
    many = list(batches_of(bank, "one", examples, range(5), 30))
    assert len(many) > 2
    assert all(b.layout.token_count <= 30 for b in many)
    whole, parts = (results(bank, b, one.label_count) for b in ([one], many))
    torch.testing.assert_close(whole[0], parts[0], **FP64)
    torch.testing.assert_close(whole[1], parts[1], **FP64)
    assert [n for b in many for n in b.examples] == list(range(5))


def test_virtual_tokens_carry_no_label_and_predict_none():
    bank = bank_of()
    for shared in (True, False):
        bank.base.shares_prefixes = shared
        batch = batch_of(bank, "one", tiny.examples_of(9, 4))
        assert not (batch.token_ids[batch.label_rows] >= tiny.VOCABULARY).any()
        assert not (batch.label_ids >= tiny.VOCABULARY).any()
        plain = tiny.batch_of(tiny.examples_of(9, 4), None)
        assert torch.equal(batch.label_ids, plain.label_ids)
        assert torch.equal(batch.token_ids[batch.label_rows + 1], plain.label_ids)


class Tokenizer:
    """Words by their length, behind a token that begins every text."""

    def __call__(self, text):
        return {"input_ids": [1, *(len(word) for word in text.split())]}


def test_first_values_are_pefts():
    base = Base(tiny.model_of("gemma3"), Tokenizer(), name="tiny")
    own = base.model.get_input_embeddings()
    bank = Bank(base)
    start: dict[str, Any] = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a word of the test"}
    for count, ids in ((3, [1, 1, 4]), (8, [1, 1, 4, 2, 3, 4, 1, 1])):
        adapter = bank.add(f"text-{count}", PromptTuning(num_virtual_tokens=count, **start))
        assert torch.equal(adapter.state[NAME], own(torch.tensor(ids)))  # what the module returns, scaled and all
    sampled = bank.add("sampled", PromptTuning(num_virtual_tokens=40), seed=3).state[NAME]
    whole = own(torch.arange(tiny.VOCABULARY))
    rows = [int((whole == row).all(1).nonzero()) for row in sampled]
    assert len(set(rows)) > 10
    again = bank.add("again", PromptTuning(num_virtual_tokens=40), seed=3).state[NAME]
    assert torch.equal(sampled, again)
    assert not torch.equal(sampled, bank.add("other", PromptTuning(num_virtual_tokens=40), seed=4).state[NAME])
    drawn = bank.add("drawn", PromptTuning(num_virtual_tokens=100, prompt_tuning_init="RANDOM")).state[NAME]
    assert abs(float(drawn.mean())) < 0.1
    assert float(drawn.std()) == pytest.approx(1, rel=0.05)


def test_first_values_change_no_global_randomness_and_only_the_prompt_is_trained():
    bank = Bank(tiny.base_of())
    with tiny.global_randomness_untouched():
        adapter = bank.add("one", PromptTuning(num_virtual_tokens=7))
    assert [(name, tuple(p.shape)) for name, p in adapter.parameters()] == [("prompt_embeddings", (7, 32))]
    assert adapter.parameter_count == 7 * 32
    assert adapter.virtual_tokens == 7
    assert bank.virtual_ids("one") == tuple(range(61, 68))
    assert bank.max_length("one") == 128 - 7
    assert bank.base.embedding_rows == 61
    bank.remove("one")
    assert isinstance(bank.base.model.get_input_embeddings(), torch.nn.Embedding)


def test_settings_that_cannot_be_are_refused_with_what_to_do():
    bank = Bank(tiny.base_of())
    with pytest.raises(ConfigError, match=r"prompt_tuning_init_text: tiny-llama has no tokenizer.*SAMPLE_VOCAB"):
        bank.add("one", PromptTuning(prompt_tuning_init="TEXT", prompt_tuning_init_text="a"))
    with pytest.raises(ConfigError, match=r"num_virtual_tokens: must leave room in the 128 tokens .* got 128"):
        bank.add("one", PromptTuning(num_virtual_tokens=128))
    assert not bank.adapters
    bank.add("one", Lora())
    assert bank.virtual_ids("one") == () == bank.virtual_ids(None)


def test_a_model_without_a_token_embedding_is_refused():
    base = tiny.base_of()
    bank = Bank(base)
    bank.places.embedding_path = None
    with pytest.raises(TargetError, match=r"prompt-tuning .* reads none: it has no input embedding. Use lora"):
        bank.add("one", PromptTuning())


@pytest.mark.parametrize("settings", [PromptTuning(), PrefixTuning()], ids=lambda s: s.method)
def test_a_model_that_reads_token_ids_in_every_layer_is_refused(settings):
    sizes: dict[str, Any] = {"head_dim": 8, "num_key_value_heads": 2, "hidden_size_per_layer_input": 8}
    config = transformers.Gemma4TextConfig(
        **tiny._SIZES, **sizes, vocab_size_per_layer_input=tiny.VOCABULARY, layer_types=["full_attention"] * 2
    )
    bank = Bank(Base(transformers.Gemma4ForCausalLM(config), name="tiny"))
    with pytest.raises(TargetError, match=r"reads token ids in model.embed_tokens_per_layer too.*Use lora"):
        bank.add("one", settings)
    assert not any(module._forward_pre_hooks for module in bank.base.model.modules())


@pytest.mark.parametrize("name", sorted(tiny.ENCODERS))
def test_an_encoder_repeats_them_before_every_example_and_equals_embeddings_put_in_by_hand(name):
    bank = bank_of(name)
    assert not bank.base.shares_prefixes
    examples = tiny.examples_of(9, 21, 4)
    batch = batch_of(bank, "one", examples)
    assert [n.virtual for n in batch.layout.nodes] == [COUNT] * 3
    with torch.no_grad():
        found = bank.base.hidden(batch.token_ids, bank.route(batch.layout))
        with bank.base.native(bank.sole_route(None)) as model:
            for example, own in zip(examples, found.split([COUNT + n for n in examples.lengths]), strict=True):
                embedding: Any = bank.places.module(str(bank.places.embedding_path))
                embedded = embedding(torch.from_numpy(example.token_ids.astype("int64")))
                learned = bank.adapters["one"].state[NAME]
                out = model(inputs_embeds=torch.cat([learned, embedded])[None]).last_hidden_state[0]
                torch.testing.assert_close(own, out, **FP64)


@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert"])
def test_an_encoders_hidden_states_equal_pefts(name):
    bank = bank_of(name)
    example = tiny.examples_of(9)
    config = peft.PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=COUNT)
    theirs: Any = peft.get_peft_model(tiny.model_of(name, dtype=torch.float64), config).eval()
    theirs.prompt_encoder["default"].embedding.weight.data = bank.adapters["one"].state[NAME].clone()
    ids = torch.from_numpy(example.token_ids.astype("int64"))[None]
    batch = batch_of(bank, "one", example)
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
        found = bank.base.hidden(batch.token_ids, bank.route(batch.layout))
    torch.testing.assert_close(found, expected, **FP64)
