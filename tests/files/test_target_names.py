import re

from hypothesis import assume, given
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from onebase.adapters.matching import for_path
from onebase.files.target_names import TargetNames, name_targets, order_free_patterns

PARTS = ["self_attn", "mlp", "q_proj", "v_proj", "experts"]
MODULES = ["model.embed_tokens", "lm_head", "vision.layers.0.q_proj", "model.norm"] + [
    f"model.layers.{layer}.{name}"
    for layer in range(4)
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.experts.0.up_proj")
]
names = st.lists(st.sampled_from(["q_proj", "v_proj", "up_proj", "self_attn.q_proj", "lm_head", "norm"]), min_size=1)
fields = st.builds(
    TargetNames,
    target_modules=names.map(tuple) | st.sampled_from([r".*\.(q|v)_proj", r"model\.layers\.[02]\..*up_proj", "q_proj"]),
    exclude_modules=st.none() | names.map(tuple) | st.just(r".*\.0\..*"),
    layers_to_transform=st.none() | st.integers(0, 3) | st.lists(st.integers(0, 3)).map(tuple),
    layers_pattern=st.none() | st.just("layers") | st.just(("h", "layers")),
)


def peft_chooses(chosen: TargetNames) -> set[str]:
    config = LoraConfig(
        target_modules=chosen.target_modules if isinstance(chosen.target_modules, str) else list(chosen.target_modules),
        exclude_modules=list(chosen.exclude_modules)
        if isinstance(chosen.exclude_modules, tuple)
        else chosen.exclude_modules,
        layers_to_transform=list(chosen.layers_to_transform)
        if isinstance(chosen.layers_to_transform, tuple)
        else chosen.layers_to_transform,
        layers_pattern=list(chosen.layers_pattern)
        if isinstance(chosen.layers_pattern, tuple)
        else chosen.layers_pattern,
    )
    found = {name: check_target_module_exists(config, name) for name in MODULES}
    return {name for name, hit in found.items() if hit and type(hit).__name__ != "_ExcludedModule"}


@given(fields)
def test_the_fields_match_the_modules_that_peft_matches(chosen):
    assume(not isinstance(chosen.target_modules, str) or chosen.layers_to_transform is None)
    assume(chosen.layers_pattern is None or chosen.layers_to_transform is not None)
    assume(not (isinstance(chosen.target_modules, str) and chosen.layers_pattern is not None))
    assert {name for name in MODULES if chosen.matches(name)} == peft_chooses(chosen)


@given(st.sets(st.sampled_from(MODULES), min_size=1), fields)
def test_the_names_found_choose_exactly_the_given_modules_whatever_they_are(picked, wanted):
    found = name_targets(picked, MODULES, wanted)
    assert {name for name in MODULES if found.matches(name)} == picked
    assert peft_chooses(found) == picked


def test_the_names_are_as_plain_as_they_can_be():
    def find(pattern: str, wanted: TargetNames) -> TargetNames:
        return name_targets([name for name in MODULES if re.fullmatch(pattern, name)], MODULES, wanted)

    everything = TargetNames("all-linear")
    assert find(r".*v_proj", everything) == TargetNames(("v_proj",))
    assert find(r"model\..*q_proj", everything).target_modules == ("self_attn.q_proj",)
    first = TargetNames("all-linear", layers_to_transform=(1, 2))
    assert find(r".*[12]\..*v_proj", first) == TargetNames(("v_proj",), layers_to_transform=(1, 2))
    assert find(r".*[12]\..*v_proj", everything).target_modules == ("1.self_attn.v_proj", "2.self_attn.v_proj")


def test_a_module_whose_name_ends_another_gets_a_regular_expression():
    found = name_targets(["a.q"], ["a.q", "b.a.q"], TargetNames("all-linear"))
    assert found == TargetNames(r"a\.q")


patterns = st.dictionaries(
    st.sampled_from(["q_proj", "up_proj", r".*\.0\..*", "self_attn.q_proj", r"layers\.[13].*", "^model.*", ".*"]),
    st.integers(1, 9),
)


@given(patterns, st.sampled_from(MODULES))
def test_patterns_give_a_module_the_value_that_peft_gives_it(given_patterns, name):
    assert for_path(given_patterns, name, 0) == given_patterns.get(get_pattern_key(given_patterns, name), 0)


@given(patterns)
def test_patterns_in_a_file_mean_the_same_after_peft_sorted_them(given_patterns):
    free = order_free_patterns(given_patterns, MODULES)
    assert list(free) == sorted(free)
    assert {name: for_path(free, name, 0) for name in MODULES} == {
        name: for_path(given_patterns, name, 0) for name in MODULES
    }
