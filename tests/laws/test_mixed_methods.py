"""Every method in one bank and one mixed batch equals itself alone: what comes out, and every gradient."""

import pytest
import torch

from onebase.adapters.bank import Bank
from onebase.config.methods import Lora
from onebase.errors import ConfigError, TargetError
from tests import families, tiny

# What a model cannot have, or not in a mixed batch, by name: docs/coverage.md says why.
NO_BIAS = {"bitfit", "lora+bias", "lora+lora-only-bias"}
NO_PREFIX = {"prefix-tuning", "prefix-tuning+projection"}
NO_VIRTUAL = NO_PREFIX | {"prompt-tuning"}
MISSING: dict[str, set[str]] = {
    **dict.fromkeys(("llama", "llama-tied", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "modernbert"), NO_BIAS),
    **dict.fromkeys(("qwen3-moe", "mixtral"), NO_BIAS | {"bottleneck-pfeiffer"}),
    "bloom": NO_PREFIX,
    "opt": {"full"},
    "distilbert": NO_PREFIX,
    "t5": NO_BIAS | NO_VIRTUAL | {"full"},
    "vit": NO_VIRTUAL,
    "plain": NO_VIRTUAL | {"bottleneck-houlsby", "bottleneck-pfeiffer", "ia3"},
}


def fill(bank: Bank) -> None:
    """Add every method that the model can have, each away from where it starts."""
    token_rows = {"lora+token-rows": (Lora, {"r": 4, "trainable_token_indices": [3, 5, 60]})}
    for seed, (label, (kind, settings)) in enumerate((families.variants() | token_rows).items()):
        try:
            bank.add(label, kind(**settings), seed=seed)
        except (ConfigError, TargetError):
            continue
        try:
            families.run(bank, {0: label, 1: None})
        except ConfigError:  # it shares no batch on this model, and says so
            bank.remove(label)
            continue
        families.perturb_(tiny.as_dtype_(bank.adapters[label], torch.float64), seed)


def results(bank: Bank, owners: dict[int, str | None]) -> dict[int, torch.Tensor]:
    tiny.clear_gradients(bank)
    numbers, loss = families.run(bank, owners)
    loss.backward()
    return numbers


@pytest.mark.parametrize("name", families.ALL)
def test_every_method_in_one_mixed_batch_equals_itself_alone(name):
    bank, own = families.bank_on(name), families.bank_on(name)
    fill(bank)
    assert set(families.variants()) - set(bank.adapters) == MISSING.get(name, set())
    members: list[str | None] = [*bank.adapters, None]
    owners = dict(enumerate([*members, *bank.adapters]))  # each has two entries, far apart
    together = results(bank, owners)
    gradients = {label: tiny.gradients(bank, label) for label in bank.adapters}
    plain = families.run(own, dict.fromkeys(owners, None))[0]
    for label, adapter in bank.adapters.items():
        own.add(label, adapter.settings, seed=adapter.seed)
        tiny.as_dtype_(own.adapters[label], torch.float64).load_state_(adapter.state)
        alone = results(own, {i: owner for i, owner in owners.items() if owner == label})
        for i, rows in alone.items():
            families.check_same(label, together[i], rows, bank)
            assert (rows - plain[i]).abs().max() > 1e-6, f"{label} changes nothing"
        for key, gradient in tiny.gradients(own, label).items():
            families.check_same(key, gradients[label][key], gradient, bank)
        own.remove(label)
    nobodys = len(members) - 1
    families.check_same("the base alone", together[nobodys], plain[nobodys], bank)
