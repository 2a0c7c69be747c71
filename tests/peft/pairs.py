"""One tiny model twice: with peft's PeftModel on it, and with ours, made under the same seed."""

import warnings
from functools import partial
from typing import Any

import peft
import torch
from torch import nn

import onebase.peft as ours
from tests import tiny

CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}
GPT2 = ["c_attn", "c_proj"]
CLASSIFIERS = {
    "bert": ("BertForSequenceClassification", "BertConfig"),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig"),
    "gpt2": ("GPT2ForSequenceClassification", "GPT2Config"),
    "llama": ("LlamaForSequenceClassification", "LlamaConfig"),
}


def model_of(name: str, **changes: Any) -> Any:
    """Return a tiny model; one of CLASSIFIERS with 3 labels where `num_labels` is given."""
    if "num_labels" not in changes:
        return tiny.model_of(name, **changes)
    import transformers

    model_class, config_class = CLASSIFIERS[name]
    sizes = (tiny.ARCHITECTURES | tiny.ENCODERS)[name][2]
    config = getattr(transformers, config_class)(**({"pad_token_id": 0} | sizes | changes))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, model_class)(config).eval()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def quietly(make: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


def front_of(lib: Any, name: str, kind: str, *, seed: int = 5, changes: Any = None, **fields: Any) -> Any:
    """Return a library's PeftModel on a tiny model, made under a seed."""
    model = model_of(name, **(changes or {}))
    torch.manual_seed(seed)
    return quietly(lambda: lib.get_peft_model(model, getattr(lib, kind)(**fields)))


def pair(name: str, kind: str = "LoraConfig", **more: Any) -> tuple[Any, Any]:
    """Return peft's and ours."""
    return front_of(peft, name, kind, **more), front_of(ours, name, kind, **more)


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def fill_(*models: nn.Module, seed: int = 1) -> None:
    """Fill what is trained with the same numbers in each, so that it changes the base."""
    for model in models:
        draws = torch.Generator().manual_seed(seed)
        for _, parameter in sorted(trained(model).items()):
            parameter.data = parameter.data + 0.3 * torch.randn(parameter.shape, generator=draws)


def ids_of(rows: int = 2, length: int = 7, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, tiny.VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def assert_same_step(theirs: Any, mine: Any, **inputs: Any) -> None:
    """Outputs, loss and every gradient of one forward and backward are equal."""
    results = []
    for model in (theirs, mine):
        model.zero_grad()
        torch.manual_seed(11)
        out = model(**inputs)
        out.loss.backward()
        results.append(out)
    torch.testing.assert_close(results[1].loss, results[0].loss, **CLOSE)
    torch.testing.assert_close(results[1].logits, results[0].logits, **CLOSE)
    own, others = trained(mine), trained(theirs)
    assert list(own) == list(others)
    for name, parameter in others.items():
        assert (own[name].grad is None) == (parameter.grad is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(own[name].grad, parameter.grad, **CLOSE, msg=partial(_told, name))


def _told(name: str, text: str) -> str:
    return f"{name}: {text}"


def assert_same_files(theirs: Any, mine: Any) -> None:
    """Two folders hold the same configuration, and tensors with the same names and values."""
    import json

    from safetensors.torch import load_file

    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (theirs, mine)]
    for config in configs:
        for name, value in config.items():
            config[name] = sorted(set(value)) if isinstance(value, list) else value  # PEFT may name a head twice
    assert configs[0] == configs[1]
    expected, found = (load_file(folder / "adapter_model.safetensors") for folder in (theirs, mine))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, **CLOSE)
