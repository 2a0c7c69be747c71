"""The one door to transformers: models found, fetched, converted, opened, and quiet.

`locate` turns a name into a folder on this machine: a packaged model (packages.py), a folder, a GGUF file (converted
once, kept by its hash), a model of the hub (downloaded into the hub's own cache). `open_pretrained` opens that folder,
frozen, and nothing it could not load exactly: a missing, unexpected or misshapen weight is an error, where
transformers warns. The other functions are the few things that other files need from transformers. The hub: hub.py.

Everything heavy is imported inside functions. Cost: 2-4 s to import transformers, under 1 s for a small model.
"""

import importlib.util
import io
import json
import struct
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onebase.base import hub, memory
from onebase.base.cache import Say, build_once, home, say_on_stderr
from onebase.base.fingerprint import file_sha256
from onebase.base.gguf_digits import mend_digits_
from onebase.base.loaded import check_loaded, prepare_for_labels_, without_new_heads_
from onebase.base.open_errors import HOW_TO_FIT, explained_open_errors, own_code
from onebase.base.packages import PACKAGES, fetch
from onebase.base.place import (
    ModelPlace,
    check_model_folder,
    first_line,
    looks_like_path,
    not_found,
    read_json,
    weight_count,
)
from onebase.config.labels import Labels
from onebase.config.paths import checked_path
from onebase.errors import ConfigError, FileFormatError, MissingExtraError, ModelError

if TYPE_CHECKING:
    import torch

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.txt",
    "vocab.json",
)


# ------------------------------------------------------------------------------------------------------------- finding


def locate(
    name: str, *, revision: str | None = None, offline: bool | None = None, say: Say = say_on_stderr
) -> ModelPlace:
    """Return where a model stands on this machine, after fetching or converting it if that is needed.

    Args:
        name: a packaged model's name, a folder, a `.gguf` file, or a hub id; the first of these that it is.
        revision: a branch, tag or commit; for hub models alone.
        offline: never use the network. None: as HF_HUB_OFFLINE says for the hub.
        say: takes a line for each thing that takes long.

    Raises:
        ConfigError: the name can be none.
        ModelError: there is no such model; the message says what was looked for and where.
        FileFormatError: it is there, but damaged.
    """
    path = checked_path(name).expanduser()
    local = name in PACKAGES or looks_like_path(name) or path.is_dir()
    if local and revision is not None:
        raise ConfigError(f"revision: only models of the hub have one; '{name}' is on this machine, got '{revision}'.")
    if name in PACKAGES:
        return ModelPlace(name, fetch(name, convert_gguf, offline=offline is True, say=say), "packaged")
    if path.is_dir():
        check_model_folder(path, name)
        return ModelPlace(name, path.absolute(), "folder")
    if path.is_file():
        return ModelPlace(name, _converted(path, say), "gguf")
    if looks_like_path(name):
        raise not_found(name, PACKAGES)
    return hub.locate_on_hub(name, revision=revision, offline=hub.is_off() if offline is None else offline, say=say)


def _converted(path: Path, say: Say) -> Path:
    """Return the folder that a GGUF file was converted to, now or earlier: it is named by the file's hash."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise FileFormatError(f"{path}: is a file, but not a GGUF file. Name a folder, a .gguf file or a hub id.")
    folder = home() / "models" / f"{path.stem}-{file_sha256(path)[:16]}"

    def build(partial: Path) -> None:
        started = time.monotonic()
        say(f"converting {path} to safetensors, once")
        convert_gguf(path, partial)
        say(f"{path.name} is ready after {time.monotonic() - started:.0f} s: {folder}")

    return build_once(folder, build, say=say)


# ---------------------------------------------------------------------------------------------------------- converting


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Fill `folder` with the model of a GGUF file: safetensors in float32 (exact), tokenizer, template, no local path.

    The same file gives the same bytes each time. transformers will not save a model that it calls quantised, so the
    state moves into a plain one.

    Raises:
        FileFormatError: the file is damaged, or of an architecture that transformers cannot read from GGUF.
    """
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(f"reading GGUF files needs {package}. Install it: pip install {package}")
    import torch
    import transformers

    try:
        with silence(), redirect_stderr(io.StringIO()):  # its progress bar heeds no setting
            arguments: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
            tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, **arguments)
            mend_digits_(tokenizer, gguf)
            if hasattr(transformers, "GgufConfig"):
                arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
            loaded = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **arguments)
            config = plain_config(loaded.config)
            with torch.device("meta"):
                plain = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            plain.load_state_dict(loaded.state_dict(), assign=True)
            plain.tie_weights()
            if tokenizer.model_max_length > 1e9:
                tokenizer.model_max_length = config.get_text_config().max_position_embeddings
            plain.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except (ValueError, RuntimeError, LookupError, TypeError, EOFError, struct.error) as error:
        raise FileFormatError(f"{gguf}: cannot be read as a GGUF model: {first_line(error)}") from error
    clean_json(folder / "config.json", {"quantization_config"})
    clean_json(folder / "generation_config.json", set())
    clean_json(folder / "tokenizer_config.json", {"is_local", "local_files_only", "name_or_path"})


