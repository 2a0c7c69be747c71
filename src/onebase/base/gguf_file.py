"""The one door to gguf: files in llama.cpp's format written and read, and what it calls the modules of a model.

llama.cpp turns pairs of neighbours in rotary attention where transformers turns halves, for the models that it knows as
"llama": there the rows of queries and keys stand in another order in the file (`file_rows`). Other families keep theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onebase.errors import ConfigError

TYPES = ("F32", "F16")
"""Formats of an adapter's numbers."""
MODEL_TYPES = ("F32", "F16", "Q8_0")
"""Formats of a model's matrices; vectors are always F32, as llama.cpp asks for."""
BLOCK = 32
"""Numbers of a row that share a scale in Q8_0."""
_FAMILIES = {  # transformers' model_type: (llama.cpp's architecture, whether queries and keys are reordered)
    "gemma2": ("gemma2", False),
    "gemma3_text": ("gemma3", False),
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
}
_QUERIES, _KEYS = "attn_q", "attn_k"


@dataclass(frozen=True)
class Family:
    """How llama.cpp names and orders the weights of one model."""

    architecture: str
    reorders: bool
    heads: int
    key_heads: int
    names: Any

    def tensor_name(self, path: str) -> str | None:
        """Return what the weight of a module is called in the file; None where it has none."""
        found = self.names.get_name(f"{path}.weight", try_suffixes=(".weight",))
        return None if found is None else str(found)

    def file_rows(self, name: str, rows: NDArray[Any]) -> NDArray[Any]:
        """Return a weight's or a bias's rows in the order of the file: of each rotary head, halves become neighbours."""
        module = name.rpartition(".")[0]
        if not self.reorders or not module.endswith((_QUERIES, _KEYS)):
            return rows
        heads = self.heads if module.endswith(_QUERIES) else self.key_heads
        halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
        return halves.swapaxes(1, 2).reshape(rows.shape)


def family_of(config: Any) -> Family:
    """Return how llama.cpp has a model of this configuration.

    Raises:
        ConfigError: it is none that onebase knows it of.
    """
    import gguf

    kind = getattr(config, "model_type", None)
    if kind not in _FAMILIES:
        raise ConfigError(
            f"model_type {kind!r}: onebase writes GGUF for {', '.join(_FAMILIES)} only. For others merge the adapter "
            "(onebase merge) and convert the folder with llama.cpp's convert_hf_to_gguf.py."
        )
    architecture, reorders = _FAMILIES[kind]
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    heads = int(config.num_attention_heads)
    key_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    names = gguf.get_tensor_name_map(number, int(config.num_hidden_layers))
    return Family(architecture, reorders, heads, key_heads, names)


def write_adapter(
    path: Path, architecture: str, lora_alpha: float, tensors: Mapping[str, NDArray[np.float32]], kind: str
) -> None:
    """Write a LoRA adapter as llama.cpp's loader takes it: `tensors` are called NAME.lora_a and NAME.lora_b.

    Source: convert_lora_to_gguf.py 0b03ada, src/llama-adapter.cpp 0650ea8.
    """
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, lora_alpha)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if kind == "F32" else gguf.LlamaFileType.MOSTLY_F16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, tensor in sorted(tensors.items()):
        writer.add_tensor(name, np.ascontiguousarray(tensor, dtype=_format(kind)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_model_like(path: Path, like: Path, tensors: Mapping[str, NDArray[np.float32]], kind: str) -> None:
    """Write a model's tensors with every field of another GGUF file (sizes, vocabulary, chat template), but the type's."""
    import gguf

    fields = gguf.GGUFReader(like).fields
    writer = gguf.GGUFWriter(path, fields["general.architecture"].contents())
    for name, field in fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            writer.add_key_value(
                name, field.contents(), field.types[0], field.types[1] if len(field.types) > 1 else None
            )
    if "general.quantization_version" not in fields:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    types = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "Q8_0": "MOSTLY_Q8_0"}
    writer.add_file_type(gguf.LlamaFileType[types[kind]])
    for name, tensor in tensors.items():
        own = "F32" if tensor.ndim == 1 else kind
        if own == "Q8_0":
            quantised = gguf.quants.quantize(tensor, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, np.ascontiguousarray(tensor, dtype=_format(own)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, NDArray[np.float32]]]:
    """Return the fields and the tensors of a GGUF file, the tensors as fp32 numbers in numpy's order of dimensions."""
    import gguf

    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {
        tensor.name: np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        for tensor in reader.tensors
    }
    return fields, tensors


def rounding(kind: str, numbers: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the largest error that each number may have in a format: half a step of it, below 2**-14 of 2**-24."""
    if kind == "F32":
        return np.zeros_like(numbers)
    if kind == "Q8_0":  # half a step of 1/127 of the block's largest, and the scale's own rounding to F16
        largest = np.abs(numbers.reshape(*numbers.shape[:-1], -1, BLOCK)).max(-1, keepdims=True)
        steps = np.maximum(largest / np.float32(127), np.float32(2.0**-24))
        return np.broadcast_to(steps * np.float32(0.57), (*steps.shape[:-1], BLOCK)).reshape(numbers.shape)
    return np.maximum(np.abs(numbers) * np.float32(2.0**-11), np.float32(2.0**-25))


def _format(kind: str) -> Any:
    return np.float32 if kind == "F32" else np.float16
