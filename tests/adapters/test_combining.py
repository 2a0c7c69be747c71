"""Adapters combined: what PEFT's add_weighted_adapter makes of the same ones, and the laws that each way keeps."""

import warnings
from typing import Any

import peft
import pytest
import torch

from onebase.adapters import combining
from onebase.adapters.bank import Bank
from onebase.adapters.combining import SIGN_METHODS, WAYS, Recipe, combine
from onebase.adapters.ingredients import Ingredient, ingredient_of
from onebase.adapters.lora import rank_and_alpha
from onebase.adapters.merging import merged_state
from onebase.adapters.pair import Pair
from onebase.config.methods import Ia3, Lora
from onebase.errors import CapacityError, ConfigError
from tests import tiny

WEIGHTS = [0.7, -0.4, 1.3]
EXACT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-13}
DROPPING = [how for how in WAYS if how.startswith(("ties", "dare", "magnitude"))]
ON_PAIRS = [how for how in WAYS if not how.endswith("svd") and how != "cat"]


def recipe(how: str, **given: Any) -> Recipe:
    return Recipe(how, density=given.pop("density", 0.6 if how in DROPPING else None), **given)


def bank_with(model: str, *settings: dict[str, Any], dtype: torch.dtype = torch.float64) -> Bank:
    """Return a bank of adapters "0", "1", ... some way off their start."""
    bank = Bank(tiny.base_of(model, dtype=dtype))
    for number, own in enumerate(settings):
        adapter = tiny.as_dtype_(bank.add(str(number), Lora(**own), seed=number), dtype)
        draws = torch.Generator().manual_seed(number)
        for _, parameter in adapter.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=draws, dtype=dtype)
    return bank


def parts_of(bank: Bank) -> list[Ingredient]:
    return [ingredient_of(adapter) for adapter in bank.adapters.values()]


def updates(adapter: Any) -> dict[str, torch.Tensor]:
    """Return what each layer's dense weight gets, by the bank's own parts."""
    found = {}
    for part in adapter.parts:
        assert isinstance(part, Pair)
        A, B = part.factors()
        found[part.path] = part.scaling * (B @ A)
    return found


def combined(bank: Bank, weights: list[float], how: Recipe, order: list[int] | None = None) -> dict[str, torch.Tensor]:
    """Return the updates of the combination, put on the base."""
    chosen = order or list(range(len(bank.adapters)))
    sources = parts_of(bank)
    settings, tensors = combine([sources[i] for i in chosen], [weights[i] for i in chosen], how)
    whole = Bank(tiny.base_of(bank.base.name.removeprefix("tiny-"), dtype=bank.base.dtype))
    adapter = tiny.as_dtype_(whole.add("whole", settings, tensors=tensors), torch.float64)
    adapter.load_state_(tensors)
    assert all(part.scaling == 1 for part in adapter.parts)
    return updates(adapter)


def weighted_sum(bank: Bank, weights: list[float]) -> dict[str, torch.Tensor]:
    total: dict[str, torch.Tensor] = {}
    for weight, adapter in zip(weights, bank.adapters.values(), strict=True):
        for path, update in updates(adapter).items():
            total[path] = total.get(path, torch.zeros_like(update)) + weight * update
    return total


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-12) -> None:
    assert found.keys() == expected.keys()
    for path, update in expected.items():
        scale = update.abs().max()
        assert scale > 1e-3, path
        torch.testing.assert_close(found[path] / scale, update / scale, rtol=0, atol=tolerance, msg=path)


# ------------------------------------------------------------------------------------------------------------- PEFT

TARGETS = {
    "llama": [
        ["embed_tokens", "q_proj", "v_proj", "down_proj"],
        ["q_proj", "k_proj", "up_proj", "embed_tokens"],
        ["q_proj", "up_proj"],
    ],
    "gpt2": [["wte", "c_attn", "c_proj"], ["c_attn", "wte"], ["c_attn", "c_fc"]],
    "plain": [["first", "linear"], ["first"], ["first", "linear"]],
}
KINDS: list[dict[str, Any]] = [{"lora_alpha": 8}, {"lora_alpha": 6, "use_rslora": True}, {"lora_alpha": 5}]


