"""Which modules a setting names is what PEFT chooses; where PEFT is silent, this raises."""

import re
from typing import Any

import peft
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from onebase.adapters.bank import Bank
from onebase.adapters.lora import LoraPart, rank_and_alpha
from onebase.adapters.matching import Candidate, choose_targets
from onebase.adapters.pair import scaling_of
from onebase.config.methods import Lora
from onebase.errors import TargetError
from tests import tiny

PATHS = [
    f"model.layers.{n}.{part}"
    for n in range(12)
    for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.experts.3.w1", "mlp.experts.3.w11")
] + ["encoder.layer.0.output.dense", "encoder.layer.0.attention.output.dense", "encoder.layer.1.output.dense", "score"]
CANDIDATES = [
    Candidate(path, "linear", "attention" if "att" in path else "head" if path == "score" else "mlp") for path in PATHS
]
NAMES = [
    "q_proj",
    "proj",
    "self_attn.q_proj",
    "w1",
    "dense",
    "output.dense",
    "layers.1.mlp.up_proj",
    "score",
    *PATHS[:2],
]
EXPRESSIONS = [r".*q_proj", r".*\.layers\.[02]\.mlp\..*", r"model\..*", r"q_proj", r".*w1", r".*dense|score"]


def by_peft(**settings):
    config = peft.LoraConfig(**settings)
    return [path for path in PATHS if check_target_module_exists(config, path) is True
            or isinstance(check_target_module_exists(config, path), re.Match)]  # fmt: skip


def ours(**settings):
    try:
        return list(choose_targets(CANDIDATES, model_name="m", **settings).paths)
    except TargetError:
        return None


def hits(name):
    return [path for path in PATHS if path == name or path.endswith("." + name)]


@given(
    st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True) | st.sampled_from(EXPRESSIONS),
    st.none() | st.lists(st.sampled_from(NAMES), min_size=1, max_size=2, unique=True) | st.sampled_from(EXPRESSIONS),
    st.none() | st.integers(0, 4) | st.lists(st.integers(0, 13), min_size=1, max_size=3),
    st.none() | st.sampled_from(["layers", "layer", "experts", ["layer", "layers"], "blocks"]),
)
def test_the_chosen_modules_are_pefts(target_modules, exclude_modules, layers, layers_pattern):
    assume(layers is not None or layers_pattern is None)
    assume(layers is None or not isinstance(target_modules, str))  # PEFT refuses both; ours may restrict an expression
    mine = ours(
        target_modules=target_modules, exclude_modules=exclude_modules, layers_to_transform=layers,
        layers_pattern=layers_pattern,
    )  # fmt: skip
    theirs = by_peft(
        target_modules=target_modules, exclude_modules=exclude_modules, layers_to_transform=layers,
        layers_pattern=layers_pattern,
    )  # fmt: skip
    # a path that a list names in full is PEFT's whatever its layer; a list with layers means the layers to us
    if layers is not None and any(name in PATHS for name in target_modules):
        return
    if mine is None:
        assert (
            theirs == []
            or any(not hits(name) for name in _names(target_modules) + _names(exclude_modules))
            or (exclude_modules is not None or layers is not None)
        )
    else:
        assert mine == theirs


def _names(names):
    return [] if names is None or isinstance(names, str) else list(names)


@pytest.mark.parametrize("names", [["q_proj", "up_proj"], ["output.dense"], ["self_attn.v_proj"], [PATHS[3]]])
def test_lists_of_names_choose_something_and_pefts(names):
    assert ours(target_modules=names) == by_peft(target_modules=names) != []


def test_layers_choose_something_and_pefts():
    settings = {"target_modules": ["w1", "q_proj"], "layers_to_transform": [1, 3]}
    assert ours(**settings) == by_peft(**settings)
    assert len(ours(**settings)) == 4
    settings |= {"layers_pattern": "experts", "layers_to_transform": 3}
    assert ours(target_modules=["w1"], layers_to_transform=3, layers_pattern="experts") == by_peft(
        target_modules=["w1"], layers_to_transform=3, layers_pattern="experts"
    )


# ---------------------------------------------------------------------------------------------------- on real modules

ALL = sorted(tiny.ARCHITECTURES) + sorted(tiny.ENCODERS)


