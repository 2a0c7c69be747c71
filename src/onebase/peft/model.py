"""`PeftModel`: the user's own model with a bank on it, under PEFT's names.

The user's model is changed in place, as by PEFT: a route that gives every row to the active adapter rests in its slot, so
that the model itself, called directly, by `generate`, by a Trainer or again by gradient checkpointing, runs with that
adapter (active.py). Virtual tokens alone need the call to go through here (virtual.py). Everything else that is asked of a
PeftModel is asked of the user's model: this is the one file where attributes are forwarded.

What is PEFT's: names, defaults, first values (start.py), train() and eval(), files (folder.py), parameters' names
(holding.py). What is not: docs/peft.md.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial, update_wrapper
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from onebase.adapters.bank import Adapter
from onebase.config.methods import PrefixTuning
from onebase.config.paths import checked_path
from onebase.errors import ConfigError
from onebase.peft import folder, virtual
from onebase.peft.active import Active
from onebase.peft.config import PeftConfig, PromptLearningConfig, TaskType
from onebase.peft.holding import hold, let_go
from onebase.peft.shell import Tuner, as_it_was, bank_on, let_recompute
from onebase.peft.start import draw_
from onebase.peft.targets import complete
from onebase.peft.weighted import weighted

BASE_ALONE = "__base__"
"""What adapter_names calls rows without an adapter."""


class _Forward:
    """`PeftModel.forward` with the signature of the user's model, which Trainer asks for the columns that it takes."""

    def __get__(self, owner: Any, kind: type | None = None) -> Any:
        if owner is None:
            return PeftModel.run
        return update_wrapper(partial(PeftModel.run, owner), owner.get_base_model().forward)


