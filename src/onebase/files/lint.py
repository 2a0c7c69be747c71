"""Whether an adapter loads in other tools, and with the right scale: `lint`, from its files alone. No torch.

Read are adapter_config.json and adapter_model.safetensors, whose numbers must be finite, also of methods and PEFT
versions that onebase does not compute. What the tools make of it stands in serving.py; here is what an adapter has, and the judging. The scale
of every pair is computed as the tool computes it and compared with the one it was trained with, so that fields that
cancel out (a rank_pattern and an alpha_pattern in proportion) are no fault.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onebase.adapters.matching import for_path
from onebase.errors import ConfigError, FileFormatError, list_problems
from onebase.files.json_file import read_json
from onebase.files.lora_format import CHANGES_BASE, LORA, rank_problems, word
from onebase.files.peft_config import CONFIG_NAME, beside_targets
from onebase.files.peft_format import TENSORS_NAME, find_adapter
from onebase.files.serving import (
    FACTS,
    PORTABLE,
    TASK_TYPES,
    TOOLS,
    VLLM_RANKS,
    Fact,
    Scales,
    Tool,
    Verdict,
    peft_scale,
)
from onebase.files.tensor_file import not_finite

_TODO = "Save the adapter again with peft's save_pretrained, or get an undamaged copy."
_PAIR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<letter>[AB])(?P<adapter>\.\w+)??(?:\.weight)?")
_VIRTUAL = {
    "PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "ADAPTION_PROMPT", "CPT", "CARTRIDGE",
}  # fmt: skip
_JUDGED_BY = (
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern",
)  # fmt: skip
_HEADS = ("lm_head", "embed_out", "output")
_ORDER: Sequence[Verdict] = ("loads", "loads wrong", "refused")
_SHOWN = 3


@dataclass(frozen=True)
class Header:
    """What the files of an adapter hold: the fields of its config, and the shape of each tensor by its key."""

    folder: Path
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Finding:
    """What one tool makes of an adapter: the worst of the reasons decides; `todo` belongs to that."""

    tool: str
    verdict: Verdict
    reasons: tuple[str, ...]
    todo: str


def lint(path: Path, tools: Iterable[str]) -> list[Finding]:
    """Return what each tool makes of the adapter in a folder, or in the run folder given.

    Raises:
        ConfigError: a tool that is not known.
        FileFormatError: the folder holds no adapter, or a damaged one.
    """
    wanted = [*dict.fromkeys(tools)]
    unknown = [name for name in wanted if name not in TOOLS]
    if unknown or not wanted:
        raise ConfigError(f"--for: must name some of {', '.join(TOOLS)}, got {', '.join(unknown) or 'nothing'}.")
    header = read_header(find_adapter(path))
    has = properties(header)
    scales = scales_of(header) if header.config.get("peft_type") == "LORA" else {}
    _check_pairs(header, scales)
    return [_judged(TOOLS[name], path, has, scales) for name in wanted]


def read_header(folder: Path) -> Header:
    """Return an adapter's config and the shapes of its tensors.

    Raises:
        FileFormatError: a file is missing or damaged.
    """
    config = read_json(folder / CONFIG_NAME, todo=_TODO)
    if not isinstance(config.get("peft_type"), str):
        raise FileFormatError(
            f"{folder / CONFIG_NAME}: peft_type must be text, got {config.get('peft_type')!r}. {_TODO}"
        )
    if config["peft_type"] == "LORA":
        for name in _JUDGED_BY:
            fits, rule = LORA.rules[name]
            if not fits(config.get(name)):
                raise FileFormatError(
                    f"{folder / CONFIG_NAME}: {name} must be {rule}, got {config.get(name)!r}. {_TODO}"
                )
    return Header(folder, config, _shapes(folder / TENSORS_NAME))


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a safetensors file, from its header."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileFormatError(f"{path}: the file is missing. {_TODO}")
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in sorted(file.keys())}
            shapes = {name: tuple(one.get_shape()) for name, one in slices.items()}
            formats = {name: str(one.get_dtype()) for name, one in slices.items()}
    except (SafetensorError, OSError) as error:
        raise FileFormatError(f"{path}: damaged, or no safetensors file: {error}. {_TODO}") from error
    if not shapes:
        raise FileFormatError(f"{path}: there is no tensor, so the adapter would change nothing. {_TODO}")
    problems = [
        f"{name}: must hold floating-point numbers, got {formats[name]}."
        for name in shapes
        if ".lora_" in name and not formats[name].startswith(("F", "BF"))
    ]
    problems += [
        f"{name}: {count} of {math.prod(shapes[name])} values are NaN or infinite."
        for name, count in not_finite(path).items()
    ]
    if problems:
        raise FileFormatError(list_problems(str(path), [f"{text} {_TODO}" for text in problems], shown=_SHOWN))
    return shapes


def properties(header: Header) -> dict[str, str]:
    """Return what an adapter has of serving.PROPERTIES, each with the words that name it here."""
    config, kind = header.config, str(header.config["peft_type"])
    found: dict[str, str] = {}
    if kind in _VIRTUAL:
        found["virtual tokens"] = kind
    elif kind == "ONEBASE_BOTTLENECK":
        found["bottleneck"] = kind
    elif kind.startswith("ONEBASE_"):
        found["own format"] = kind
    elif kind != "LORA":
        found["other method"] = kind
    else:
        found |= _lora_properties(config, header.shapes)
    if config.get("task_type") is not None:
        known = config["task_type"] in TASK_TYPES
        found["language model" if known else "unknown task"] = f"task_type {config['task_type']}"
    return found


def _lora_properties(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    found: dict[str, str] = {}
    variants = [name for name in LORA.refused if config.get(name) not in (None, False, [], {})]
    if variants:
        found["variant"] = ", ".join(variants)
    if word(config.get("init_lora_weights")).startswith(CHANGES_BASE):
        found["changed base"] = f"init_lora_weights {config['init_lora_weights']}"
    for name in ("use_dora", "modules_to_save", "trainable_token_indices", "target_parameters"):
        if config.get(name):
            found[name] = name if config[name] is True else f"{name} {config[name]}"
    if config.get("bias") not in (None, "none"):
        found["bias"] = f"bias {config['bias']}"
    if isinstance(config.get("target_modules"), str):
        found["expression"] = f"target_modules {config['target_modules']!r}"
    pairs = [(key, match, shape) for key, shape in shapes.items() if (match := _PAIR.fullmatch(key))]
    if named := [key for key, match, _ in pairs if match["adapter"] and key.endswith(".weight")]:
        found["named keys"] = named[0]
    if pairs:
        found["pairs"] = "pairs"
    if len({shape[0] for _, match, shape in pairs if match["letter"] == "A"}) > 1:
        found["mixed ranks"] = "pairs of different ranks"
    for name, keys in (
        ("embedding", [match["module"] for _, match, _ in pairs if match["embedding"]]),
        ("head", [match["module"] for _, match, _ in pairs if match["module"].split(".")[-1] in _HEADS]),
        ("convolution", [match["module"] for _, match, shape in pairs if len(shape) > 2]),
    ):
        if keys:
            found[name] = f"a pair on {keys[0].removeprefix('base_model.model.')}"
    return found


def scales_of(header: Header) -> dict[str, Scales]:
    """Return what the scale of each pair is made of, by its module's path; of stacked experts none."""
    config = header.config
    found = {}
    for key, shape in header.shapes.items():
        match = _PAIR.fullmatch(key)
        if match is None or match["letter"] != "A" or not shape or config.get("target_parameters"):
            continue
        path = match["module"].removeprefix("base_model.model.")
        found[path] = Scales(
            r=shape[0],
            lora_alpha=float(for_path(config.get("alpha_pattern") or {}, path, config["lora_alpha"])),
            common_r=config["r"],
            common_alpha=float(config["lora_alpha"]),
            use_rslora=bool(config.get("use_rslora")),
        )
    return found