def plain_config(config: Any) -> Any:
    """Return a configuration without what is of one opened model alone: where it came from, how it attends."""
    written = {key: value for key, value in config.to_dict().items() if not key.startswith("_")}
    written.pop("quantization_config", None)
    return type(config).from_dict(written)


def clean_json(path: Path, unwanted: set[str]) -> None:
    """Drop what says where and how the file was made: keys that begin with an underscore, and the unwanted ones."""
    if path.is_file():
        kept = {k: v for k, v in read_json(path).items() if not k.startswith("_") and k not in unwanted}
        path.write_text(json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------- opening


def open_pretrained(
    place: ModelPlace,
    *,
    dtype: "torch.dtype | None" = None,
    device: str = "cpu",
    labels: Labels | None = None,
    trust_remote_code: bool = False,
    say: Say = say_on_stderr,
) -> tuple[Any, Any, tuple[str, ...]]:
    """Return (model, tokenizer, fresh): the model frozen, in evaluation mode, every weight exactly as stored.

    With `labels` it is a model with a head for them, and `fresh` are the modules of that head which the files hold no
    weights for: their values are drawn, the same ones each time.

    Args:
        place: where it stands, from `locate`.
        dtype: None keeps the format it is stored in.
        device: as torch names it.
        labels: what a head for whole examples is to predict.
        trust_remote_code: run Python code that comes with the model; said when it happens.
        say: takes what the user should know.

    The tokenizer is None where the folder has none (vision models).

    Raises:
        ModelError: it cannot be opened, or its files do not hold exactly the weights it needs.
        FileFormatError: a weight file is damaged.
        CapacityError: memory does not suffice.
    """
    check_model_folder(place.folder, place.name)
    if trust_remote_code and (brought := own_code(place.folder)):
        say(f"{place.name}: running Python code that comes with the model (trust_remote_code): {', '.join(brought)}")
    arguments: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": not trust_remote_code}
    with silence(), explained_open_errors(place):
        import transformers

        config = transformers.AutoConfig.from_pretrained(place.folder, **arguments)
        prequantised = getattr(config, "quantization_config", None) is not None
        if not prequantised and dtype is not None:
            memory.check_room_for(place.name, weight_count(place.folder) * dtype.itemsize, f"{HOW_TO_FIT}.")
        tokenizer = _tokenizer(place, arguments)
        if labels is not None:
            prepare_for_labels_(config, labels, tokenizer)
        model, loading = _loaded(place, config, labels, dtype, {"": device} if prequantised else None, arguments)
        fresh = () if labels is None else without_new_heads_(model, loading)
        check_loaded(place, model, loading, say)
        if not prequantised:
            model = model.to(device)
    return model.eval().requires_grad_(False), tokenizer, fresh


def _loaded(
    place: ModelPlace, config: Any, labels: Labels | None, dtype: "torch.dtype | None", device_map: Any, more: Any
) -> tuple[Any, dict[str, Any]]:
    """Return the model, and transformers' account of what it loaded."""
    with seeded(0):  # a new head's weights
        model, loading = _model_class(config, labels).from_pretrained(
            place.folder,
            config=config,
            dtype="auto" if dtype is None else dtype,
            device_map=device_map,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # so that all are listed; any is an error of check_loaded's
            output_loading_info=True,
            **more,
        )
    return model, loading


def open_tokenizer(place: ModelPlace, *, trust_remote_code: bool = False) -> tuple[Any, int | None]:
    """Return (tokenizer, the most tokens that the model takes), without opening its weights; see `open_pretrained`."""
    check_model_folder(place.folder, place.name)
    arguments: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": not trust_remote_code}
    with silence(), explained_open_errors(place):
        import transformers

        config = transformers.AutoConfig.from_pretrained(place.folder, **arguments)
        return _tokenizer(place, arguments), getattr(config.get_text_config(), "max_position_embeddings", None)


def stored_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer in a folder, a model's or an adapter's, as any user of transformers gets it; None without one."""
    with silence():
        arguments = {"trust_remote_code": trust_remote_code, "local_files_only": not trust_remote_code}
        return _tokenizer(ModelPlace(str(folder), folder, "folder"), arguments)


def _tokenizer(place: ModelPlace, arguments: dict[str, Any]) -> Any:
    import transformers

    files = [name for name in _TOKENIZER_FILES if (place.folder / name).is_file()]
    if not files:
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(place.folder, **arguments)
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # what a damaged file raises depends on the place of the damage
        if "trust_remote_code" in str(error):
            raise
        raise ModelError(
            f"{place.name}: the tokenizer in {place.folder} cannot be opened: {first_line(error)}\n"
            f"Is one of its files damaged ({', '.join(files)}, the chat template)? Get them again."
        ) from error


def _model_class(config: Any, labels: Labels | None = None) -> Any:
    """Return the class that opens a model: the one that config.json names, by the causal-language-model door if it can.

    With `labels` it is the one with a head for them.
    """
    import transformers

    if labels is not None:
        return transformers.AutoModelForSequenceClassification
    named = (config.architectures or [""])[0]
    if named.endswith(("ForCausalLM", "LMHeadModel")):
        return transformers.AutoModelForCausalLM
    own = getattr(transformers, named, None) if named else None
    return own if own is not None and hasattr(own, "from_pretrained") else transformers.AutoModel


# ----------------------------------------------------------------------------------- what else is needed of transformers


@contextmanager
def silence() -> Iterator[None]:
    """Let transformers say nothing: no progress bars, log lines or warnings; as it was, afterwards."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Let torch's global generator start from `seed`, and go on as before afterwards."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def draw_weights_(model: Any, module: Any, seed: int) -> None:
    """Fill a module with a new one's weights, drawn as the model draws its own."""
    import torch

    with seeded(seed), torch.no_grad():
        for part in module.modules():
            model._init_weights(part)


def register_attention(name: str, function: Callable[..., Any], *, masked: bool = False) -> None:
    """Let models that are set to the attention implementation `name` call `function`.

    With `masked` it gets a mask of what each query may see (True: it may; None: all, or all before it if causal), as
    torch's attention does; otherwise no mask is built for it.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(name, function)
    if masked:
        AttentionMaskInterface.register(name, sdpa_mask)


def unregister_attention(name: str) -> None:
    """Forget an attention implementation; unknown names are fine. transformers itself offers no way to do it."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface._global_mapping.pop(name, None)
    AttentionMaskInterface._global_mapping.pop(name, None)


def enable_checkpointing(model: Any, context_function: Callable[[], tuple[Any, Any]]) -> list[Any]:
    """Make a model recompute its blocks in the backward, under `context_function`'s contexts; return the blocks.

    A block is recomputed only while its `training` is set, which is the caller's to do.

    Raises:
        ConfigError: the model has no blocks that can be recomputed.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks or not model.supports_gradient_checkpointing:
        raise ConfigError(
            f"train.activation_checkpointing: a {type(model).__name__} cannot recompute its blocks. Set it to false."
        )
    arguments = {"use_reentrant": False, "context_fn": context_function}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=arguments)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
    return blocks


def disable_checkpointing(model: Any) -> None:
    """Undo `enable_checkpointing`."""
    if hasattr(model, "activation_checkpointing_disable"):
        model.activation_checkpointing_disable()
    else:
        model.gradient_checkpointing_disable()


def config_text(model: Any) -> str:
    """Return a model's configuration as JSON, without a path."""
    text: str = model.config.to_json_string(use_diff=True)
    kept = {key: value for key, value in json.loads(text).items() if not key.startswith("_")}
    return json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def trunk_output(hidden: Any, pooled: Any) -> Any:
    """Return hidden and pooled rows as a trunk returns them."""
    from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

    return BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=hidden, pooler_output=pooled)


def generation_config_of(model: Any) -> Any:
    """Return how a model generates by default (its end tokens, sampling); an empty configuration where it says nothing."""
    from transformers import GenerationConfig

    config = getattr(model, "generation_config", None)
    return GenerationConfig() if config is None else config


def renamed_path(model: Any, path: str) -> str:
    """Return where a module is now that an older transformers had at `path`; the path itself where nothing says so."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:  # before transformers 5 there was nothing to rename
        return path
    if not hasattr(model, "config"):
        return path
    renamings = [one for one in get_model_conversion_mapping(model) if isinstance(one, WeightRenaming)]
    renamed: str = rename_source_key(path, renamings, [])[0]
    return renamed