def peft_targets(model, **settings) -> dict[str, Any]:
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings))
    return {
        name.removeprefix("base_model.model."): module
        for name, module in adapted.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


@pytest.mark.parametrize("name", sorted({*ALL} - {"mixtral", "qwen3-moe"}))  # PEFT adapts router and experts
def test_all_linear_is_pefts_all_linear(name):
    adapter = Bank(tiny.base_of(name)).add("a", Lora())
    assert list(adapter.target_paths) == list(peft_targets(tiny.model_of(name), target_modules="all-linear"))


CASES: dict[str, dict[str, Any]] = {
    "names": {"target_modules": ["q_proj", "down_proj"]},
    "suffix": {"target_modules": ["self_attn.v_proj"]},
    "expression": {"target_modules": r".*\.1\..*(q|k)_proj"},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["gate_proj"]},
    "excluded by expression": {"target_modules": "all-linear", "exclude_modules": r".*layers\.0.*"},
    "one layer": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
    "layers": {"target_modules": ["q_proj"], "layers_to_transform": [0, 1], "layers_pattern": "layers"},
    "ranks": {
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\.up_proj": 5, r".*\.down_proj": 7},
        "alpha_pattern": {"v_proj": 5, r".*\.0\..*": 9},
    },
    "whole-path rank": {"target_modules": ["q_proj"], "rank_pattern": {"model.layers.0.self_attn.q_proj": 2}},
    "rslora": {
        "target_modules": ["q_proj"],
        "use_rslora": True,
        "r": 9,
        "rank_pattern": {"layers.0.self_attn.q_proj": 4},
    },
    "the head": {"target_modules": ["lm_head", "q_proj"]},
}


@pytest.mark.parametrize("case", CASES)
def test_modules_ranks_and_scalings_are_pefts(case):
    settings = {"r": 8, "lora_alpha": 12} | CASES[case]
    theirs = peft_targets(tiny.model_of("llama"), **settings)
    mine = {
        part.path: part for part in Bank(tiny.base_of()).add("a", Lora(**settings)).parts if isinstance(part, LoraPart)
    }
    assert list(mine) == list(theirs)
    for path, target in mine.items():
        other = theirs[path]
        assert target.r == other.r["default"]
        assert target.scaling == pytest.approx(other.scaling["default"])
        assert target.lora_A.shape == other.lora_A["default"].weight.shape
        assert target.lora_B.shape == other.lora_B["default"].weight.shape


@given(st.integers(1, 64), st.floats(0.1, 100), st.booleans())
def test_the_scaling_is_alpha_over_r_or_its_root(r, alpha, use_rslora):
    assert scaling_of(r, alpha, use_rslora) * (r**0.5 if use_rslora else r) == pytest.approx(alpha)


def test_the_first_pattern_that_matches_wins():
    settings = Lora(r=8, lora_alpha=1, rank_pattern={"v_proj": 1, ".*proj": 2}, alpha_pattern={"q": 3})
    assert rank_and_alpha(settings, "a.v_proj") == (1, 1.0)
    assert rank_and_alpha(settings, "a.q_proj") == (2, 1.0)
    assert rank_and_alpha(settings, "a.q") == (8, 3.0)
    assert rank_and_alpha(settings, "v_proj") == (1, 1.0)


# -------------------------------------------------------------------------------------------------------- what raises


def error_of(**settings):
    with pytest.raises(TargetError) as caught:
        Bank(tiny.base_of()).add("a", Lora(**settings))
    return str(caught.value)


def test_a_name_that_matches_nothing_beside_one_that_does_is_named_with_the_closest():
    message = error_of(target_modules=["q_proj", "v_prj", "zzz"])
    assert "'v_prj' matches none of 16 linear layers, convolutions and embeddings; closest is 'v_proj'" in message
    assert "'zzz' matches none" in message
    assert "onebase targets tiny-llama" in message
    assert "q_proj' matches" not in message


def test_a_pattern_of_ranks_or_alphas_that_means_no_target_is_named_with_the_closest():
    message = error_of(
        target_modules=["q_proj", "v_proj"], rank_pattern={"q_prj": 2, "v_proj": 3}, alpha_pattern={"up_proj": 5}
    )
    assert "adapter.rank_pattern: 'q_prj' matches none of the 4 targets; closest is 'q_proj'" in message
    assert "adapter.alpha_pattern: 'up_proj' matches none" in message  # a layer of the model, but no target
    assert "'v_proj' matches" not in message


@pytest.mark.parametrize("expression", ["q_prj", "q_proj"])
def test_an_expression_that_matches_nothing_says_that_it_must_match_whole_paths(expression):
    message = error_of(target_modules=expression)
    assert "whole path" in message
    assert expression in message