def _check_pairs(header: Header, scales: Mapping[str, Scales]) -> None:
    """Raise where pairs are not what the config says: no tool could tell the scale, or the modules, they were trained with."""
    file, config = header.folder / TENSORS_NAME, header.config
    pairs: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, shape in header.shapes.items():
        if match := _PAIR.fullmatch(key):
            pairs.setdefault(match["module"].removeprefix("base_model.model."), {})[match["letter"]] = shape
    if half := [path for path, shapes in pairs.items() if len(shapes) == 1]:
        raise FileFormatError(f"{file}: {half[0]} has half a pair, lora_{next(iter(pairs[half[0]]))} alone. {_TODO}")
    if config["peft_type"] != "LORA":
        return
    if problem := beside_targets(config, pairs):
        raise FileFormatError(f"{file}: {problem} {_TODO}")
    if not any(config.get(name) for name in LORA.refused):  # some variants have pairs of other shapes
        wrong = [text for path, own in pairs.items() for text in rank_problems(path, own["A"], own["B"], config)]
        if wrong:
            more = f" {len(wrong) - 1} more pairs are wrong." if len(wrong) > 1 else ""
            raise FileFormatError(f"{file}: by {CONFIG_NAME}, {wrong[0]}{more} {_TODO}")
    if scales and not any(peft_scale(of) for of in scales.values()):
        raise FileFormatError(
            f"{header.folder / CONFIG_NAME}: lora_alpha is 0, so every pair is multiplied by 0 and the adapter changes nothing. "
            "Write the lora_alpha that it was trained with."
        )


