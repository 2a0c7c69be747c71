"""Settings as plain values, the way a YAML file holds them, drawn by hypothesis."""

import re
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

FILES = ("a.jsonl", "b c.jsonl", "no", "1e-4", "010", "~x", "true", "sub/d.csv")
WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8) | st.sampled_from(["no", "1e-4", "~"])


def make_files(folder: Path) -> Path:
    """Return the folder after making every file that trees speak of."""
    for name in (*FILES, "template.jinja", "adapter/adapter_config.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def _number(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, exclude_min=True, exclude_max=True, allow_subnormal=False)


def _some(required: dict[str, Any], optional: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(required, optional=optional)


_file = st.sampled_from(FILES).map(lambda name: f"./{name}")
_hub = st.sampled_from(["hub:org/name:train[:10%]", "hub:org/name/config:train"])
_patterns = WORDS.map(re.escape) | st.sampled_from(["q_proj", r".*\.\d\.mlp\..*"])
_rank = st.integers(1, 512)
_alpha = st.integers(1, 512) | _number(1e-6, 512)
_names = st.sampled_from(["all-linear", "q_proj", r".*\.mlp\..*"]) | st.lists(WORDS, min_size=1, max_size=3)
_part = _some({"path": _file | _hub}, {"weight": _number(0, 9) | st.integers(1, 3)})
_train = _file | _hub | _part | st.lists(_file | _hub | _part, min_size=1, max_size=3)
_valid = _file | _hub | st.lists(_file, min_size=1, max_size=2)

_targeted: dict[str, Any] = {
    "target_modules": _names,
    "exclude_modules": _names,
    "layers_to_transform": st.integers(0, 40) | st.lists(st.integers(0, 40), min_size=1, max_size=3),
    "init_from": st.just("adapter"),
}
_virtual: dict[str, Any] = {"num_virtual_tokens": st.integers(1, 99), "init_from": st.just("adapter")}
loras = _some(
    {},
    {
        "method": st.just("lora"),
        "r": _rank,
        "lora_alpha": _alpha,
        "lora_dropout": st.floats(0, 1, exclude_max=True, allow_subnormal=False),
        "use_rslora": st.booleans(),
        "rank_pattern": st.dictionaries(_patterns, _rank, max_size=3),
        "alpha_pattern": st.dictionaries(_patterns, _alpha, max_size=3),
        "init_lora_weights": st.sampled_from([True, False, "gaussian", "pissa", "pissa_niter_4"]),
        "use_dora": st.booleans(),
        "bias": st.sampled_from(["none", "all", "lora_only"]),
        "modules_to_save": st.lists(WORDS, min_size=1, max_size=2),
        "target_parameters": st.lists(WORDS, min_size=1, max_size=2),
        "trainable_token_indices": st.just([1, 2]) | st.just({"wte": [3]}),
        "loraplus_lr_ratio": _number(0, 99),
        **_targeted,
    },
)


def _of(method: str, optional: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    return _some({"method": st.just(method)}, optional)


adapters = st.one_of(
    loras,
    _of("ia3", {"feedforward_modules": _names, "init_ia3_weights": st.booleans(), **_targeted}),
    _of("bitfit", _targeted),
    _of("ln-tuning", _targeted),
    _of("bottleneck", {"placement": st.sampled_from(["pfeiffer", "houlsby"]), "reduction_factor": _number(0.001, 99)}),
    _of("prompt-tuning", {"prompt_tuning_init": st.just("RANDOM"), **_virtual}),
    _of("prompt-tuning", {"prompt_tuning_init_text": WORDS})
    .map(lambda tree: {"prompt_tuning_init": "TEXT"} | tree)
    .filter(lambda tree: "prompt_tuning_init_text" in tree),
    _of(
        "prefix-tuning", {"prefix_projection": st.just(True), "encoder_hidden_size": st.integers(1, 99), **_virtual}
    ).filter(lambda tree: "prefix_projection" in tree or "encoder_hidden_size" not in tree),
    _of("full", _targeted),
)
_train_section = _some(
    {},
    {
        "batch_size": st.integers(1, 512),
        "micro_batch_tokens": st.just("auto") | st.integers(1, 10**6),
        "learning_rate": _number(0, 1),
        "lr_scheduler_type": st.sampled_from(["cosine", "linear", "constant"]),
        "weight_decay": _number(0, 1),
        "max_grad_norm": st.integers(0, 9) | _number(0, 9),
        "seed": st.integers(0, 2**63 - 1),
        "save_every": st.none() | st.integers(1, 1000),
        "keep_checkpoints": st.integers(1, 9),
        "activation_checkpointing": st.booleans(),
        "threads": st.integers(1, 64),
    },
)
_length: st.SearchStrategy[dict[str, Any]] = st.sampled_from([{"steps": 50}, {"epochs": 3}, {"epochs": 0.5}, {}])
_warmup: st.SearchStrategy[dict[str, Any]] = st.sampled_from([{"warmup_steps": 0}, {"warmup_ratio": 0.1}, {}])
_stepwise: st.SearchStrategy[dict[str, Any]] = st.sampled_from(
    [{}, {"lr_scheduler_type": "step", "lr_step_size": 5, "lr_step_gamma": 0.5}]
)
_evaluated: st.SearchStrategy[dict[str, Any]] = st.sampled_from(
    [{}, {"eval_every": 5}, {"eval_every": 5, "early_stopping_patience": 2}]
)


@st.composite
def trees(draw: st.DrawFn) -> dict[str, Any]:
    """Draw settings without a fault, whose paths lie in a folder made by `make_files`."""
    data: dict[str, Any] = {"train": draw(_train)}
    train: dict[str, Any] = draw(_train_section) | draw(_length) | draw(_warmup) | draw(_stepwise)
    if draw(st.booleans()):
        data["valid"] = draw(_valid | _number(0, 1))
        train |= draw(_evaluated) | draw(_some({}, {"keep_best": st.booleans()}))
    elif draw(st.booleans()):
        train["keep_best"] = False
    data |= draw(
        _some(
            {},
            {"test": _valid, "max_length": st.integers(4, 4096), "columns": st.dictionaries(WORDS, WORDS, max_size=2)},
        )
    )
    data |= draw(_some({}, {"on_bad_row": st.sampled_from(["error", "skip"]), "shuffle": st.booleans()}))
    task = draw(st.sampled_from(["chat", "text"]))
    if task == "chat":
        chat: dict[str, Any] = {
            "labels": st.sampled_from(["all", "last"]),
            "system": WORDS,
            "template": st.just("template.jinja"),
        }
        data |= draw(_some({}, chat))
    tree = {"model": draw(st.sampled_from(["org/name", "smollm2-135m-instruct", "./sub"])), "task": task, "data": data}
    rest: dict[str, Any] = {
        "revision": WORDS,
        "dtype": st.sampled_from(["auto", "float32"]),
        "device": st.sampled_from(["cpu", "cuda:1"]),
    }
    rest |= {"trust_remote_code": st.booleans(), "adapter": adapters, "eval": st.just({"batch_tokens": 64})}
    return tree | {"train": train} | draw(_some({}, rest))
