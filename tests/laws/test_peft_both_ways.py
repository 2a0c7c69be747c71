"""Every method that PEFT has, through files: what PEFT saved computes the same here, and what we saved the same there."""

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors.torch import load_file

from onebase.adapters.bank import Bank
from onebase.adapters.build import BUILDERS
from onebase.config.methods import BitFit, Bottleneck, Full, Ia3, LnTuning, Lora, PrefixTuning, PromptTuning
from onebase.errors import FileFormatError
from onebase.files.peft_format import read_adapter
from onebase.measure.forward import batches_of
from onebase.ops.segments import Segments
from onebase.train import opening, saving
from tests import tiny

PREFIX = "base_model.model."
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 2e-5}
BIASED = {"attention_bias": True}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@dataclass(frozen=True)
class Case:
    """One adapter as both know it: our settings, PEFT's configuration, and the model that it is on."""

    ours: Any
    theirs: Any
    architecture: str = "llama"
    changes: dict[str, Any] = field(default_factory=dict)


def lora(ours: dict[str, Any] | None = None, theirs: dict[str, Any] | None = None, **both: Any) -> tuple[Any, Any]:
    """Return our settings and PEFT's configuration of one LoRA; `ours` and `theirs` are what only one of them takes."""
    both = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], **both}
    return Lora(**both, **(ours or {})), peft.LoraConfig(task_type="CAUSAL_LM", **both, **(theirs or {}))


