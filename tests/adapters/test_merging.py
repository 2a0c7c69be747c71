"""A plain model with the merged state does what base and adapter do together; the base is never written."""

import copy
from typing import Any

import peft
import pytest
import torch

from onebase.adapters.bank import Bank
from onebase.adapters.merging import merged_state, plain_state
from onebase.base.fingerprint import fingerprint_of_state
from onebase.base.model import Base
from onebase.config.methods import Ia3, Lora
from onebase.errors import ConfigError, TargetError
from tests import families, tiny

DECODERS = ["llama", "llama-tied", "qwen3", "gemma2", "phi3", "gpt-neox", "opt", "bloom", "qwen3-moe"]
SETTINGS: dict[str, Any] = {"r": 4, "lora_alpha": 8}
EAGER: dict[str, Any] = {"experts_implementation": "eager"}  # the fused experts of transformers know no fp64


def bank_with(name: str, dtype: torch.dtype = torch.float64, *, method: Any = Lora, **settings: Any) -> Bank:
    changes: dict[str, Any] = EAGER if name == "qwen3-moe" else {}
    bank = Bank(tiny.base_of(name, dtype=dtype, **changes))
    for seed, adapter in enumerate(("other", "own")):
        tiny.fill_(bank.add(adapter, method(**settings), seed=seed), seed=seed, size=0.2)
    return bank


def plain_with(bank: Bank, state: dict[str, torch.Tensor], name: str, **changes: Any) -> Any:
    """Return a model as transformers makes it, with a merged state loaded."""
    changes |= EAGER if name == "qwen3-moe" else {}
    model = tiny.model_of(name, dtype=bank.base.dtype, seed=5, **changes)
    model.load_state_dict(state)
    return model.requires_grad_(False)