def bank_and_peft(model: str, ranks: tuple[int, ...], dtype: torch.dtype) -> tuple[Bank, Any]:
    """Return a bank of three adapters and PEFT's model with the same."""
    own = [
        {"r": r, "target_modules": names} | kind for r, names, kind in zip(ranks, TARGETS[model], KINDS, strict=True)
    ]
    bank = bank_with(model, *own, dtype=dtype)
    plain = tiny.model_of(model, dtype=dtype)
    if model == "plain":  # PEFT asks a model for its configuration
        plain.config = {"model_type": "custom"}
    theirs: Any = None
    for name, settings in zip(bank.adapters, own, strict=True):
        config = peft.LoraConfig(**settings)
        if theirs is None:
            theirs = peft.get_peft_model(plain, config, adapter_name=name, autocast_adapter_dtype=False)
        else:
            theirs.add_adapter(name, config, autocast_adapter_dtype=False)
        state = {f"base_model.model.{key}": value for key, value in bank.adapters[name].state.items()}
        assert not peft.set_peft_model_state_dict(theirs, state, adapter_name=name).unexpected_keys
    return bank, theirs


def their_updates(theirs: Any, name: str) -> dict[str, torch.Tensor]:
    """Return PEFT's updates by path, one row an output, fp64."""
    found = {}
    for path, module in theirs.base_model.model.named_modules():
        if name in getattr(module, "lora_A", {}) or name in getattr(module, "lora_embedding_A", {}):
            update = module.get_delta_weight(name).detach().double()
            flipped = getattr(module, "fan_in_fan_out", False) or name in module.lora_embedding_A
            found[path] = update.T if flipped else update.flatten(1)
    return found


