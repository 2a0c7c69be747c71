"""Runs of prompt and prefix tuning: learned, kept, opened again, by onebase and by PEFT, and resumed."""

from typing import Any

import peft
import pytest
import torch
import transformers

from onebase.adapters.prompt import NAME
from onebase.config.reading import settings_from
from onebase.errors import ConfigError
from onebase.measure.evaluate import evaluate
from onebase.measure.generate import generate
from onebase.train.data import load_data
from onebase.train.opening import open_adapter
from onebase.train.stop import Stopped
from tests.train import runs
from tests.train.runs import Watching, adapter_bytes, metrics

METHODS: dict[str, dict[str, Any]] = {
    "prompt": {"method": "prompt-tuning", "num_virtual_tokens": 6},
    "text": {
        "method": "prompt-tuning",
        "num_virtual_tokens": 6,
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": "Define it.",
    },
    "prefix": {"method": "prefix-tuning", "num_virtual_tokens": 6},
    "projected": {
        "method": "prefix-tuning",
        "num_virtual_tokens": 6,
        "prefix_projection": True,
        "encoder_hidden_size": 12,
    },
}


def settings_of(shop, method, **train):
    values = shop.values(train={"steps": 6, "batch_size": 4, "eval_every": 2, "learning_rate": 0.03} | train)
    return settings_from(values | {"adapter": METHODS[method]})


@pytest.fixture(scope="module", params=METHODS)
def trained(request, shop, tmp_path_factory):
    """Return (method, run folder, what was said meanwhile) of a run that nobody stopped."""
    out = tmp_path_factory.mktemp("virtual") / request.param
    runs.run(settings_of(shop, request.param), out, watching=(watching := Watching()))
    return request.param, out, watching


def test_a_run_learns_and_counts_the_tokens_of_its_examples_alone(trained, shop):
    _, out, watching = trained
    result = runs.result_of(out)
    assert result.valid_loss < result.valid_loss_before
    base = open_adapter(out).bank.base
    data = load_data(settings_of(shop, trained[0]).data, "chat", base, 6)
    assert result.tokens == sum(step.tokens for step in watching.steps)
    per_epoch = data.train.examples.token_count
    assert sum(step.tokens for step in watching.steps[:3]) == per_epoch


def test_what_is_opened_again_scores_as_it_did_and_answers(trained, shop):
    method, out, _ = trained
    opened = open_adapter(out)
    assert opened.adapter.virtual_tokens == 6
    assert sorted(opened.stored.tensors) == [NAME]
    data: Any = load_data(settings_of(shop, method).data, "chat", opened.bank.base, 6)
    scores = evaluate(opened.bank, opened.adapter.name, data.valid.examples)
    assert scores.loss == pytest.approx(runs.result_of(out).valid_loss, rel=1e-5)
    assert generate(opened.bank, opened.adapter.name, [[3, 4, 5]], max_new_tokens=3)[0]


def test_peft_reads_it_and_gives_the_same_logits(trained, shop):
    _, out, _ = trained
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(shop.model), out / "adapter"
    ).eval()
    opened = open_adapter(out)
    name, ids = opened.adapter.name, [5, 9, 30, 12, 7]
    with torch.no_grad():
        logits = theirs(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, 5, dtype=torch.int64)).logits
        whole = [*opened.bank.virtual_ids(name), *ids]
        with opened.bank.base.native(opened.bank.sole_route(name)) as model:
            own = model(input_ids=torch.tensor([whole]), use_cache=False).logits
    torch.testing.assert_close(own[0, -5:], logits[0, -5:], rtol=1e-4, atol=1e-4)


def test_stopped_after_any_step_and_resumed_equals_never_stopped(trained, shop):
    method, out, _ = trained
    for step in (0, 1, 3, 5):
        halved = out.parent / f"{method}-{step}"
        with pytest.raises(Stopped):
            runs.run(settings_of(shop, method), halved, watching=Watching(stop_after={step}))
        runs.run(settings_of(shop, method), halved, resume=True)
        assert adapter_bytes(halved) == adapter_bytes(out)
        assert metrics(halved) == metrics(out)


def test_a_run_goes_on_from_what_a_file_holds(trained, shop, tmp_path):
    method, out, _ = trained
    values = shop.values(train={"steps": 1, "batch_size": 4})
    adapter = METHODS[method] | {"init_from": str(out / "adapter")}
    if method == "projected":
        with pytest.raises(ConfigError, match="holds the keys and values that a projection made"):
            runs.run(settings_from(values | {"adapter": adapter}), tmp_path / "refused")
        adapter = METHODS["prefix"] | {"init_from": str(out / "adapter")}
    runs.run(settings_from(values | {"adapter": adapter}), tmp_path / "on")
    assert runs.result_of(tmp_path / "on").valid_loss_before == pytest.approx(runs.result_of(out).valid_loss, rel=1e-5)
