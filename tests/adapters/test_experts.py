"""LoRA on stacked experts is PEFT's: names, losses, gradients, merged weights; each row of a mixed batch keeps to itself."""

from typing import Any

import peft
import pytest
import torch
from torch import nn

from onebase.adapters.bank import Bank
from onebase.adapters.experts import pair_width
from onebase.base.model import Base
from onebase.config.methods import Lora
from onebase.errors import TargetError
from onebase.measure.forward import forward_loss
from tests import tiny
from tests.adapters.against_peft import assert_equal_to_peft, filled
from tests.adapters.bare import Holder, draws

EAGER: dict[str, Any] = {"experts_implementation": "eager"}  # the fused experts of transformers know no fp64
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
SETTINGS: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj"]}


@pytest.mark.parametrize(
    "settings",
    [
        {"target_parameters": BOTH},
        {"target_parameters": ["experts.down_proj"], "use_rslora": True},
        {"target_parameters": BOTH, "target_modules": []},
        {
            "target_parameters": BOTH,
            "rank_pattern": {"experts.down_proj": 2},
            "alpha_pattern": {"experts.gate_up_proj": 7},
        },
        {"target_parameters": [*BOTH, "gate.weight"]},
    ],
)
def test_it_is_pefts(settings):
    given = SETTINGS | settings
    assert_equal_to_peft("mixtral", Lora(**given), peft.LoraConfig(**given), **EAGER)


class Transposed(nn.Module):
    """Experts that keep (experts, in, out)."""

    is_transposed = True

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(draws(4, 5, 6))

    def forward(self, x, chosen):
        return torch.einsum("ni,nio->no", x, self.weight[chosen])


def test_transposed_stacks_are_pefts_too():
    given: dict[str, Any] = {"r": 2, "lora_alpha": 5, "target_modules": [], "target_parameters": ["layer.weight"]}
    bank = Bank(Base(Holder(Transposed()), name="bare"))
    adapter = filled(bank, "one", Lora(**given))
    theirs = peft.get_peft_model(Holder(Transposed()), peft.LoraConfig(**given), autocast_adapter_dtype=False)
    peft.set_peft_model_state_dict(theirs, {f"base_model.model.{k}": v.clone() for k, v in adapter.state.items()})
    x, chosen = draws(7, 5), torch.arange(7) % 4
    with bank.base.native(bank.sole_route("one")) as model:
        torch.testing.assert_close(model(x, chosen), theirs(x, chosen))


def test_a_fresh_one_changes_no_bit_and_a_mixed_batch_keeps_its_rows_apart():
    bank = Bank(tiny.base_of("mixtral", dtype=torch.float64, **EAGER))
    bank.add("fresh", Lora(**SETTINGS, target_parameters=BOTH))
    for name in ("one", "two"):
        filled(bank, name, Lora(**SETTINGS, target_parameters=BOTH), size=0.3 if name == "one" else 0.5)
    examples = tiny.examples_of(9, 21, 4, 7)
    owners = ("one", "two", None, "fresh")

    def losses(*owners):
        with torch.no_grad():
            batch = tiny.batch_of(examples, *owners)
            rows = forward_loss(bank, batch, 1.0)[1].loss
        return rows.split([node.labels for node in batch.layout.nodes])

    mixed = losses(*owners)
    for place, owner in enumerate(owners):
        torch.testing.assert_close(mixed[place], losses(owner)[place], rtol=1e-6, atol=1e-7)
    assert torch.equal(losses("fresh")[3], losses(None)[3])
    assert (losses("one")[0] - losses(None)[0]).abs().max() > 1e-3


def test_its_size_is_known_before_it_is_made():
    bank = Bank(tiny.base_of("mixtral"))
    adapter = bank.add("one", Lora(r=3, target_modules=[], target_parameters=BOTH))
    module = bank.places.module("model.layers.0.mlp.experts")
    assert adapter.parameter_count == 2 * 3 * sum(pair_width(weight) for weight in module.parameters())


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"target_parameters": ["experts.gate_up_prj"]},
            r"'experts.gate_up_prj' matches no parameter; closest is 'experts.gate_up_proj'",
        ),
        ({"target_parameters": ["zzz"]}, r"stacked ones here are experts.down_proj, experts.gate_up_proj"),
        ({"target_parameters": ["norm.weight"]}, r"norm.weight has shape \(32,\); LoRA goes on matrices"),
        ({"target_parameters": ["q_proj.weight"]}, r"which is a target already"),
        ({"target_parameters": BOTH, "lora_dropout": 0.1}, "lora_dropout cannot be had on bare parameters"),
        ({"target_parameters": BOTH, "use_dora": True}, "use_dora cannot be had on bare parameters"),
        ({"target_parameters": BOTH, "init_lora_weights": "pissa"}, "init_lora_weights cannot be had"),
        ({"target_parameters": BOTH, "r": 33}, r"33 is larger than .*q_proj \(32 x 32\)"),
        (
            {"target_parameters": BOTH, "r": 40, "rank_pattern": {"q_proj": 4}},
            r"40 is larger than .*gate_up_proj \(128 x 32\)",
        ),
        ({"target_parameters": BOTH, "rank_pattern": {"experts.up": 4}}, r"'experts.up' matches none"),
    ],
)
def test_what_cannot_be_is_an_error_that_says_what_to_do(settings, message):
    with pytest.raises(TargetError, match=message):
        Bank(tiny.base_of("mixtral")).add("one", Lora(**SETTINGS | settings))