def with_our_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let PEFT keep the numbers that we kept of the same tensor, which it may hold transposed."""
    drawn: list[tuple[torch.Tensor, torch.Tensor]] = []
    own = combining._drawn

    def recorded(tensor: torch.Tensor, density: float, key: int) -> torch.Tensor:
        kept = own(tensor, density, key)
        drawn.append((tensor, kept != 0))
        return kept

    def given(tensor: torch.Tensor, density: float, rescale: bool) -> torch.Tensor:
        assert rescale
        matrix = tensor.flatten(1)
        for ours, mask in drawn:
            if ours.shape == matrix.shape and torch.allclose(ours, matrix):
                return tensor * mask.view(tensor.shape) / density
            if ours.shape == matrix.T.shape and torch.allclose(ours, matrix.T):
                return tensor * mask.T / density
        raise AssertionError("a tensor that we did not draw for")

    monkeypatch.setattr(combining, "_drawn", recorded)
    monkeypatch.setattr(peft.utils.merge_utils, "random_pruning", given)


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("model", TARGETS)
def test_every_way_gives_pefts_update_on_every_layer(model, how, monkeypatch):
    with_our_draws(monkeypatch)
    uneven = how in ("cat", "svd") or how.endswith("_svd")
    bank, theirs = bank_and_peft(model, (4, 2, 3) if uneven else (4, 4, 4), torch.float64)
    rank = {"svd_rank": 3} if how.endswith("svd") else {}
    for method in SIGN_METHODS if "ties" in how else SIGN_METHODS[:1]:
        own = combined(bank, WEIGHTS, recipe(how, majority_sign_method=method, **rank))
        theirs.add_weighted_adapter(
            list(bank.adapters), WEIGHTS, method, how, density=0.6, majority_sign_method=method, **rank
        )
        assert_same(own, their_updates(theirs, method), 1e-6)  # PEFT's weights are fp32
        total = weighted_sum(bank, WEIGHTS)
        assert how == "cat" or any((own[path] - update).abs().max() > 1e-3 for path, update in total.items())


@pytest.mark.parametrize("how", ["cat", "linear", "ties", "magnitude_prune"])  # a cut in fp32 is 1e-6 off in PEFT
def test_fp32_gives_pefts_update_too(how):
    bank, theirs = bank_and_peft("llama", (4, 4, 4), torch.float32)
    own = combined(bank, WEIGHTS, recipe(how))
    theirs.add_weighted_adapter(list(bank.adapters), WEIGHTS, "new", how, density=0.6)
    assert_same(own, their_updates(theirs, "new"), 1e-6)


# ------------------------------------------------------------------------------------------------------------- laws

MIXED: dict[str, list[dict[str, Any]]] = {
    "ranks": [{"r": 4}, {"r": 2, "use_rslora": True}, {"r": 3, "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 3}}],
    "starts": [{"r": 2, "init_lora_weights": "pissa"}, {"r": 3, "init_lora_weights": "olora", "use_rslora": True}, {"r": 4}],
    "targets": [{"r": 2, "target_modules": names} for names in TARGETS["llama"]],
    "convolutions": [{"r": 4, "target_modules": ["first", "along"]}, {"r": 1, "target_modules": ["along", "linear"]}, {"r": 1, "target_modules": ["first"]}],
}  # fmt: skip


def mixed(kind: str) -> Bank:
    return bank_with("plain" if kind == "convolutions" else "llama", *MIXED[kind])


@pytest.mark.parametrize("kind", MIXED)
def test_cat_is_the_weighted_sum(kind):
    bank = mixed(kind)
    assert_same(combined(bank, WEIGHTS, Recipe("cat")), weighted_sum(bank, WEIGHTS))


@pytest.mark.parametrize("kind", MIXED)
def test_svd_with_room_is_the_weighted_sum_and_without_the_nearest_of_its_rank(kind):
    bank = mixed(kind)
    total = weighted_sum(bank, WEIGHTS)
    assert_same(combined(bank, WEIGHTS, Recipe("svd", svd_rank=5 if kind == "convolutions" else 16)), total)
    left = {}
    for path, update in combined(bank, WEIGHTS, Recipe("svd", svd_rank=2)).items():
        left[path] = torch.linalg.svdvals(total[path])[2:].norm()
        assert torch.linalg.matrix_rank(update) <= 2
        torch.testing.assert_close((update - total[path]).norm(), left[path], rtol=1e-10, atol=1e-12)
    assert max(left.values()) > 0.1


@pytest.mark.parametrize("how", ["cat", "linear", "svd"])
def test_one_adapter_with_weight_1_is_given_back(how):
    bank = bank_with("llama", {"r": 3, "lora_alpha": 7})
    assert_same(combined(bank, [1], Recipe(how)), updates(bank.adapters["0"]))


@pytest.mark.parametrize("how", ["cat", "linear", "svd"])
def test_an_adapter_with_weight_0_leaves_nothing_of_itself(how):
    bank = bank_with("llama", {"r": 3, "target_modules": ["q_proj"]}, {"r": 3, "target_modules": ["q_proj"]})
    assert_same(combined(bank, [0, -2], Recipe(how)), weighted_sum(bank, [0, -2]))


@pytest.mark.parametrize("how", DROPPING)
def test_keeping_everything_of_one_adapter_gives_it_back(how):
    bank = bank_with("llama", {"r": 3, "lora_alpha": 7})
    assert_same(combined(bank, [1], recipe(how, density=1)), updates(bank.adapters["0"]))


@pytest.mark.parametrize("how", [how for how in WAYS if not how.startswith("dare")])
def test_the_order_of_adapters_changes_nothing_that_is_not_drawn(how):
    bank = bank_with("llama", *({"r": 4, "target_modules": names} for names in TARGETS["llama"]))
    assert_same(
        combined(bank, WEIGHTS, recipe(how)), combined(bank, WEIGHTS, recipe(how), order=[2, 0, 1]), tolerance=1e-9
    )


@pytest.mark.parametrize("how", WAYS)
def test_a_layer_that_an_adapter_does_not_have_is_one_of_zeros(how):
    bank = bank_with("llama", {"r": 4}, {"r": 4, "target_modules": ["q_proj", "v_proj"]}, {"r": 4})
    without = parts_of(bank)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in without[0].tensors.items()}
    padded = Ingredient("1", without[1].settings, {**zeros, **without[1].tensors})
    (_, short), (_, full) = (
        combine([without[0], one, without[2]], WEIGHTS, recipe(how)) for one in (without[1], padded)
    )
    assert short.keys() == full.keys()
    for path in bank.adapters["0"].target_paths:
        found, expected = (t[f"{path}.lora_B.weight"] @ t[f"{path}.lora_A.weight"] for t in (short, full))
        torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("how", [how for how in WAYS if how.startswith("dare")])
def test_draws_follow_from_the_seed_alone(how):
    bank = bank_with("llama", {"r": 4, "target_modules": ["q_proj"]}, {"r": 4, "target_modules": ["q_proj"]})
    with tiny.global_randomness_untouched():
        first = combine(parts_of(bank), [1, 1], recipe(how, seed=3))[1]
    torch.manual_seed(1)
    again, other = (combine(parts_of(bank), [1, 1], recipe(how, seed=seed))[1] for seed in (3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_draws_are_independent_between_adapters_layers_and_tensors_and_keep_the_mean(monkeypatch):
    seen: list[torch.Tensor] = []
    own = combining.keep_mask

    def recorded(*given: Any) -> torch.Tensor:
        seen.append(own(*given))
        return seen[-1]

    monkeypatch.setattr(combining, "keep_mask", recorded)
    bank = bank_with("llama", *[{"r": 32, "target_modules": ["q_proj", "o_proj"]}] * 2)
    combine(parts_of(bank), [1, 1], recipe("dare_linear", density=0.25))
    assert len({mask.numpy().tobytes() for mask in seen}) == len(seen) == 16
    share = torch.stack(seen).double().mean()
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / (16 * 32 * 32)) ** 0.5


def test_ties_averages_those_that_have_the_elected_sign():
    rows = torch.tensor([[1.0, -2.0, 3.0, 0.1]]), torch.tensor([[2.0, 3.0, -1.0, 0.2]]), torch.tensor([[3.0, 2, -1, 0]])
    sources = [
        Ingredient(str(i), Lora(r=1, lora_alpha=1), {"x.lora_A.weight": row, "x.lora_B.weight": torch.ones(4, 1)})
        for i, row in enumerate(rows)
    ]
    _, total = combine(sources, [1, 1, 1], Recipe("ties", density=0.75))
    torch.testing.assert_close(total["x.lora_A.weight"], torch.tensor([[2.0, 2.5, 3.0, 0.0]]))
    _, count = combine(sources, [1, 1, 1], Recipe("ties", density=0.75, majority_sign_method="frequency"))
    torch.testing.assert_close(count["x.lora_A.weight"], torch.tensor([[2.0, 2.5, -1.0, 0.0]]))


def test_ranks_that_differ_between_layers_are_in_the_settings_also_where_one_path_ends_as_another():
    tensors = {
        f"{path}.lora_{letter}.weight": torch.ones(*((r, 4) if letter == "A" else (6, r)))
        for path, r in {"x": 2, "a.x": 3, "b.x": 2, "c.x": 2, "c.a.x": 1}.items()
        for letter in "AB"
    }
    settings = Lora(r=2, lora_alpha=2, rank_pattern={"c.a.x": 1, "a.x": 3})
    made, whole = combine([Ingredient("one", settings, tensors)], [1], Recipe("cat"))
    assert all(torch.equal(whole[name], tensor) for name, tensor in tensors.items() if "lora_B" in name)
    for path, r in {"x": 2, "a.x": 3, "b.x": 2, "c.x": 2, "c.a.x": 1}.items():
        assert rank_and_alpha(made, path) == (r, r)


@pytest.mark.parametrize("how", WAYS)
def test_a_head_tied_to_its_embedding_stays_tied(how):
    given = {"r": 3, "target_modules": ["embed_tokens", "lm_head", "q_proj"], "ensure_weight_tying": True}
    bank = bank_with("llama-tied", given, given)
    settings, tensors = combine(parts_of(bank), [0.5, -1.5], recipe(how))
    whole = Bank(tiny.base_of("llama-tied", dtype=torch.float64))
    whole.add("whole", settings, tensors=tensors)
    merged = merged_state(whole, "whole")
    assert torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])
    if how == "cat":
        A, B = "model.embed_tokens.lora_embedding_A", "model.embed_tokens.lora_embedding_B"
        first, second = (adapter.state for adapter in bank.adapters.values())
        total = 32 / 3 * (0.5 * first[B] @ first[A] - 1.5 * second[B] @ second[A])
        torch.testing.assert_close(tensors[B] @ tensors[A], total, **EXACT)


def test_a_sum_of_fp32_is_cut_as_if_in_fp64():
    bank = bank_with("llama", {"r": 4}, {"r": 4}, dtype=torch.float32)
    found = combined(bank, [1, -1], Recipe("svd"))
    for adapter in bank.adapters.values():
        tiny.as_dtype_(adapter, torch.float64)
    exact = combined(bank, [1, -1], Recipe("svd"))
    assert_same(found, exact, 2e-7)


def test_half_precision_is_combined_in_fp32():
    bank = bank_with("llama", {"r": 3}, {"r": 3}, dtype=torch.bfloat16)
    _, tensors = combine(parts_of(bank), [0.3, 0.3], Recipe("cat"))
    for adapter in bank.adapters.values():
        tiny.as_dtype_(adapter, torch.float64)
    for path, update in weighted_sum(bank, [0.3, 0.3]).items():
        A, B = tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"]
        assert A.dtype == B.dtype == torch.float32
        torch.testing.assert_close(B.double() @ A.double(), update, rtol=0, atol=1e-6 * float(update.abs().max()))


# -------------------------------------------------------------------------------------------------------- bad input


def message(sources: list[Ingredient], weights: Any, how: Recipe) -> str:
    with pytest.raises(ConfigError) as caught, warnings.catch_warnings():
        combine(sources, weights, how)
    return str(caught.value)


def pair(name: str = "one", r: int = 2, path: str = "x", out: int = 6, **settings: Any) -> Ingredient:
    A, B = torch.ones(r, 4), torch.ones(out, r)
    return Ingredient(name, Lora(r=r, **settings), {f"{path}.lora_A.weight": A, f"{path}.lora_B.weight": B})


@pytest.mark.parametrize(
    ("how", "told"),
    [
        (Recipe("tise", density=0.5), "how: 'tise' is no way to combine; closest is 'ties'"),
        (Recipe("?"), "there are cat, svd, linear"),
        (Recipe("ties"), "density: ties needs it"),
        (Recipe("dare_ties", density=0), "density: must be above 0 and at most 1, got 0"),
        (Recipe("dare_ties", density=1.5), "got 1.5"),
        (Recipe("dare_ties", density=float("nan")), "got nan"),
        (Recipe("cat", density=0.5), "density: cat drops nothing"),
        (Recipe("ties", density=0.01), "density 0.01 keeps none of the 8 numbers of x.lora_A"),
        (Recipe("linear", svd_rank=2), "svd_rank: linear cuts to no rank"),
        (Recipe("svd", svd_rank=0), "svd_rank: must be a whole number from 1, got 0"),
        (Recipe("svd", svd_rank=5), "svd_rank: 5 is more than x has room for, which is 4"),
        (Recipe("ties", density=0.5, majority_sign_method="most"), "must be total or frequency, got 'most'"),
        (Recipe("cat", majority_sign_method="frequency"), "cat elects no sign"),
    ],
)
def test_a_recipe_that_is_none_is_refused(how, told):
    assert told in message([pair(), pair()], [1, 1], how)


@pytest.mark.parametrize(
    ("weights", "told"),
    [
        ([1], "weights: must be one for each of 2 adapters, got 1"),
        ([1, float("nan")], "weights: must be finite numbers, got nan"),
        ([1, float("inf")], "got inf"),
        ([1, 10**400], "got 1000"),
        ([0, 0.0], "all are 0"),
        ([1e38, 1e38], "x comes out as NaN or infinite"),
    ],
)
def test_weights_that_are_none_are_refused(weights, told):
    assert told in message([pair(lora_alpha=1000), pair()], weights, Recipe("cat"))


DORA = {"x.lora_magnitude_vector": torch.ones(6)}


@pytest.mark.parametrize(
    ("sources", "told"),
    [
        ([], "there is no adapter"),
        ([pair(), Ingredient("scales", Ia3(), {})], "scales: is IA3; only LoRA adapters can be combined"),
        ([pair(use_dora=True)], "one: use_dora cannot be combined. Merge the adapters"),
        ([pair(bias="all")], "one: bias: all cannot"),
        ([pair(modules_to_save=["head"])], "one: modules_to_save: ['head'] cannot"),
        ([pair(trainable_token_indices=[3])], "one: trainable_token_indices cannot"),
        ([pair(target_parameters=["experts.up"])], "one: target_parameters: ['experts.up'] cannot"),
        ([pair(init_lora_weights="pissa")], "init_lora_weights: pissa keeps its start beside the pair"),
        ([Ingredient("one", Lora(r=2), {**pair().tensors, **DORA})], "one: x.lora_magnitude_vector cannot be combined"),
        ([Ingredient("one", Lora(r=2), {})], "one: has no lora_A and no lora_B"),
        ([Ingredient("one", Lora(r=2), {"x.lora_A.weight": torch.ones(2, 4)})], "x must have a whole pair, lora_B is"),
        ([Ingredient("one", Lora(r=3), pair().tensors)], "x must have rank 3 by its settings, got (2, 4) and (6, 2)"),
        ([pair(), pair("two", r=3)], "x: linear needs equal ranks, got one 2, two 3. Take cat or svd."),
        ([pair(), pair("two", out=5)], "x: the adapters are for different layers (one (6, 2) x (2, 4), two (5, 2)"),
    ],
)
def test_adapters_that_do_not_go_together_are_refused_by_name(sources, told):
    assert told in message(sources, [1] * len(sources), Recipe("linear"))


def test_a_pair_with_a_number_that_is_none_is_refused():
    one = pair()
    one.tensors["x.lora_B.weight"][1, 1] = float("nan")
    assert "one: x has numbers that are NaN or infinite" in message([one], [1], Recipe("svd"))


def test_a_convolution_with_groups_is_refused():
    bank = bank_with("plain", {"r": 4, "target_modules": ["grouped"]})
    assert "0: grouped cannot be combined: a convolution with groups" in message(parts_of(bank), [1], Recipe("cat"))


def test_everything_that_is_wrong_is_said_at_once():
    told = message([pair(bias="all"), pair("two", use_dora=True)], [1], Recipe("ties", density=2))
    assert told.startswith("4 problems in combining adapters")


def test_dense_updates_without_memory_for_them_are_refused(monkeypatch):
    monkeypatch.setattr("onebase.base.memory.available_bytes", lambda: 100)
    with pytest.raises(CapacityError, match="ties_svd on x"):
        combine([pair()], [1], Recipe("ties_svd", density=0.5))
    combine([pair()], [1], Recipe("ties", density=0.5))
