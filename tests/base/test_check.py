"""The self-check sees what would make flat wrong, and takes the head for what it is."""

from typing import Any

import pytest
import torch
import transformers

from onebase.base import check
from onebase.base.classifier import TaskHead
from onebase.base.model import Base
from onebase.errors import ModelError
from onebase.ops import attention
from tests import classifiers, tiny


def broken_base(monkeypatch, name, **changes):
    """Return what a base's layout is when the rule of its attention is changed on the way."""
    import onebase.base.flat as flat

    def changed(query, key, value, layout, rule):
        return attention.flat_attention(query, key, value, layout, attention.AttentionRule(**{**vars(rule), **changes}))

    monkeypatch.setattr(flat, "flat_attention", changed)
    return tiny.base_of(name).layout_kind


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"causal": False}),
        ("mistral", {"window": None}),
        ("mistral", {"window": tiny.WINDOW + 1}),
        ("gemma3", {"window": None}),
        ("gemma2", {"soft_cap": None}),
        ("granite", {"scale": None}),
        ("gemma3", {"scale": 0.3}),
    ],
)
def test_a_wrong_mask_window_cap_or_scale_is_seen(monkeypatch, name, changes):
    assert broken_base(monkeypatch, name, **changes) == "padded"


def test_numbers_that_are_none_are_seen(monkeypatch):
    """NaN compares as not larger than anything, so it would pass for no difference."""
    import onebase.base.flat as flat

    def spoiled(*parts):
        return attention.flat_attention(*parts) * float("nan")

    monkeypatch.setattr(flat, "flat_attention", spoiled)
    assert tiny.base_of("llama").layout_kind == "padded"


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_model_whose_own_results_are_not_finite_is_refused_as_damaged(name):
    model = tiny.model_of(name)
    with torch.no_grad():
        next(p for path, p in model.named_parameters() if "layer" in path and p.dim() == 2)[0, 0] = float("nan")
    with pytest.raises(ModelError, match="own results are not finite in float32: its weights are damaged"):
        Base(model, name="odd")


def test_an_encoder_with_a_wrong_mask_is_seen(monkeypatch):
    assert broken_base(monkeypatch, "bert", causal=True) == "padded"


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_positions_that_do_not_restart_are_seen(monkeypatch, name):
    from onebase.ops.layout import Layout

    monkeypatch.setattr(
        Layout, "position_ids", property(lambda self: torch.arange(self.token_count).mul_(2 if name == "llama" else 1)[None])
    )  # fmt: skip
    assert tiny.base_of(name).layout_kind == "padded"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", (1.0, None, False)),
        ("granite", (1 / 3.0, None, False)),
        ("cohere", (0.25, None, False)),
        ("gemma2", (1.0, 2.0, False)),
        ("bloom", (1.0, None, False)),
    ],
)
def test_the_head_record_holds_scale_cap_and_bias(name, expected):
    head: Any = check.head_of(tiny.model_of(name))
    assert (head.scale, head.soft_cap, head.bias is not None) == (pytest.approx(expected[0]), *expected[1:])
    assert head.update is None


def test_a_head_with_a_bias_is_used_with_it():
    model = tiny.model_of("llama")
    model.lm_head = torch.nn.Linear(32, tiny.VOCABULARY)
    base: Any = Base(model)
    assert base.head.bias is model.lm_head.bias


def test_a_tied_head_is_the_embedding_itself():
    model = tiny.model_of("llama-tied")
    head: Any = check.head_of(model)
    assert head.weight is model.get_input_embeddings().weight


def test_a_scale_that_the_record_does_not_know_is_refused():
    """The head's record is held against the model's own logits, not against a list of names."""
    model = tiny.model_of("llama")
    model.config.logits_scaling = 5.0  # which Llama does not read
    with pytest.raises(ModelError, match="not supported"):
        Base(model, name="odd")


def test_a_head_that_is_no_linear_layer_is_refused():
    model = tiny.model_of("llama")
    model.lm_head = torch.nn.Conv1d(32, tiny.VOCABULARY, 1)
    with pytest.raises(ModelError, match="Conv1d, not a linear layer"):
        Base(model)


def test_an_encoder_has_no_head():
    assert check.head_of(tiny.model_of("bert")) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "opt", "gpt-neox", "bert"])
def test_half_precision_passes_the_check(name, dtype):
    assert tiny.base_of(name, dtype=dtype).layout_kind == "flat"


def test_the_check_leaves_the_global_generator_alone():
    model = tiny.model_of("opt")
    with tiny.global_randomness_untouched():
        Base(model)


def test_models_with_few_positions_are_checked_within_them():
    assert tiny.base_of("gpt2", max_position_embeddings=24, n_positions=24).layout_kind == "flat"
    assert tiny.base_of("mistral", max_position_embeddings=20).layout_kind == "flat"


def test_a_head_for_examples_is_checked_in_the_precision_it_runs_in():
    """Hidden rows are fp32 where the last norm's weights are, and on CUDA behind any LayerNorm under autocast."""
    model = classifiers.model_of("llama").to(torch.bfloat16)
    model.model.norm.float()
    assert isinstance(Base(model).task_head, TaskHead)


def test_a_model_whose_head_wants_more_than_tokens_opens_and_says_so():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.LukeConfig(vocab_size=61, entity_vocab_size=11, entity_emb_size=8, **sizes)
    base = Base(transformers.LukeForEntityClassification(config).eval())
    assert "the head of a LukeForEntityClassification does not run on token ids alone" in str(base.task_head)
    with pytest.raises(ModelError, match="does not run on token ids alone"):
        base.open_for_task()


def test_positions_that_start_later_leave_room_for_fewer_tokens():
    """A RoBERTa's 514 positions hold 512 tokens: the first two are no token's."""
    config = transformers.RobertaConfig(
        vocab_size=61, max_position_embeddings=34, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=64, pad_token_id=1,
    )  # fmt: skip
    base = Base(transformers.RobertaModel(config).eval())
    assert base.max_length == 32
    batch = tiny.batch_of(tiny.examples_of(base.max_length), None)
    assert bool(base.hidden(batch.token_ids, check.probe_route(base, batch.layout)).isfinite().all())
