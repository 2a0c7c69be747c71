"""LoRA and DoRA on every kind of layer are PEFT's: outputs, gradients, names and merged weights; rows keep to themselves."""

from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from onebase.adapters.bank import Bank
from onebase.adapters.lora import make_linear, plan_of
from onebase.base.model import Base
from onebase.base.route import RowSpace
from onebase.config.methods import Lora
from onebase.errors import TargetError
from onebase.ops.keyed import keep_mask, mix_rows
from tests import tiny
from tests.adapters.bare import Bare, assert_is_pefts, draws

SETTINGS: dict[str, Any] = {"r": 4, "lora_alpha": 6}


def ids(*shape, of=11):
    return torch.randint(of, shape, generator=torch.Generator().manual_seed(3))


# name: (layer, inputs of 6 entries, whether PEFT merges and has DoRA there)
LAYERS: dict[str, tuple[Any, Any, bool]] = {
    "linear": (lambda: nn.Linear(5, 6), lambda: draws(6, 3, 5), True),
    "linear without bias": (lambda: nn.Linear(5, 6, bias=False), lambda: draws(6, 3, 5), True),
    "transposed": (lambda: Conv1D(6, 5), lambda: draws(6, 3, 5), True),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), lambda: draws(6, 4, 9), True),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0)), lambda: draws(6, 4, 9, 8), True),
    "conv2d of patches": (lambda: nn.Conv2d(3, 6, 4, stride=4, bias=False), lambda: draws(6, 3, 8, 8), True),
    "conv2d of width 1": (lambda: nn.Conv2d(4, 6, 1), lambda: draws(6, 4, 5, 5), True),
    "conv2d same": (lambda: nn.Conv2d(4, 6, 3, padding="same"), lambda: draws(6, 4, 5, 5), True),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2), lambda: draws(6, 4, 3, 4, 3), True),
    "conv1d of groups": (lambda: nn.Conv1d(4, 6, 3, groups=2), lambda: draws(6, 4, 9), False),
    "conv2d of groups": (lambda: nn.Conv2d(4, 8, 3, groups=4, stride=2), lambda: draws(6, 4, 9, 7), False),
    "embedding": (lambda: nn.Embedding(11, 6), lambda: ids(6, 4), True),
    "embedding with padding": (lambda: nn.Embedding(11, 6, padding_idx=2), lambda: ids(6, 4), True),
    "scaled embedding": (lambda: Gemma3TextScaledWordEmbedding(11, 6, 0, embed_scale=2.5), lambda: ids(6, 4), True),
}
DENSE = [name for name, (_, _, dense) in LAYERS.items() if dense]


def bare_of(name, **settings):
    layer, inputs, _ = LAYERS[name]
    bare = Bare(layer().double())
    if hasattr(bare.layer, "embed_scale"):
        bare.layer.embed_scale = torch.tensor(2.5, dtype=torch.float64)
    return bare, inputs()


# PEFT's norms of a grouped convolution mix the groups; ours refuses, below.
@pytest.mark.parametrize(("name", "use_dora"), [(n, False) for n in LAYERS] + [(n, True) for n in DENSE])
def test_it_is_pefts(name, use_dora):
    bare, x = bare_of(name)
    settings = SETTINGS | {"use_dora": use_dora}
    bare.add(**settings, dtype=torch.float64, size=0.5)
    assert_is_pefts(bare, x, merges=LAYERS[name][2], **settings)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("name", DENSE)
def test_a_fresh_one_changes_no_bit(name, use_dora):
    bare = Bare(LAYERS[name][0]())
    bare.add(**SETTINGS, use_dora=use_dora)
    x = LAYERS[name][1]()
    x = x.float() if x.is_floating_point() else x
    assert torch.equal(bare(x), bare.layer(x))


@pytest.mark.parametrize("name", LAYERS)
def test_each_entry_of_a_mixed_batch_is_what_it_is_alone(name):
    dense = LAYERS[name][2]
    bare, x = bare_of(name)
    bare.add(**SETTINGS, dtype=torch.float64, size=0.5)
    bare.add(r=2 if dense else 4, use_dora=dense, dtype=torch.float64, size=0.5, seed=4)
    owners = (0, 1, -1, 1, 1, 0)
    mixed = bare(x, owners=owners)
    alone = torch.cat([bare(x[i : i + 1], owners=(owner,)) for i, owner in enumerate(owners)])
    torch.testing.assert_close(mixed, alone)
    assert (mixed[0] - bare(x[:1], owners=(1,))[0]).abs().max() > 1e-3