CASES: dict[str, Case] = {
    "lora": Case(*lora()),
    "rslora, ranks and alphas by pattern": Case(
        *lora(use_rslora=True, rank_pattern={"down_proj": 2}, alpha_pattern={r"layers\.0\..*": 3})
    ),
    "lora on all linear layers": Case(*lora(target_modules="all-linear")),
    "lora on some layers": Case(*lora(layers_to_transform=[1])),
    "lora on the head": Case(*lora(target_modules=["lm_head", "v_proj"])),
    "dora": Case(*lora(use_dora=True)),
    "dora with rslora and biases": Case(*lora(use_dora=True, use_rslora=True, bias="all"), changes=BIASED),
    "all biases": Case(*lora(bias="all"), changes=BIASED),
    "targets' biases": Case(*lora(bias="lora_only"), changes=BIASED),
    "ia3": Case(Ia3(), peft.IA3Config(task_type="CAUSAL_LM")),
    "ia3 on outputs alone": Case(
        Ia3(target_modules=["q_proj", "v_proj"], feedforward_modules=[]),
        peft.IA3Config(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], feedforward_modules=[]),
    ),
    "ia3 on some blocks": Case(
        Ia3(target_modules=["k_proj", "down_proj"], layers_to_transform=[1]),
        peft.IA3Config(
            task_type="CAUSAL_LM",
            target_modules=r".*layers\.1\..*(k_proj|down_proj)",
            feedforward_modules=r".*down_proj",
        ),
    ),
    "prompt tuning": Case(
        PromptTuning(num_virtual_tokens=5), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    ),
    "prefix tuning": Case(
        PrefixTuning(num_virtual_tokens=5), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    ),
    "prefix tuning with a projection": Case(
        PrefixTuning(num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=12),
        peft.PrefixTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=12
        ),
    ),
    "lora on gpt-2's transposed layers": Case(
        *lora(target_modules=["c_attn", "c_proj"], theirs={"fan_in_fan_out": True}), architecture="gpt2"
    ),
    "dora on gpt-2's transposed layers": Case(
        *lora(target_modules=["c_attn"], theirs={"fan_in_fan_out": True}, use_dora=True), architecture="gpt2"
    ),
    "ia3 on gpt-2's transposed layers": Case(
        Ia3(), peft.IA3Config(task_type="CAUSAL_LM", fan_in_fan_out=True), architecture="gpt2"
    ),
    "layernorm tuning": Case(
        LnTuning(), peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=r".*norm|.*layernorm")
    ),
    "layernorm tuning of gpt-2, with biases": Case(
        LnTuning(target_modules=["ln_1", "ln_f"], modules_to_save=["wpe"]),
        peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["ln_1", "ln_f"], modules_to_save=["wpe"]),
        architecture="gpt2",
    ),
    "whole modules beside lora": Case(*lora(modules_to_save=["lm_head", "post_attention_layernorm"])),
    "whole modules with short names beside dora": Case(
        *lora({"modules_to_save": ["model.norm"]}, {"modules_to_save": ["l.norm"]}, use_dora=True)
    ),
    "a whole block beside ia3": Case(
        Ia3(target_modules=["k_proj"], feedforward_modules=[], modules_to_save=["layers.1.mlp"]),
        peft.IA3Config(
            task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[], modules_to_save=["layers.1.mlp"]
        ),
    ),
    "token rows beside lora": Case(*lora(trainable_token_indices=[3, 7, 11])),
    "token rows by name beside dora": Case(
        *lora(trainable_token_indices={"embed_tokens": [3, 7], "lm_head": [5]}, use_dora=True)
    ),
    "token rows of a tied model": Case(*lora(trainable_token_indices=[3, 7, 11]), architecture="llama-tied"),
    "token rows tied by name": Case(
        *lora(trainable_token_indices={"embed_tokens": [3, 7]}, ensure_weight_tying=True), architecture="llama-tied"
    ),
    "lora on a tied embedding": Case(
        *lora(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True), architecture="llama-tied"
    ),
    "a whole tied embedding": Case(
        *lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True), architecture="llama-tied"
    ),
    "lora on an embedding that stays tied in the base alone": Case(
        *lora(target_modules=["embed_tokens", "q_proj"]), architecture="llama-tied"
    ),
    "stacked experts": Case(*lora(target_parameters=EXPERTS, target_modules=["q_proj"]), architecture="mixtral"),
    "stacked experts alone": Case(*lora(target_parameters=EXPERTS, target_modules=[]), architecture="mixtral"),
    "one stack of experts, by its last name": Case(
        *lora(target_parameters=["down_proj"], target_modules=["q_proj"]), architecture="mixtral"
    ),
    "stacked experts with ranks and alphas by pattern": Case(
        *lora(
            target_parameters=EXPERTS,
            target_modules=["q_proj"],
            rank_pattern={"experts.down_proj": 2},
            alpha_pattern={"experts.gate_up_proj": 7, "q_proj": 5},
        ),
        architecture="mixtral",
    ),
    "stacked experts of another family": Case(
        *lora(target_parameters=EXPERTS, target_modules=["q_proj"]), architecture="qwen3-moe"
    ),
    "gaussian start": Case(*lora(init_lora_weights="gaussian")),
    "orthogonal start": Case(*lora(init_lora_weights="orthogonal")),
    "lora on the embedding": Case(*lora(target_modules=["embed_tokens", "q_proj"])),
    "dora on the embedding": Case(*lora(target_modules=["embed_tokens", "q_proj"], use_dora=True)),
}


def trained(model: Any, config: Any) -> Any:
    """Return PEFT's model with an adapter whose tensors are all away from their start."""
    wrapped = peft.get_peft_model(model, config)
    draws = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=draws))
    return wrapped.eval()


@torch.no_grad()
def our_logits(bank: Bank, name: str) -> list[torch.Tensor]:
    """Return the logits of every example's tokens, all examples in one flat batch."""
    examples = tiny.examples_of(9, 21, 4)
    batches = list(batches_of(bank, name, examples, range(len(examples)), 10_000))
    [batch] = batches
    rows = torch.tensor([i for i, token in enumerate(batch.token_ids.tolist()) if token < tiny.VOCABULARY])
    hidden = bank.base.hidden(batch.token_ids, bank.route(batch.layout))[rows]
    logits = bank.head.logits(hidden, Segments.of([len(hidden)], [bank._number(name)]))
    return list(logits.split(examples.lengths.tolist()))


