"""`auto` always means something that is there; what is not there is an error that says what is."""

import pytest
import torch

from onebase.base import device
from onebase.errors import ConfigError


def test_auto_is_a_device_on_which_tensors_can_be_made():
    torch.zeros(1, device=device.resolve_device("auto"))


def test_auto_is_float32_on_a_cpu_and_an_apple_gpu():
    assert {device.resolve_dtype("auto", name) for name in ("cpu", "mps")} == {torch.float32}


@pytest.mark.parametrize(("supported", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_is_bfloat16_on_a_gpu_that_has_it(monkeypatch, supported, dtype):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    assert device.resolve_dtype("auto", "cuda:0") is dtype


def test_a_named_dtype_is_that_dtype_on_every_device():
    for name in device.DTYPES:
        assert device.resolve_dtype(name, "cpu") is device.resolve_dtype(name, "cuda") is getattr(torch, name)


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "", "meta", "xpu"])
def test_a_device_that_is_none_of_ours_is_an_error_that_lists_them(name):
    with pytest.raises(ConfigError, match="auto, cpu, cuda, cuda:N or mps"):
        device.resolve_device(name)


def test_a_dtype_that_is_none_of_ours_is_an_error_that_lists_them():
    with pytest.raises(ConfigError, match="bfloat16"):
        device.resolve_dtype("int8", "cpu")


def test_a_gpu_that_is_not_there_is_an_error_that_says_why(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"device: 'cuda' is not there: torch .*Set device: auto"):
        device.resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device.resolve_device("cuda:1") == "cuda:1"
    with pytest.raises(ConfigError, match="this machine has cuda:0, cuda:1"):
        device.resolve_device("cuda:2")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="Apple"):
        device.resolve_device("mps")