def ids(count: int = 3) -> torch.Tensor:
    return torch.randint(3, 60, (count, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("method", [(Lora, SETTINGS), (Lora, {**SETTINGS, "use_rslora": True}), (Ia3, {})])
def test_a_plain_model_with_the_merged_state_gives_the_unmerged_logits(name, method):
    kind, settings = method
    bank = bank_with(name, method=kind, **settings)
    before = fingerprint_of_state(bank.base.model)
    with bank.base.native(bank.sole_route("own")) as model:
        unmerged = model(input_ids=ids()).logits.detach()
    merged = plain_with(bank, merged_state(bank, "own"), name)(input_ids=ids()).logits
    torch.testing.assert_close(merged, unmerged, rtol=1e-6, atol=1e-8 * float(unmerged.abs().max()))
    with bank.base.native(bank.sole_route(None)) as model:
        assert (model(input_ids=ids()).logits - unmerged).abs().max() > 1e-3
    assert fingerprint_of_state(bank.base.model) == before


@pytest.mark.parametrize("name", [*tiny.NATIVE, "plain", "bert"])
def test_native_models_and_encoders_merge_too(name):
    targets = ["linear"] if name == "plain" else "all-linear"
    bank = bank_with(name, target_modules=targets, **SETTINGS)
    inputs = {"input_ids": ids()} if name == "bert" else tiny.native_inputs(name, 3)
    inputs = {key: x.double() if x.is_floating_point() else x for key, x in inputs.items()}
    unmerged = tiny.native_outputs(bank.base, bank.sole_route("own"), inputs)
    plain = plain_with(bank, merged_state(bank, "own"), name)(**inputs)
    torch.testing.assert_close(tiny.numbers_of(plain), unmerged, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["llama", "gpt-neox"])
@pytest.mark.parametrize("rslora", [False, True])
def test_merged_weights_are_those_of_pefts_merge_and_unload(name, rslora):
    bank = bank_with(name, torch.float32, use_rslora=rslora, **SETTINGS)
    adapter = bank.adapters["own"]
    config = peft.LoraConfig(target_modules=list(adapter.target_paths), use_rslora=rslora, **SETTINGS)
    theirs = peft.get_peft_model(tiny.model_of(name), config)
    peft.set_peft_model_state_dict(theirs, {f"base_model.model.{key}": value for key, value in adapter.state.items()})
    expected = theirs.merge_and_unload().state_dict()
    found = merged_state(bank, "own")
    assert list(found) == list(expected)
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-6, atol=1e-6)


def test_half_precision_is_merged_in_fp32_and_rounded_once():
    bank = bank_with("llama", torch.bfloat16, **SETTINGS)
    found = merged_state(bank, "own")
    adapter = bank.adapters["own"]
    for part in adapter.parts:
        tensors: Any = part
        own = bank.places.module(part.path).weight
        exact = own.double() + 2.0 * tensors.lora_B.double() @ tensors.lora_A.double()
        assert found[f"{part.path}.weight"].dtype == torch.bfloat16
        off = (found[f"{part.path}.weight"].double() - exact).abs()
        assert bool((off <= exact.abs() * 2**-8 * 1.001 + 1e-7).all())  # half a unit in the last place


def test_what_the_adapter_is_not_on_is_the_bases_own_tensor():
    bank = bank_with("llama", target_modules=["q_proj"], **SETTINGS)
    own, found = plain_state(bank.base.model), merged_state(bank, "own")
    assert list(found) == list(own) == list(tiny.model_of("llama").state_dict())
    same = {key for key in own if found[key].data_ptr() == own[key].data_ptr()}
    assert {key for key in own if key not in same} == {f"{p.path}.weight" for p in bank.adapters["own"].parts}


class _OnOneTwin:
    """A part that changes a weight which its base shares."""

    def __init__(self, path: str) -> None:
        self.path = path

    def parameters(self):
        return iter(())

    def merge_(self, module: Any) -> None:
        module.weight += 1


def test_a_shared_weight_that_would_differ_is_refused_or_untied():
    bank = Bank(tiny.base_of("llama-tied"))
    adapter = copy.copy(bank.add("own", Lora(target_modules=["q_proj"])))
    object.__setattr__(adapter, "parts", (_OnOneTwin("model.embed_tokens"),))
    bank._adapters["own"] = adapter
    with pytest.raises(ConfigError, match=r"model\.embed_tokens\.weight and lm_head\.weight are one weight"):
        merged_state(bank, "own")
    state = merged_state(bank, "own", untie=True)
    assert torch.equal(state["model.embed_tokens.weight"], state["lm_head.weight"] + 1)
    object.__setattr__(adapter, "parts", (_OnOneTwin("model.embed_tokens"), _OnOneTwin("lm_head")))
    state = merged_state(bank, "own")  # both change alike: still one weight
    assert torch.equal(state["model.embed_tokens.weight"], state["lm_head.weight"])


def test_a_part_that_cannot_be_written_into_its_module_says_so():
    bank = Bank(tiny.base_of("llama"))
    adapter = bank.add("own", Lora(target_modules=["q_proj"]))

    class Odd:
        path = "model.layers.0.self_attn.q_proj"

        def parameters(self):
            return iter(())

    object.__setattr__(adapter, "parts", (Odd(),))
    with pytest.raises(ConfigError, match=r"'own' \(lora\) cannot be merged: a Odd cannot be written into .*q_proj"):
        merged_state(bank, "own")


def test_an_adapter_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match="no adapter 'nobody' in the bank; it has none"):
        merged_state(Bank(tiny.base_of("llama")), "nobody")


NO_WEIGHTS = {"bottleneck", "prompt-tuning", "prefix-tuning"}


@pytest.mark.parametrize("name", families.ALL)
def test_every_method_merges_to_what_it_does_unmerged_or_says_why_it_cannot(name):
    bank = families.bank_on(name)
    before = fingerprint_of_state(bank.base.model)
    for seed, (label, (kind, settings)) in enumerate(families.variants().items()):
        try:
            adapter = bank.add("own", kind(**settings), seed=seed)
        except (ConfigError, TargetError):
            continue  # docs/coverage.md says which and why
        families.perturb_(tiny.as_dtype_(adapter, torch.float64), seed)
        if adapter.settings.method in NO_WEIGHTS:
            with pytest.raises(ConfigError, match=rf"'own' \({adapter.settings.method}\) cannot be merged: it"):
                merged_state(bank, "own")
        else:
            unmerged = families.run(bank, dict.fromkeys(range(3), "own"))[0]
            plain = tiny.model_of(name, dtype=torch.float64, seed=7, **families.EAGER.get(name, {}))
            plain.load_state_dict(merged_state(bank, "own"))
            merged = families.run(Bank(Base(plain, name=bank.base.name)), dict.fromkeys(range(3), None))[0]
            for i, rows in unmerged.items():
                families.check_same(f"{label}, entry {i}", merged[i], rows, bank)
        bank.remove("own")
    assert fingerprint_of_state(bank.base.model) == before