@torch.no_grad()
def their_logits(wrapped: Any) -> list[torch.Tensor]:
    """Return PEFT's logits for the same tokens, each example alone."""
    found = []
    for example in tiny.examples_of(9, 21, 4):
        ids = torch.from_numpy(example.token_ids.astype("int64"))[None]
        logits = wrapped(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
        found.append(logits[-ids.shape[1] :])
    return found


def assert_same_logits(bank: Bank, name: str, wrapped: Any) -> None:
    for found, expected in zip(our_logits(bank, name), their_logits(wrapped), strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)


def our_bank(case: Case) -> Bank:
    """Return a bank on the case's model that holds another adapter already."""
    bank = Bank(tiny.base_of(case.architecture, **case.changes))
    tiny.fill_(bank.add("another", case.ours, seed=8))
    return bank


def plain_keys(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


@pytest.fixture(params=CASES, ids=[name.replace(" ", "-") for name in CASES])
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def test_what_peft_saved_computes_the_same_here(case: Case, tmp_path: Path) -> None:
    wrapped = trained(tiny.model_of(case.architecture, **case.changes), case.theirs)
    wrapped.save_pretrained(tmp_path)
    stored = read_adapter(tmp_path)
    bank = our_bank(case)
    opening.check_base(bank.base, stored, allow_base_mismatch=False)
    adapter = bank.add("one", stored.settings, tensors=stored.tensors)
    in_file = plain_keys(load_file(tmp_path / "adapter_model.safetensors"))
    learned = {name: tensor for name, tensor in in_file.items() if name not in stored.base_copies}
    assert adapter.file_tensors.keys() == {
        n for n in learned if n.replace(".base_layer.", ".") not in stored.base_copies
    }
    assert all(torch.equal(tensor, in_file[name]) for name, tensor in adapter.file_tensors.items())
    assert_same_logits(bank, "one", wrapped)


def test_what_we_saved_computes_the_same_there(case: Case, tmp_path: Path) -> None:
    bank = our_bank(case)
    adapter = tiny.fill_(bank.add("one", case.ours, seed=2)) or bank.adapters["one"]
    saving.write(tmp_path / "a", bank.base, adapter, task="chat")
    model = tiny.model_of(case.architecture, **case.changes)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected|fan_in_fan_out).*")
        wrapped = peft.PeftModel.from_pretrained(model, tmp_path / "a").eval()
    in_file = plain_keys(load_file(tmp_path / "a" / "adapter_model.safetensors"))
    theirs = plain_keys(get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    assert theirs.keys() == in_file.keys()
    assert all(torch.equal(tensor, in_file[name]) for name, tensor in theirs.items())
    assert_same_logits(bank, "one", wrapped)


def test_what_we_saved_is_what_we_read(case: Case, tmp_path: Path) -> None:
    bank = our_bank(case)
    adapter = tiny.fill_(bank.add("one", case.ours, seed=2)) or bank.adapters["one"]
    saving.write(tmp_path / "a", bank.base, adapter, task="chat")
    stored = read_adapter(tmp_path / "a")
    again = bank.add("again", stored.settings, tensors=stored.tensors)
    assert again.file_tensors.keys() == adapter.file_tensors.keys()
    for found, expected in zip(our_logits(bank, "again"), our_logits(bank, "one"), strict=True):
        assert torch.equal(found, expected)
    assert not stored.notes


OWN = [settings for settings in (BitFit(), Bottleneck(reduction_factor=4), Full()) if type(settings) in BUILDERS]


@pytest.mark.parametrize("settings", OWN, ids=lambda settings: settings.method)
def test_a_format_of_our_own_is_read_here_and_refused_there(settings: Any, tmp_path: Path) -> None:
    bank = our_bank(Case(settings, None, changes=BIASED))
    adapter = bank.add("one", settings, seed=2)
    tiny.fill_(adapter)
    saving.write(tmp_path / "a", bank.base, adapter, task="chat")
    stored = read_adapter(tmp_path / "a")
    again = bank.add("again", stored.settings, tensors=stored.tensors)
    assert again.file_tensors.keys() == adapter.file_tensors.keys() and again.target_paths == adapter.target_paths
    for found, expected in zip(our_logits(bank, "again"), our_logits(bank, "one"), strict=True):
        assert torch.equal(found, expected)
    with pytest.raises((KeyError, ValueError), match=f"ONEBASE_{settings.method.upper()}"):
        peft.PeftModel.from_pretrained(tiny.model_of("llama"), tmp_path / "a")


NATIVE: dict[str, tuple[Any, dict[str, Any]]] = {
    "t5": (lora(target_modules=["q", "wo"]), {"task_type": "SEQ_2_SEQ_LM"}),
    "vit": (lora(target_modules=["q_proj", "projection"], modules_to_save=["classifier"]), {"task_type": None}),
    "plain": (lora(target_modules=["first", "along", "linear"], modules_to_save=["last"]), {"task_type": None}),
    "plain with groups": (lora(target_modules=["grouped"], modules_to_save=["norm"]), {"task_type": None}),
}


@pytest.mark.parametrize("name", NATIVE)
def test_convolutions_images_and_two_stacks_both_ways(name: str, tmp_path: Path) -> None:
    (ours, theirs), changes = NATIVE[name]
    for key, value in changes.items():
        setattr(theirs, key, value)
    architecture = name.partition(" ")[0]
    inputs = tiny.native_inputs(architecture, 3)
    wrapped = trained(tiny.model_of(architecture), theirs)
    wrapped.save_pretrained(tmp_path / "theirs")
    bank = Bank(tiny.base_of(architecture))
    tiny.fill_(bank.add("another", ours, seed=8))
    stored = read_adapter(tmp_path / "theirs")
    bank.add("one", stored.settings, tensors=stored.tensors)
    with torch.no_grad():
        expected = tiny.numbers_of(wrapped(**inputs))
        found = tiny.native_outputs(bank.base, bank.batch_route(["one"] * 3), inputs)
        torch.testing.assert_close(found, expected, **CLOSE)
        saving.write(tmp_path / "ours", bank.base, bank.adapters["one"], task="chat")
        again = peft.PeftModel.from_pretrained(tiny.model_of(architecture), tmp_path / "ours").eval()
        torch.testing.assert_close(tiny.numbers_of(again(**inputs)), expected, **CLOSE)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize("more", [{}, {"use_rslora": True, "rank_pattern": {"down_proj": 2}}, {"use_dora": True}])
def test_a_start_from_the_base_is_saved_as_twice_the_rank_and_pefts_own_is_refused(
    init: Any, more: dict[str, Any], tmp_path: Path
) -> None:
    settings, config = lora(init_lora_weights=init, **more)
    bank = our_bank(Case(settings, config))
    adapter = bank.add("one", settings, seed=2)
    with torch.no_grad():
        for _, parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
    saving.write(tmp_path / "a", bank.base, adapter, task="chat")
    wrapped = peft.PeftModel.from_pretrained(tiny.model_of("llama"), tmp_path / "a").eval()
    assert_same_logits(bank, "one", wrapped)
    stored = read_adapter(tmp_path / "a")
    assert isinstance(stored.settings, Lora) and stored.settings.r == 2 * settings.r
    bank.add("again", stored.settings, tensors=stored.tensors)
    assert_same_logits(bank, "again", wrapped)
    trained(tiny.model_of("llama"), config).save_pretrained(tmp_path / "raw")
    with pytest.raises(FileFormatError, match=r"init_lora_weights: .* belongs to a base that it changed"):
        read_adapter(tmp_path / "raw")