@pytest.mark.parametrize("name", LAYERS)
def test_dropout_is_keyed_by_entry_and_never_drawn(name):
    bare, x = bare_of(name)
    bare.add(**SETTINGS, lora_dropout=0.5, dtype=torch.float64, size=0.5)
    rows = (
        x.numel() // x.shape[-1]
        if bare.wrapper.rows.value == "vectors"
        else x.numel()
        if not x.is_floating_point()
        else 6
    )
    keys = {RowSpace.TOKEN: torch.arange(rows) * 7919}
    with tiny.global_randomness_untouched():
        once, again = bare(x, row_keys=keys), bare(x, row_keys=keys)
    assert torch.equal(once, again)
    assert not torch.equal(once, bare(x, row_keys={RowSpace.TOKEN: keys[RowSpace.TOKEN] + 1}))
    assert not torch.equal(once, bare(x))
    changes = torch.stack([bare(x, row_keys={RowSpace.TOKEN: keys[RowSpace.TOKEN] + 104729 * n}) for n in range(200)])
    spread = changes.std(0) / 200**0.5
    assert ((changes.mean(0) - bare(x)).abs() <= 6 * spread + 1e-9).all()  # kept inputs make up for those dropped


def test_a_convolutions_dropout_is_the_mask_of_its_entries():
    bare = Bare(nn.Conv2d(4, 6, 3).double())
    bare.add(**SETTINGS, lora_dropout=0.5, dtype=torch.float64, size=0.5)
    (part,) = bare.parts[0]
    x, keys = draws(6, 4, 5, 5), torch.arange(6) * 7919
    kept = keep_mask(mix_rows(keys, bare.wrapper._key), 100, 0.5).view_as(x)
    update = nn.functional.conv2d(nn.functional.conv2d(x * kept / 0.5, part.A), part.B) * part.scaling
    torch.testing.assert_close(bare(x, row_keys={RowSpace.TOKEN: keys}), bare.layer(x) + update)


def test_a_dilated_convolution_has_a_dilated_update():
    bare = Bare(nn.Conv2d(4, 6, 3, dilation=2, padding=1).double())
    bare.add(**SETTINGS, dtype=torch.float64, size=0.5)
    x = draws(6, 4, 9, 9)
    torch.testing.assert_close(bare.merged()(x), bare(x))


def test_positions_that_come_once_for_a_batch_belong_to_each_entry():
    bare, _ = bare_of("embedding")
    for seed in (0, 1):
        bare.add(**SETTINGS, dtype=torch.float64, size=0.5, seed=seed)
    positions = torch.arange(7)[None]
    mixed = bare(positions, owners=(1, 0, -1))
    torch.testing.assert_close(mixed, torch.cat([bare(positions, owners=(owner,)) for owner in (1, 0, -1)]))
    with pytest.raises(RuntimeError, match="batch of 3"):
        bare(torch.arange(6), owners=(1, 0, -1))


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("layer", "settings", "message"),
    [
        (
            nn.Linear(5, 6),
            {"r": 6},
            r"6 is larger than layer \(6 x 5\) has room for, which is 5.*rank_pattern: \{layer: 5\}",
        ),
        (nn.Embedding(11, 6), {"r": 7}, r"7 is larger than layer \(6 x 11\)"),
        (nn.Conv2d(2, 9, 2), {"r": 9}, r"9 is larger than layer \(9 x 8\)"),
        (nn.Conv2d(4, 8, 3, groups=4), {"r": 6}, "4 groups and needs a multiple of that, got 6"),
        (
            nn.Conv2d(4, 8, 3, groups=4),
            {"r": 4, "use_dora": True},
            "adapter.use_dora: layer is a convolution of 4 groups",
        ),
        (nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular"), {"r": 4}, "pads with 'circular'"),
        (nn.Embedding(11, 6, max_norm=1.0), {"r": 4}, "max_norm 1"),
    ],
)
def test_what_a_layer_cannot_have_is_an_error_that_says_what_to_do(layer, settings, message):
    with pytest.raises(TargetError, match=message):
        Bare(layer).add(**settings)


def test_a_grouped_convolution_merges_nowhere_and_says_so():
    bare = Bare(nn.Conv1d(4, 6, 3, groups=2))
    bare.add(**SETTINGS)
    with pytest.raises(TargetError, match="cannot be merged"):
        bare.merged()


def test_embeddings_of_something_other_than_ids_are_no_targets():
    with pytest.raises(TargetError, match=r"embed_positions \(embedding of something other"):
        Bank(tiny.base_of("opt")).add("a", Lora(target_modules=["embed_positions"]))


# -------------------------------------------------------------------------------------------------------------- counted


@pytest.mark.parametrize(("width", "count"), [(4096, 65_536), (768, 12_288)])
def test_a_square_projection_trains_what_it_is_known_to(width, count):
    layer = nn.utils.skip_init(nn.Linear, width, width, bias=False)
    part = make_linear(plan_of(Lora(r=8), "layer", 0), layer)
    assert sum(p.numel() for _, p in part.parameters()) == count
    assert layer.weight.numel() == width * width


def test_gpt2_small_trains_811_008_on_c_attn_and_c_proj():
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_positions=64, vocab_size=100))
    adapter = Bank(Base(model)).add("a", Lora(r=8, target_modules=["c_attn", "c_proj"]))
    assert adapter.parameter_count == 811_008
    theirs = peft.get_peft_model(
        transformers.GPT2LMHeadModel(transformers.GPT2Config(n_positions=64, vocab_size=100)),
        peft.LoraConfig(r=8, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True),
    )
    assert theirs.get_nb_trainable_parameters()[0] == 811_008