def test_an_exclusion_that_matches_nothing_is_named():
    assert "adapter.exclude_modules: 'k_prj'" in error_of(target_modules=["k_proj"], exclude_modules=["k_prj"])


def test_a_layer_that_is_not_there_is_named():
    message = error_of(target_modules=["k_proj"], layers_to_transform=[0, 7])
    assert "layers_to_transform" in message
    assert "7" in message
    assert "0 to 1" in message


def test_excluding_everything_is_an_error():
    assert "nothing is left" in error_of(target_modules=["k_proj"], exclude_modules=["k_proj"])


def test_several_problems_are_reported_at_once():
    message = error_of(target_modules=["k_prj", "zzz"], exclude_modules=["xyz"])
    assert all(part in message for part in ("k_prj", "xyz", "zzz"))


def test_fused_experts_raise_and_say_what_they_are():
    with pytest.raises(TargetError, match=r"experts \(experts\).*go into adapter\.target_parameters"):
        Bank(tiny.base_of("mixtral")).add("a", Lora(target_modules=["experts"]))


def test_a_preset_that_means_no_layer_here_says_what_there_is():
    with pytest.raises(TargetError, match="linear layers by a preset in this version, got experts \\(experts\\)"):
        Bank(tiny.base_of("mixtral")).add("a", Lora(target_modules="mlp"))


def test_mixtrals_router_and_fused_experts_are_not_taken_for_linear_layers():
    adapter = Bank(tiny.base_of("mixtral")).add("a", Lora())
    assert len(adapter.target_paths) == 8
    assert all("self_attn" in path for path in adapter.target_paths)
    assert adapter.warnings == ("all-linear means linear layers and leaves out experts (experts)",)


def test_what_is_excluded_need_not_be_chosen_but_must_be_there():
    adapter = Bank(tiny.base_of()).add("a", Lora(target_modules=["k_proj"], exclude_modules=["lm_head", "v_proj"]))
    assert len(adapter.target_paths) == 2


def test_a_failed_add_leaves_the_base_as_it_was():
    base = tiny.base_of()
    before = [(name, id(module)) for name, module in base.model.named_modules()]
    with pytest.raises(TargetError):
        Bank(base).add("a", Lora(target_modules=["q_proj", "nothing"]))
    assert [(name, id(module)) for name, module in base.model.named_modules()] == before


def test_a_layer_that_is_never_called_is_no_target():
    """nn.MultiheadAttention reads its out_proj's weight itself."""
    base = tiny.base_of()
    base.model.model.layers[0].looking = nn.MultiheadAttention(32, 2)
    bank = Bank(base)
    with pytest.raises(TargetError, match="out_proj \\(linear, but never called\\)"):
        bank.add("a", Lora(target_modules=["out_proj"]))
    assert not [path for path in bank.add("b", Lora()).target_paths if "out_proj" in path]


# -------------------------------------------------------------------------------------------------- what is warned of


def test_a_name_that_is_in_some_blocks_only_is_warned_about():
    base = tiny.base_of()
    base.model.model.layers[1].self_attn.extra = nn.Linear(4, 4)
    warnings = Bank(base).add("a", Lora(r=4, target_modules=["extra", "q_proj"])).warnings
    assert warnings == ("extra is adapted in 1/2 blocks",)


@pytest.mark.parametrize("settings", [{}, {"target_modules": ["q_proj"], "layers_to_transform": [1]}])
def test_what_was_asked_for_is_not_warned_about(settings):
    assert Bank(tiny.base_of()).add("a", Lora(**settings)).warnings == ()


@pytest.mark.parametrize(("preset", "inside"), [("attention", "self_attn"), ("mlp", "mlp")], ids=["attention", "mlp"])
def test_the_presets_are_the_layers_of_their_role(preset, inside):
    base = tiny.base_of()
    every = [p for p, m in base.model.named_modules() if isinstance(m, nn.Linear) and f".{inside}." in p]
    assert list(Bank(base).add("a", Lora(target_modules=preset)).target_paths) == every


def test_targets_are_in_the_models_order_whatever_the_order_of_the_names():
    base = tiny.base_of()
    order = [name for name, _ in base.model.named_modules()]
    paths = list(Bank(base).add("a", Lora(target_modules=["up_proj", "q_proj", "k_proj"])).target_paths)
    assert paths == sorted(paths, key=order.index)
