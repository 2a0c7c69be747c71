"""A head in a model's files goes on only under the names that it was stored with, as transformers computes it."""

import pytest
import torch
import transformers

from onebase.base.model import load
from onebase.config.labels import Labels
from tests.classifiers import model_of
from tests.data.tiny import byte_tokenizer

STORED = ("bad", "good", "odd")
IDS = torch.tensor([[3, 9, 27, 5]])
KINDS = ("bert", "roberta", "distilbert", "llama", "modernbert", "gpt2")


@pytest.fixture(autouse=True)
def own_home(monkeypatch, tmp_path):
    monkeypatch.setenv("ONEBASE_HOME", str(tmp_path / "home"))


def stored_model(folder, kind="bert", names=STORED):
    """Write a model with a head for `names`, and return it as transformers opens it."""
    model, tokenizer = model_of(kind), byte_tokenizer(template=None)
    model.resize_token_embeddings(len(tokenizer))
    if names:
        model.config.id2label, model.config.label2id = dict(enumerate(names)), {n: i for i, n in enumerate(names)}
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder)


def opened(folder, *names):
    """Return a base that was opened for these classes, and what it gives each of them, by name."""
    base = load(str(folder), labels=Labels("single_label_classification", names))
    base.rest()
    assert base.labels is not None
    with torch.no_grad():
        logits = base.model(IDS).logits[0]
    return base, dict(zip(base.labels.names, logits.tolist(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", [STORED, ("odd", "bad", "good")])
def test_a_class_keeps_its_row_whatever_its_place(kind, order, tmp_path):
    model = stored_model(tmp_path / "model", kind)
    with torch.no_grad():
        wanted = {model.config.id2label[n]: value for n, value in enumerate(model(IDS).logits[0].tolist())}
    base, found = opened(tmp_path / "model", *order)
    assert base.labels.names == order and base.task_head.fresh == ()
    assert found == pytest.approx(wanted, rel=1e-5, abs=1e-5)
    assert base.head_note == (
        ""
        if order == STORED
        else "the head in the model's files is for bad, good, odd: its rows are used in the order odd, bad, good"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_classes_of_other_names_begin_with_a_new_last_layer(kind, tmp_path):
    stored = stored_model(tmp_path / "model", kind).state_dict()
    base, _ = opened(tmp_path / "model", "bad", "cat", "dog")
    (path,) = base.task_head.fresh
    changed = {name for name, tensor in base.model.state_dict().items() if not torch.equal(tensor, stored[name])}
    assert changed <= {f"{path}.weight", f"{path}.bias"} and f"{path}.weight" in changed
    again, _ = opened(tmp_path / "model", "bad", "cat", "dog")
    assert torch.equal(again.model.get_submodule(path).weight, base.model.get_submodule(path).weight)
    assert base.model.get_submodule(path).weight.std() > 0.01
    assert "is for bad, good, odd: one for bad, cat, dog begins anew" in base.head_note


def test_a_head_of_another_width_begins_anew_and_says_so(tmp_path):
    stored_model(tmp_path / "model")
    base, _ = opened(tmp_path / "model", "bad", "good")
    assert base.task_head.fresh == ("classifier",)
    assert "for bad, good, odd, has other outputs: one for bad, good begins anew" in base.head_note


def test_a_head_without_names_is_kept_and_what_it_is_taken_for_is_said(tmp_path):
    model = stored_model(tmp_path / "model", names=())
    base, found = opened(tmp_path / "model", "cat", "dog", "owl")
    with torch.no_grad():
        assert list(found.values()) == pytest.approx(model(IDS).logits[0].tolist(), rel=1e-5)
    assert "names no classes: its outputs are taken for cat, dog, owl, in this order" in base.head_note
    base, _ = opened(tmp_path / "model", "LABEL_0", "LABEL_1", "LABEL_2")
    assert base.head_note == ""


def test_a_model_without_a_head_has_nothing_to_be_told(tmp_path):
    stored_model(tmp_path / "model")
    model_of("bert").base_model.save_pretrained(tmp_path / "trunk")
    base, _ = opened(tmp_path / "trunk", "cat", "dog")
    assert base.task_head.fresh == ("classifier",) and base.head_note == ""