def _judged(tool: Tool, path: Path, has: Mapping[str, str], scales: Mapping[str, Scales]) -> Finding:
    """Return what a tool makes of an adapter with these properties and scales."""
    found = [(FACTS[name][tool.name], f"{words}: ") for name, words in has.items() if tool.name in FACTS.get(name, {})]
    found += [(fact, "") for fact in (_scale_fact(tool, scales), _rank_fact(tool, scales)) if fact is not None]
    found.sort(key=lambda one: -_ORDER.index(one[0].verdict))
    if not found:
        return Finding(tool.name, "loads", (), "")
    worst = found[0][0].verdict
    return Finding(
        tool.name,
        worst,
        tuple(f"{words}{fact.why}" for fact, words in found),
        next((fact.todo for fact, _ in found if fact.verdict == worst and fact.todo), "").format(adapter=path),
    )


def _scale_fact(tool: Tool, scales: Mapping[str, Scales]) -> Fact | None:
    """Return where a tool's scale is not the one that was trained with."""
    wrong = {
        path: of for path, of in scales.items() if abs(tool.scale(of) - peft_scale(of)) > 1e-6 * abs(peft_scale(of))
    }
    if not wrong:
        return None
    told = [f"{path} by {tool.scale(of):.4g} instead of {peft_scale(of):.4g}" for path, of in wrong.items()]
    more = f", and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
    where = f"{len(wrong)} of {len(scales)} pairs are scaled wrong ({', '.join(told[:_SHOWN])}{more})"
    return Fact("loads wrong", f"{where}: the scale there is {tool.scaling}.", PORTABLE)


def _rank_fact(tool: Tool, scales: Mapping[str, Scales]) -> Fact | None:
    """Return what the largest rank asks of vLLM, whose limit is 16 unless it is told."""
    largest = max((max(of.r, of.common_r) for of in scales.values()), default=0)
    if tool.name != "vllm" or largest <= 16:
        return None
    room = next((rank for rank in VLLM_RANKS if rank >= largest), None)
    if room is None:
        return Fact("refused", f"rank {largest} is above {VLLM_RANKS[-1]}, the largest --max-lora-rank.")
    return Fact("loads", f"rank {largest} is above the default limit of 16.", f"--max-lora-rank {room}")