class PeftModel(nn.Module):
    """A model with adapters, one of them active.

    Args:
        model: any module; it is changed in place.
        peft_config: the first adapter's.
        autocast_adapter_dtype: must be true: adapters are fp32.
        low_cpu_mem_usage: has no effect.

    Raises:
        ConfigError: a value that onebase does not take, or the model has adapters already.
        TargetError: the configuration names no module of the model.
    """

    task: ClassVar[TaskType | None] = None
    """What the class is for, whatever the configuration says; None: what that says."""
    of_task: ClassVar[dict[str, type[PeftModel]]] = {}
    """The class for each task (task_models.py)."""

    def __init__(
        self, model: Any, peft_config: PeftConfig, adapter_name: str = "default",
        autocast_adapter_dtype: bool = True, low_cpu_mem_usage: bool = False,
    ) -> None:  # fmt: skip
        self._start(model, peft_config)
        if not autocast_adapter_dtype and self._bank.base.dtype in (torch.float16, torch.bfloat16):
            raise ConfigError("autocast_adapter_dtype: adapters are fp32 whatever the model is. Leave it out.")
        self.add_adapter(adapter_name, peft_config)
        self.set_adapter(adapter_name, inference_mode=peft_config.inference_mode)

    def _start(self, model: Any, config: PeftConfig) -> None:
        """Put an empty bank on a model."""
        super().__init__()
        if isinstance(model, PeftModel):
            raise ConfigError("the model has adapters already. Use its add_adapter, or unload() it first.")
        self.peft_config: dict[str, PeftConfig] = {}
        self.peft_type, self._task = config.peft_type, self.task or config.task_type
        self._virtual = isinstance(config, PromptLearningConfig)
        self._bank = bank_on(model, flat=self._virtual)
        self._active = Active(self._bank, virtual=self._virtual)
        self.base_model: Any = model if self._virtual else Tuner(model, self)
        if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            model.enable_input_require_grads()

    @classmethod
    def from_pretrained(
        cls, model: Any, model_id: str | Path, adapter_name: str = "default", is_trainable: bool = False,
        config: PeftConfig | None = None, **unused: Any,
    ) -> PeftModel:  # fmt: skip
        """Return a model with the adapter in a folder; without `is_trainable` in evaluation mode, nothing trained.

        Args:
            unused: what PEFT takes and has no effect here (torch_device, low_cpu_mem_usage, ...); warned about.

        Raises:
            FileFormatError: there is none, it is damaged or does not fit the model.
        """
        first = config or PeftConfig.from_pretrained(model_id, unused.get("subfolder"))
        kind = cls.of_task.get(first.task_type or "", cls)
        front = kind.__new__(kind)
        front._start(model, first)
        front.load_adapter(model_id, adapter_name, is_trainable=is_trainable, config=config, **unused)
        front.set_adapter(adapter_name, inference_mode=not is_trainable)
        return front

    # ---------------------------------------------------------------------------------------------------- forwarding

    forward = _Forward()

    @property  # type: ignore[misc]  # read-only
    def __class__(self) -> type:
        """What `isinstance` sees besides PeftModel: PEFT's own class where transformers knows one, or the model's.

        transformers' Trainer saves, and resumes, what is an instance of these; it asks nothing else.
        """
        theirs = getattr(sys.modules.get("transformers.trainer_utils"), "PeftModel", None)
        return theirs or (type(self.get_base_model()) if "_bank" in self.__dict__ else PeftModel)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model" or "_bank" not in self.__dict__:
                raise
            model = self.get_base_model()
            try:
                return getattr(model, name)
            except AttributeError as error:
                told = f"neither onebase.peft's PeftModel nor {type(model).__name__} has {name!r}; see docs/peft.md."
                raise AttributeError(told, name=name, obj=self) from error

    def get_base_model(self) -> Any:
        """Return the user's own model, with the wrappers in it."""
        return self._bank.base.model

    def run(self, *args: Any, adapter_names: Sequence[str] | None = None, **named: Any) -> Any:
        """Return what the model makes of its inputs, entry i with adapter_names[i] where these are given."""
        if adapter_names is not None:
            with self._mixed(adapter_names, 1):
                return self.get_base_model()(*args, **named)
        if not self._active.brings_tokens:
            return self.get_base_model()(*args, **named)
        return virtual.forward(self._bank, self.active_adapter, self._task, args, named)

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **named: Any) -> Any:
        """Return what the model's own `generate` returns, virtual tokens not among it."""
        if "generation_config" in self.__dict__:
            self.get_base_model().generation_config = self.__dict__["generation_config"]
        if adapter_names is not None:
            with self._mixed(adapter_names, named.get("num_beams") or 1):
                return self.get_base_model().generate(*args, **named)
        if not self._active.brings_tokens:
            return self.get_base_model().generate(*args, **named)
        return virtual.generate(self._bank, self.active_adapter, args, named)

    def _mixed(self, names: Sequence[str], beams: int) -> AbstractContextManager[object]:
        owners = [None if name == BASE_ALONE else self._known(name) for name in names for _ in range(beams)]
        return self._active.each_with(owners, training=self.training)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Mapping[str, Any] | None = None, **more: Any
    ) -> None:
        """Let the model recompute its blocks in the backward, under the adapter that was active in the forward."""
        if isinstance(self._active.settings, PrefixTuning):
            raise ConfigError("prefix tuning does not work with gradient checkpointing, as in PEFT. Leave it off.")
        let_recompute(self.get_base_model(), self._bank.base, activation_checkpointing_kwargs or {}, more)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None, **more: Any
    ) -> None:
        """`activation_checkpointing_enable` under its name before transformers 5.20."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **more)

    # ------------------------------------------------------------------------------------------------------ adapters

    def add_adapter(self, adapter_name: str, peft_config: PeftConfig, low_cpu_mem_usage: bool = False) -> None:
        """Put a new adapter on the model; another one stays active, and the new one is not trained yet.

        Raises:
            ConfigError: the name is taken, or another method than the first one's.
            TargetError: the configuration names no module of the model.
        """
        self._check_new(adapter_name, peft_config)
        with as_it_was(self.get_base_model(), self._bank.base):
            settings = complete(self._bank.places, peft_config, self._task)
            adapter = self._bank.add(adapter_name, settings, seed=torch.initial_seed() % 2**63)
        draw_(adapter, peft_config, self._bank.base.input_embedding)
        self._take_in(adapter, peft_config)

    def load_adapter(
        self, model_id: str | Path, adapter_name: str, is_trainable: bool = False, *,
        config: PeftConfig | None = None, subfolder: str | None = None, **unused: Any,
    ) -> Any:  # fmt: skip
        """Put the adapter in a folder on the model, or its tensors into the adapter of that name.

        Args:
            subfolder: where in the folder it lies.
            unused: what PEFT takes and has no effect here: an adapter goes where its modules are; warned about.

        Raises:
            FileFormatError: there is none, it is damaged or does not fit the model.
        """
        self._active.unmerge_first()
        if unused:
            warnings.warn(f"{', '.join(sorted(unused))} has no effect when an adapter is loaded", stacklevel=2)
        with as_it_was(self.get_base_model(), self._bank.base):
            stored = folder.read(checked_path(model_id) / (subfolder or ""), self._bank)
            adapter = None
            if adapter_name not in self.peft_config:
                config = config or PeftConfig.from_pretrained(stored.folder)
                config.inference_mode = not is_trainable
                self._check_new(adapter_name, config)
                if self._virtual and is_trainable:
                    raise ConfigError(
                        "a stored adapter of virtual tokens cannot be trained on, as in PEFT. Begin anew."
                    )
                if is_trainable:
                    stored = folder.with_head(stored, self._bank, config, self._task)
                adapter = self._bank.add(adapter_name, stored.settings, tensors=stored.tensors)
        if adapter is None or config is None:
            folder.load_(self._bank.adapters[adapter_name], stored.tensors)
        else:
            self._take_in(adapter, config)
            self._require(adapter_name, is_trainable)
        if not is_trainable:
            self.eval()
        return _IncompatibleKeys([], [])

    def _check_new(self, name: str, config: PeftConfig) -> None:
        if name == BASE_ALONE or "." in str(name).lstrip("."):
            raise ConfigError(
                f"an adapter cannot be called {name!r}: {BASE_ALONE} means none, and a dot would be a path. Choose another name."
            )
        self._active.unmerge_first()
        if name in self.peft_config:
            raise ConfigError(
                f"adapter {name!r} already exists: choose another name, or delete_adapter({name!r}) first."
            )
        if config.peft_type != self.peft_type:
            raise ConfigError(
                f"a {config.peft_type} adapter cannot stand beside {self.peft_type}; all must be of one method."
            )

    def _take_in(self, adapter: Adapter, config: PeftConfig) -> None:
        self.peft_config[adapter.name] = config
        hold(self, adapter)
        for text in adapter.warnings:
            warnings.warn(f"adapter {adapter.name!r}: {text}", stacklevel=3)
        self._require(adapter.name, False)
        self._active.settle()

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Make an adapter the active one; it alone is trained, unless `inference_mode`.

        Raises:
            ConfigError: there is none of that name.
        """
        self._known(adapter_name)
        self._active.unmerge_first()
        self._active.name = adapter_name
        for name in self.peft_config:
            self._require(name, name == adapter_name and not inference_mode)
        self._active.settle()

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off; if it was active, the first of the others in the alphabet is then.

        Raises:
            ConfigError: there is none of that name.
        """
        self._known(adapter_name)
        self._active.unmerge_first()
        let_go(self, self._bank.adapters[adapter_name])
        self._bank.remove(adapter_name)
        del self.peft_config[adapter_name]
        if adapter_name == self.active_adapter:
            self._active.name = min(self.peft_config, default="")  # PEFT's choice
            if other := self.active_adapter:
                warnings.warn(
                    f"adapter {adapter_name!r} was active and is deleted; {other!r} is active now", stacklevel=2
                )
                self.set_adapter(other)
        self._active.settle()

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "svd",
        **recipe: Any,
    ) -> None:  # fmt: skip
        """Add an adapter made of others (adapters/combining.py).

        Args:
            recipe: svd_rank, density, majority_sign_method.

        Raises:
            ConfigError: all that cannot be combined so.
        """
        sources = [(self.adapter(name), self.peft_config[name]) for name in adapters]
        settings, tensors, config = weighted(sources, weights, combination_type, recipe)
        self._check_new(adapter_name, config)
        self._take_in(self._bank.add(adapter_name, settings, tensors=tensors), config)

    @property
    def active_adapter(self) -> str:
        """The active adapter's name; empty where there is none."""
        return self._active.name

    @property
    def active_adapters(self) -> list[str]:
        """The active adapter's name in a list."""
        return [self.active_adapter] if self.active_adapter else []

    @property
    def active_peft_config(self) -> PeftConfig:
        """The active adapter's configuration."""
        return self.peft_config[self._known(self.active_adapter)]

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Run the base alone inside the block."""
        before = self._active.disabled
        self.disable_adapter_layers()
        try:
            yield
        finally:
            self._active.disable(before)

    def disable_adapter_layers(self) -> None:
        """Run the base alone until `enable_adapter_layers`."""
        self._active.unmerge_first()
        self._active.disable(True)

    def enable_adapter_layers(self) -> None:
        """Run with the active adapter again."""
        self._active.disable(False)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let adapters' tensors require gradients, or not; which one is active stays as it is.

        Raises:
            ConfigError: there is none of that name.
        """
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self._require(self._known(name), requires_grad)

    def _known(self, name: Any) -> str:
        if not isinstance(name, str) or name not in self.peft_config:
            rule = "" if isinstance(name, str) else "one at a time; "
            have = ", ".join(map(repr, self.peft_config)) or "none"
            raise ConfigError(f"no adapter {name!r}; {rule}there is {have}.")
        return name

    def _require(self, name: str, required: bool) -> None:
        for _, parameter in self._bank.adapters[name].parameters():
            parameter.requires_grad_(required)

    # ------------------------------------------------------------------------------------------------------- merging

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Write the active adapter, or these, into the model's weights, beside those that are in them already.

        `unmerge_adapter` restores every byte.

        Args:
            safe_merge: refuse what would leave a weight that is not finite; the model is as it was then.

        Raises:
            ConfigError: an adapter that no weight can hold, or with `safe_merge` a broken one.
        """
        wanted = self.active_adapters if adapter_names is None else [self._known(name) for name in adapter_names]
        self._active.merge(wanted, safe=safe_merge)

    def unmerge_adapter(self) -> None:
        """Put the model's own weights back."""
        self._active.unmerge()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> Any:
        """Return the user's model with the active adapter, or these, in its weights, and no wrappers.

        Args:
            progressbar: has no effect.
            safe_merge: as in `merge_adapter`.
        """
        self.merge_adapter(adapter_names, safe_merge)
        return self.unload(keep_merged=True)

    def unload(self, *, keep_merged: bool = False) -> Any:
        """Return the user's model without adapters."""
        if not keep_merged:
            self.unmerge_adapter()
        model = self.get_base_model()
        for name, adapter in self._bank.adapters.items():
            let_go(self, adapter)
            self._bank.remove(name)
        self.peft_config.clear()
        self._active.leave()
        return model

    # ------------------------------------------------------------------------------------------------ books and files

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return how many numbers are trained, and how many there are, adapters included."""
        counts = [(p.numel(), p.requires_grad) for _, p in self.named_parameters()]
        return sum(count for count, trained in counts if trained), sum(count for count, _ in counts)

    def print_trainable_parameters(self) -> None:
        """Print these numbers in PEFT's words."""
        trained, every = self.get_nb_trainable_parameters()
        print(f"trainable params: {trained:,d} || all params: {every:,d} || trainable%: {100 * trained / every:.4f}")

    def save_pretrained(
        self, save_directory: str | Path, safe_serialization: bool = True, selected_adapters: list[str] | None = None,
        save_embedding_layers: bool | str = "auto", is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        """Write the adapters: "default" into the folder, others into folders of their names in it.

        Args:
            save_embedding_layers: the base's embeddings beside the adapter; "auto": where it is on one of them.
            state_dict: the whole model's, gathered elsewhere; None: as it is.

        Raises:
            ConfigError: no such adapter, or a pickle is asked for.
            FileFormatError: `state_dict` does not hold the adapter.
        """
        if not safe_serialization:
            raise ConfigError(
                "safe_serialization: adapters are written as safetensors, never as pickles. Leave it out."
            )
        names = [self._known(name) for name in selected_adapters or self.peft_config]
        if is_main_process:
            folder.save(self, names, checked_path(save_directory), save_embedding_layers, state_dict)

    def adapter(self, name: str) -> Adapter:
        """Return an adapter as the bank has it.

        Raises:
            ConfigError: there is none of that name.
        """
        return self._bank.adapters[self._known(name)]
