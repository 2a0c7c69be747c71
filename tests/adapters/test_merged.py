"""Merged into the live base: as a plain merged model, and afterwards every byte and place of the base as it was."""

from typing import Any

import peft
import pytest
import torch

from onebase.adapters.bank import Bank
from onebase.adapters.merging import Merged, merged_state, plain_state
from onebase.base.fingerprint import fingerprint_of_state
from onebase.config.methods import Lora
from onebase.errors import ConfigError, TargetError
from tests import families, tiny

NO_WEIGHTS = {"bottleneck", "prompt-tuning", "prefix-tuning"}
IDS = torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(1))


def places_of(bank: Bank) -> dict[str, int]:
    return {key: tensor.data_ptr() for key, tensor in plain_state(bank.base.model).items()}


def logits(bank: Bank, name: str | None) -> torch.Tensor:
    with torch.no_grad(), bank.base.native(bank.sole_route(name)) as model:
        return model(input_ids=IDS).logits.clone()


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "bert", "mixtral"])
def test_every_method_is_in_the_base_while_it_is_merged_and_every_byte_is_back_afterwards(name):
    bank = families.bank_on(name)
    before, places = fingerprint_of_state(bank.base.model), places_of(bank)
    for seed, (label, (kind, settings)) in enumerate(families.variants().items()):
        try:
            adapter = bank.add("own", kind(**settings), seed=seed)
        except (ConfigError, TargetError):
            continue  # docs/coverage.md says which and why
        families.perturb_(tiny.as_dtype_(adapter, torch.float64), seed)
        if adapter.settings.method in NO_WEIGHTS:
            with pytest.raises(ConfigError, match="cannot be merged"):
                Merged(bank, "own")
        else:
            unmerged = families.run(bank, dict.fromkeys(range(3), "own"))[0]
            expected = merged_state(bank, "own")
            with Merged(bank, "own"):
                now = plain_state(bank.base.model)
                assert all(torch.equal(now[key], tensor) for key, tensor in expected.items()), label
                merged = families.run(bank, dict.fromkeys(range(3), None))[0]
            for i, rows in unmerged.items():
                families.check_same(f"{label}, entry {i}", merged[i], rows, bank)
        bank.remove("own")
        assert fingerprint_of_state(bank.base.model) == before, label
    assert {key: places[key] for key in places} == places_of(bank)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_adapters_merged_and_unmerged_as_peft_merges_them_and_to_the_byte(dtype):
    bank = tiny.bank_of(tiny.base_of("llama", dtype=dtype), "one", "two", dtype=torch.float32)
    config = {"target_modules": list(bank.adapters["one"].target_paths), "lora_alpha": 8}
    theirs: Any = peft.get_peft_model(tiny.model_of("llama", dtype=dtype), peft.LoraConfig(r=4, **config), "one")
    theirs.add_adapter("two", peft.LoraConfig(r=5, **config))
    for name in ("one", "two"):
        state = {f"base_model.model.{key}": value for key, value in bank.adapters[name].state.items()}
        peft.set_peft_model_state_dict(theirs, state, name)
    theirs.merge_adapter(["one", "two"])
    before = fingerprint_of_state(bank.base.model)
    merged = Merged(bank, ["one", "two"])
    rounding = 1e-6 if dtype == torch.float32 else 2**-7  # theirs is rounded after each of the two, as ours is
    for path in bank.adapters["one"].target_paths:
        expected = theirs.get_submodule(f"base_model.model.{path}").base_layer.weight
        torch.testing.assert_close(bank.places.module(path).weight, expected, rtol=rounding, atol=rounding)
    assert fingerprint_of_state(bank.base.model) != before
    merged.unmerge()
    merged.unmerge()
    assert fingerprint_of_state(bank.base.model) == before


def test_what_was_merged_last_has_to_go_first():
    bank = tiny.bank_of(tiny.base_of("llama"), "one", "two")
    before, alone = fingerprint_of_state(bank.base.model), logits(bank, "two")
    first = Merged(bank, "one")
    second = Merged(bank, "two")
    with pytest.raises(ConfigError, match=r"something was merged after it\. Unmerge that first"):
        first.unmerge()
    second.unmerge()
    first.unmerge()
    assert fingerprint_of_state(bank.base.model) == before
    assert torch.equal(logits(bank, "two"), alone)


def test_a_merge_that_fails_half_way_leaves_the_base_as_it_was():
    bank = tiny.bank_of(tiny.base_of("llama-tied"), "one")
    tiny.fill_(bank.add("head", Lora(r=2, target_modules=["lm_head"])))
    before = fingerprint_of_state(bank.base.model)
    with pytest.raises(ConfigError, match=r"lm_head\.weight and model\.embed_tokens\.weight are one weight"):
        Merged(bank, ["one", "head"])
    assert fingerprint_of_state(bank.base.model) == before
    with pytest.raises(ConfigError, match="no adapter 'nobody'"):
        Merged(bank, "nobody")


def test_parts_that_are_relative_to_the_base_alone_are_merged_alone():
    bank = tiny.bank_of(tiny.base_of("llama"), "one")
    tiny.fill_(bank.add("scaled", Lora(r=2, use_dora=True)))
    with pytest.raises(ConfigError, match=r"'scaled' has parts that do not add to the base"):
        Merged(bank, ["one", "scaled"])
    with Merged(bank, "scaled"):
        pass
