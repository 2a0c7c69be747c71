"""A name leads to one model, opened exactly as stored and frozen; whatever stands in the way is named."""

import json
import re
import shutil

import pytest
import torch
import transformers

from onebase.base import cache, memory, pretrained
from onebase.base.place import ModelPlace
from onebase.errors import CapacityError, ConfigError, FileFormatError, ModelError
from tests.base import tiny


@pytest.fixture(autouse=True)
def own_home(monkeypatch, tmp_path):
    monkeypatch.setenv("ONEBASE_HOME", str(tmp_path / "home"))


@pytest.fixture
def folder(tmp_path):
    return tiny.llama_folder(tmp_path / "llama")


def place_of(folder):
    return ModelPlace("here", folder, "folder")


def reopen(folder, **arguments):
    said: list[str] = []
    model, tokenizer, _ = pretrained.open_pretrained(place_of(folder), say=said.append, **arguments)
    return model, tokenizer, said


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_weights(folder, change):
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


# ------------------------------------------------------------------------------------------------------------- opening


def test_an_opened_model_is_frozen_and_holds_the_stored_weights(folder):
    from safetensors.torch import load_file

    model, tokenizer, said = reopen(folder)
    stored = load_file(folder / "model.safetensors")
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in stored.items())
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert tokenizer.convert_tokens_to_ids("base") == 4
    assert said == []


def test_opening_is_silent_and_leaves_transformers_as_talkative_as_before(folder, capfd):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    reopen(folder)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None])
def test_the_dtype_is_the_asked_one_or_else_the_stored_one(folder, dtype):
    model, _, _ = reopen(folder, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype or torch.float32}


def test_a_model_whose_weights_do_not_fit_is_refused_before_they_are_read(folder, monkeypatch):
    count = sum(p.numel() for p in reopen(folder)[0].state_dict(keep_vars=True).values())
    monkeypatch.setattr(memory, "available_bytes", lambda: 2 * count)
    with pytest.raises(CapacityError, match=r"here: its weights need .* are free.*dtype: bfloat16"):
        reopen(folder, dtype=torch.float32)
    reopen(folder, dtype=torch.bfloat16)


def test_a_model_without_tokenizer_files_has_no_tokenizer(tmp_path):
    assert reopen(tiny.llama_folder(tmp_path / "m", tokenizer=False))[1] is None


def test_an_encoder_is_opened_by_the_class_its_configuration_names(tmp_path):
    sizes = {**tiny.SIZES, "max_position_embeddings": 16}
    for kind in (transformers.BertModel, transformers.BertForSequenceClassification):
        torch.manual_seed(0)
        kind(transformers.BertConfig(**sizes)).save_pretrained(tmp_path / kind.__name__)
        assert type(reopen(tmp_path / kind.__name__)[0]) is kind


