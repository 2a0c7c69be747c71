"""The kernels are compiled once and kept; where that does not work, why is said and everything computes as torch does."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from onebase.adapters.bank import Bank
from onebase.base import kernels
from onebase.base.blocks import FusedGatedMLP, FusedRMSNorm, fuse_
from onebase.base.route import Route
from onebase.config.methods import Lora
from tests import tiny
from tests.laws.test_together_and_alone import batch_with, results

ASK = "from onebase.base.kernels import use_kernels; from onebase.ops import native; print(use_kernels() or native.in_use())"


def asked(home, **environment):
    """Return what a new process says of its kernels."""
    given = {**os.environ, "ONEBASE_HOME": str(home), **environment}
    done = subprocess.run([sys.executable, "-c", ASK], env=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def compiler_at(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_a_library_is_made_once_and_made_again_if_it_is_damaged(tmp_path):
    count = compiler_at(tmp_path / "gcc", f'echo called >> {tmp_path}/calls\nexec gcc "$@"')
    assert asked(tmp_path, CC=count) == "True"
    assert asked(tmp_path, CC=count) == "True"
    calls = (tmp_path / "calls").read_text().count("called")
    assert calls == 6  # version, three compiles, link; version
    (library,) = tmp_path.glob("kernels/*/kernels.so")
    whole = library.read_bytes()
    for damaged in (b"", whole[:4096] + bytes(len(whole) - 4096), bytes(len(whole))):
        library.write_bytes(damaged)
        assert asked(tmp_path, CC=count) == "True"
        assert library.read_bytes() == whole


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ('echo "a warning" >&2; echo "fatal error: out of order" >&2; exit 1', "failed: fatal error: out of order"),
        ("printf '\\351' >&2; exit 1", "failed: \ufffd"),
        ('for a; do :; done; echo text > "$a"', "cannot be loaded here"),
        ('for a; do :; done; echo "int x;" > x.c; exec gcc -shared x.c -o "$a"', "cannot be loaded here"),
        ("exit 0", "No such file or directory"),
    ],
)
def test_where_it_cannot_be_made_the_reason_is_said(script, reason, tmp_path):
    wrong = compiler_at(tmp_path / "gcc", f'cd {tmp_path}; [ "$1" = --version ] && exit 0\n{script}')
    said = asked(tmp_path, CC=wrong)
    assert said.endswith(reason) or reason in said, said


def test_the_compiler_is_the_one_that_is_named_with_its_options(tmp_path):
    assert asked(tmp_path, CC="no-such-compiler").startswith("there is no C compiler no-such-compiler (")
    assert asked(tmp_path, CC="", PATH=str(tmp_path)).startswith("there is no C compiler cc (")
    assert asked(tmp_path, CC="gcc -O1") == "True"
    assert asked(tmp_path, CC="gcc '") == """CC is "gcc '", which is no command (No closing quotation)"""


def test_a_cache_that_cannot_be_written_is_a_reason_and_no_error(tmp_path):
    (tmp_path / "home").write_text("a file")
    assert "the cache folder cannot be written" in asked(tmp_path / "home")


@pytest.fixture
def compiled():
    if why := kernels.use_kernels():
        pytest.skip(why)


FUSED = ["llama", "llama-tied", "qwen2", "qwen3", "mistral", "phi3", "mixtral", "qwen3-moe", "granite"]
OTHERS = ["gpt2", "opt", "bloom"]


@pytest.mark.parametrize("name", [*FUSED, *OTHERS, "gpt-neox", "gemma2", "gemma3", "cohere"])
def test_exchanged_parts_give_the_model_its_own_numbers_and_gradients(name, compiled):
    plain, fused = tiny.base_of(name), tiny.base_of(name)
    count = fuse_(fused.model)
    assert count or name not in FUSED
    assert not count or name not in OTHERS
    assert [*fused.model.state_dict()] == [*plain.model.state_dict()]
    found = []
    for base in (plain, fused):
        bank = tiny.bank_of(base, "one", dummy=False)
        found.append(results(bank, batch_with("one"), "one"))
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6 + 1e-5 * float(theirs.detach().abs().max()))


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_rows_losses_and_gradients_are_byte_identical_together_and_alone(name, compiled):
    banks = []
    for members in (["one", "two"], ["one"]):
        base = tiny.base_of(name)
        fuse_(base.model)
        banks.append(tiny.bank_of(base, *members, lora_dropout=0.2, dummy=len(members) > 1))
    banks[1].adapters["one"].load_state_(banks[0].adapters["one"].state)
    orders = (["two", "one"], ["one"])
    found = [
        results(bank, batch_with(*order), "one", dropout_step=4) for bank, order in zip(banks, orders, strict=True)
    ]
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_what_is_no_plain_norm_or_gate_stays(compiled):
    gemma = tiny.base_of("gemma2").model
    fuse_(gemma)
    assert not any(isinstance(module, FusedRMSNorm | FusedGatedMLP) for module in gemma.modules())


def test_generation_with_a_cache_is_the_same(compiled):
    plain, fused = tiny.base_of("llama"), tiny.base_of("llama")
    fuse_(fused.model)
    ids = torch.tensor([[5, 6, 7, 8]])
    found = []
    for base in (plain, fused):
        with base.native(Route()) as model:
            found.append(model.generate(ids, max_new_tokens=9, do_sample=False))
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_trained_copy_of_attention_computes_with_its_own_weights(name, compiled):
    found = []
    for fused in (False, True):
        base = tiny.base_of(name)
        if fused:
            fuse_(base.model)
        bank = Bank(base)
        adapter = bank.add(
            "one", Lora(r=2, layers_to_transform=[0], modules_to_save=["layers.1.self_attn", "layers.1.mlp"])
        )
        tiny.fill_(adapter, size=0.1)
        found.append(results(bank, batch_with("one"), "one"))
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6 + 1e-4 * float(theirs.detach().abs().max()))


def test_a_norm_that_takes_more_than_its_rows_stays(compiled):
    class GatedRMSNorm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(8), requires_grad=False)
            self.eps = 1e-6

        def forward(self, x, gate=None):
            y = torch.nn.functional.rms_norm(x, (8,), self.weight, self.eps)
            return y if gate is None else y * gate

    model = torch.nn.ModuleList([GatedRMSNorm()])
    assert fuse_(model) == 0 and isinstance(model[0], GatedRMSNorm)