def test_a_missing_weight_is_an_error_that_names_it(folder):
    change_weights(folder, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: needed by the model"):
        reopen(folder)


def test_a_tied_head_need_not_be_stored(folder):
    model, _, _ = reopen(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    "name", ["model.layers.2.mlp.up_proj.weight", "model.norm.bias", "model.layers.0.self_attn.q_norm.weight"]
)
def test_a_weight_that_finds_no_place_is_an_error_that_names_it(folder, name):
    change_weights(folder, lambda weights: weights.update({name: torch.ones(8)}))
    with pytest.raises(ModelError, match="the model has no place for it") as caught:
        reopen(folder)
    assert name in str(caught.value)


def test_the_head_of_another_task_is_left_out_and_that_is_said(folder):
    change_weights(folder, lambda weights: weights.update({"score.weight": torch.ones(2, 32)}))
    _, _, said = reopen(folder)
    assert "score.weight" in said[0]


def test_weights_of_another_shape_are_all_named(folder):
    edit(folder / "config.json", intermediate_size=48)
    with pytest.raises(ModelError) as caught:
        reopen(folder)
    assert "6 problems" in str(caught.value)
    assert "model.layers.0.mlp.down_proj.weight: (32, 64) in the file, but (32, 48) in the model" in str(caught.value)


def test_a_model_that_brings_its_own_code_is_not_run_unless_trusted(folder, tmp_path):
    proof = tmp_path / "it-ran"
    (folder / "modeling_own.py").write_text(
        f"open({str(proof)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    own = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    edit(folder / "config.json", model_type="own", architectures=["OwnForCausalLM"], auto_map=own)
    with pytest.raises(ModelError, match="trust_remote_code: true") as caught:
        reopen(folder)
    assert "modeling_own.OwnForCausalLM" in str(caught.value)
    assert not proof.exists()
    model, _, said = reopen(folder, trust_remote_code=True)
    assert type(model).__name__ == "OwnForCausalLM"
    assert proof.exists()
    assert "running Python code that comes with the model" in said[0]


@pytest.mark.parametrize("changes", [{"num_attention_heads": 0}, {"hidden_size": "x"}, {"vocab_size": None}])
def test_an_impossible_configuration_is_an_error_that_names_the_folder(folder, changes):
    edit(folder / "config.json", **changes)
    with pytest.raises(ModelError, match=f"cannot open {re.escape(str(folder))}"):
        reopen(folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"[]"),
        ("tokenizer_config.json", b"["),
        ("chat_template.jinja", b"\xff"),
    ],
)
def test_a_damaged_tokenizer_is_an_error_that_names_its_folder_and_files(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(ModelError, match=f"the tokenizer in {re.escape(str(folder))} cannot be opened") as caught:
        reopen(folder)
    assert name in str(caught.value) or "chat template" in str(caught.value)


def test_an_architecture_that_transformers_does_not_know_is_an_error_that_names_it(folder):
    edit(folder / "config.json", model_type="hal9000")
    with pytest.raises(ModelError, match="hal9000"):
        reopen(folder)


# ------------------------------------------------------------------------------------------------------------- finding


def test_a_folder_is_found_by_its_path(folder):
    assert pretrained.locate(str(folder)) == ModelPlace(str(folder), folder, "folder")


def test_only_hub_models_have_a_revision(folder):
    with pytest.raises(ConfigError, match="revision"):
        pretrained.locate(str(folder), revision="main")


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere", "a/b/c", "x.gguf", "", ".."])
def test_what_looks_like_a_path_is_never_asked_of_the_hub(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("onebase.base.hub.locate_on_hub", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(ModelError):
        pretrained.locate(name)


def test_an_unknown_name_offline_says_what_was_looked_for_and_where(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError) as caught:
        pretrained.locate("smollm")
    for part in (
        "'smollm'",
        "closest is 'smollm2-135m-instruct'",
        str(tmp_path / "smollm"),
        "offline",
        "hub",
        "onebase models",
    ):
        assert part in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------- GGUF


def test_a_gguf_file_becomes_a_plain_folder_once_the_same_bytes_each_time(tmp_path, monkeypatch, capfd):
    path = tiny.gguf_file(tmp_path / "tiny.gguf")
    said: list[str] = []
    first = pretrained.locate(str(path), say=said.append)
    assert pretrained.locate(str(path), say=said.append) == first
    assert len(said) == 2  # what it does, and that it is ready
    assert capfd.readouterr() == ("", "")
    monkeypatch.setenv("ONEBASE_HOME", str(tmp_path / "second"))
    shutil.copy(path, tmp_path / "renamed.gguf")
    second = pretrained.locate(str(tmp_path / "renamed.gguf"), say=said.append)
    names = sorted(file.name for file in first.folder.iterdir())
    assert names == sorted(file.name for file in second.folder.iterdir())
    for name in names:
        content = (first.folder / name).read_bytes()
        assert content == (second.folder / name).read_bytes(), name
        assert str(tmp_path).encode() not in content, name


def test_a_converted_gguf_file_holds_its_weights_end_token_and_template(tmp_path):
    import gguf

    path = tiny.gguf_file(tmp_path / "tiny.gguf")
    model, tokenizer, _ = pretrained.open_pretrained(pretrained.locate(str(path), say=tiny.hush))
    stored = {tensor.name: torch.tensor(tensor.data) for tensor in gguf.GGUFReader(path).tensors}
    assert torch.equal(model.model.embed_tokens.weight, stored["token_embd.weight"])
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight, stored["blk.1.ffn_down.weight"])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert pretrained.generation_config_of(model).eos_token_id == 2
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x"
    assert tokenizer.model_max_length == 128


@pytest.mark.parametrize(("pre", "tokens"), [("smollm", 3), ("gpt-2", 4)])
def test_digits_are_split_off_first_where_the_model_learned_them_so(tmp_path, pre, tokens):
    path = tiny.gguf_file(tmp_path / "tiny.gguf", pre=pre)
    _, tokenizer, _ = pretrained.open_pretrained(pretrained.locate(str(path), say=tiny.hush))
    assert len(tokenizer.tokenize("\n\n12")) == tokens
    assert tokenizer.decode(tokenizer("a  1\n\n12")["input_ids"]) == "a  1\n\n12"


def test_a_gguf_file_that_is_cut_off_is_an_error_and_leaves_nothing(tmp_path):
    whole = tiny.gguf_file(tmp_path / "tiny.gguf").read_bytes()
    for size in (2, 100, len(whole) // 2):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(FileFormatError, match=r"cut\.gguf"):
            pretrained.locate(str(tmp_path / "cut.gguf"), say=tiny.hush)
    models = cache.home() / "models"
    assert not models.exists() or not [path for path in models.iterdir() if path.is_dir()]


def test_a_conversion_that_is_killed_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    path = tiny.gguf_file(tmp_path / "tiny.gguf")

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pretrained, "clean_json", killed)
        with pytest.raises(KeyboardInterrupt):
            pretrained.locate(str(path), say=tiny.hush)
    assert not [path for path in (cache.home() / "models").iterdir() if path.is_dir()]
    assert pretrained.open_pretrained(pretrained.locate(str(path), say=tiny.hush))[0] is not None


# ----------------------------------------------------------------------------------------- what others need of transformers


def test_a_registered_attention_is_called_and_can_be_forgotten(folder):
    calls = []

    def attend(module, query, key, value, attention_mask, **_):
        calls.append(attention_mask)
        return query.transpose(1, 2).contiguous(), None

    pretrained.register_attention("onebase-test", attend)
    try:
        model, _, _ = reopen(folder)
        model.set_attn_implementation("onebase-test")
        model(input_ids=torch.tensor([[1, 3, 4]]))
    finally:
        pretrained.unregister_attention("onebase-test")
    assert calls == [None, None]
    with pytest.raises((KeyError, ValueError)):
        reopen(folder)[0].set_attn_implementation("onebase-test")
    pretrained.unregister_attention("onebase-test")


def test_checkpointed_blocks_are_recomputed_under_the_callers_contexts_with_the_same_gradient(folder):
    from contextlib import contextmanager, nullcontext

    recomputed = []

    @contextmanager
    def noted():
        recomputed.append(1)
        yield

    model, _, _ = reopen(folder)
    ids = torch.tensor([[1, 3, 4]])

    def gradient():
        embedded = model.model.embed_tokens(ids).detach().requires_grad_()
        model(inputs_embeds=embedded, use_cache=False).logits.square().sum().backward()
        return embedded.grad

    plain = gradient()
    blocks = pretrained.enable_checkpointing(model, lambda: (nullcontext(), noted()))
    assert blocks == list(model.model.layers)
    for block in blocks:
        block.training = True
    assert torch.equal(gradient(), plain)
    assert len(recomputed) == len(blocks)
    for block in blocks:
        block.training = False
    pretrained.disable_checkpointing(model)
    assert torch.equal(gradient(), plain)
    assert len(recomputed) == len(blocks)


def test_a_model_without_blocks_to_recompute_says_so():
    with pytest.raises(ConfigError, match="activation_checkpointing"):
        pretrained.enable_checkpointing(torch.nn.Linear(2, 2), lambda: (None, None))
