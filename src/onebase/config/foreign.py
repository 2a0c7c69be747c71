"""What other tools call our settings, and what this version does not have.

Plain tables, read only to write an error: a key of PEFT, transformers, TRL, Axolotl, LLaMA-Factory or Unsloth in
a settings file is never accepted silently, and the error names our setting. Nothing is converted, because the same
word often means another thing (rows per device, rows per step).
"""

from collections.abc import Collection

OURS: dict[str, str] = {
    # the model
    "base_model": "model",
    "base_model_name_or_path": "model",
    "model_name": "model",
    "model_name_or_path": "model",
    "model_id": "model",
    "model_revision": "revision",
    "revision_of_model": "revision",
    "torch_dtype": "dtype",
    "precision": "dtype",
    "bf16": "dtype; write dtype: bfloat16",
    "pure_bf16": "dtype; write dtype: bfloat16",
    "fp32": "dtype; write dtype: float32",
    "device_map": "device",
    "use_cpu": "device; write device: cpu",
    "no_cuda": "device; write device: cpu",
    # the data
    "dataset": "data.train",
    "datasets": "data.train",
    "dataset_name": "data.train; a data set of the hub is written hub:org/name:split",
    "dataset_path": "data.train",
    "train_file": "data.train",
    "train_data": "data.train",
    "test_datasets": "data.valid",
    "eval_dataset": "data.valid",
    "eval_data": "data.valid",
    "validation": "data.valid",
    "validation_file": "data.valid",
    "val_set_size": "data.valid; a fraction there, such as 0.05, splits data.train",
    "val_size": "data.valid; a fraction there, such as 0.05, splits data.train",
    "test_file": "data.test",
    "sequence_len": "data.max_length",
    "cutoff_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "model_max_length": "data.max_length",
    "chat_template": "data.template; the path of a Jinja file",
    "chat_template_path": "data.template",
    "system_prompt": "data.system",
    "default_system": "data.system",
    "train_on_inputs": "data.labels; which assistant turns are learned, prompts never are",
    "assistant_only_loss": "data.labels; which assistant turns are learned, prompts never are",
    "completion_only_loss": "data.labels; which assistant turns are learned, prompts never are",
    "mask_history": "data.labels; write labels: last",
    "dataset_text_field": "data.columns; write columns: {text: NAME}",
    "text_column": "data.columns; write columns: {text: NAME}",
    "shuffle_dataset": "data.shuffle",
    # the adapter
    "finetuning_type": "adapter.method",
    "peft_type": "adapter.method",
    "peft_method": "adapter.method",
    "rank": "adapter.r",
    "lora_r": "adapter.r",
    "lora_rank": "adapter.r",
    "alpha": "adapter.lora_alpha",
    "dropout": "adapter.lora_dropout",
    "lora_target": "adapter.target_modules",
    "lora_targets": "adapter.target_modules",
    "lora_target_modules": "adapter.target_modules",
    "lora_target_linear": "adapter.target_modules; write target_modules: all-linear",
    "lora_layers_to_transform": "adapter.layers_to_transform",
    "lora_modules_to_save": "adapter.modules_to_save",
    "additional_target": "adapter.modules_to_save",
    "lora_plus_lr_ratio": "adapter.loraplus_lr_ratio",
    "peft_use_dora": "adapter.use_dora",
    "lora_target_parameters": "adapter.target_parameters",
    "peft_trainable_token_indices": "adapter.trainable_token_indices",
    "peft_use_rslora": "adapter.use_rslora",
    "use_rs_lora": "adapter.use_rslora",
    "peft_init_lora_weights": "adapter.init_lora_weights",
    "adapter_name_or_path": "adapter.init_from",
    "lora_model_dir": "adapter.init_from",
    # the training
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "max_steps": "train.steps",
    "num_steps": "train.steps",
    "micro_batch_size": "train.batch_size; rows per optimiser step, cut into micro-batches by tokens",
    "per_device_train_batch_size": "train.batch_size; rows per optimiser step, cut into micro-batches by tokens",
    "gradient_accumulation_steps": "train.batch_size; rows per optimiser step, cut into micro-batches by tokens",
    "per_device_eval_batch_size": "eval.batch_tokens",
    "eval_batch_size": "eval.batch_tokens",
    "lr": "train.learning_rate",
    "lr_scheduler": "train.lr_scheduler_type",
    "scheduler": "train.lr_scheduler_type",
    "warmup": "train.warmup_steps",
    "max_grad_value": "train.max_grad_norm",
    "gradient_clipping": "train.max_grad_norm",
    "adam_eps": "train.adam_epsilon",
    "random_state": "train.seed",
    "random_seed": "train.seed",
    "data_seed": "train.seed",
    "eval_steps": "train.eval_every",
    "save_steps": "train.save_every",
    "save_total_limit": "train.keep_checkpoints",
    "early_stopping": "train.early_stopping_patience",
    "load_best_model_at_end": "train.keep_best",
    "gradient_checkpointing": "train.activation_checkpointing",
    "use_gradient_checkpointing": "train.activation_checkpointing",
    "num_threads": "train.threads",
    "load_in_8bit": "quantize; write quantize: int8",
    "load_in_4bit": "quantize; write quantize: nf4",
    "quantization_bit": "quantize; write quantize: int8 or nf4",
    "quantization_config": "quantize; write quantize: int8 or nf4",
    "bnb_4bit_quant_type": "quantize; write quantize: nf4, there is no fp4",
    "bnb_4bit_compute_dtype": "dtype; layers in 4 bits compute in the base's format",
}
"""Another tool's name -> our dotted name, with a note after a semicolon where the meaning differs."""

_NOT_YET = "not available in this version"
_ONLY_ADAMW = f"{_NOT_YET}; the optimiser is AdamW. Remove it."
_LORA_ONLY = f"{_NOT_YET} for adapters. Remove it."
_FLAT = "not needed; batches are flat, without padding. Remove it."
_ALWAYS = "always so; runs repeat bit for bit on one machine. Remove it."
_DOUBLE = "always so with quantize: nf4. Remove it."
_ONE_DEVICE = f"{_NOT_YET}; training uses one device. Remove it."

ABSENT: dict[str, str] = {
    "sweep": f"{_NOT_YET}; run 'onebase train' once for each value, with --set.",
    "grid": f"{_NOT_YET}; run 'onebase train' once for each value, with --set.",
    "trackers": f"{_NOT_YET}; the run folder holds metrics.jsonl. Remove it.",
    "report_to": f"{_NOT_YET}; the run folder holds metrics.jsonl. Remove it.",
    "logging_steps": "not needed; metrics.jsonl records every step. Remove it.",
    "metrics": f"{_NOT_YET}; evaluation gives all that the task has. Remove it.",
    "bnb_4bit_use_double_quant": _DOUBLE,
    "double_quantization": _DOUBLE,
    "bnb_4bit_quant_storage": "not needed; weights in 4 bits are stored two in a byte. Remove it.",
    "fp16": f"{_NOT_YET}; 'dtype' is auto, float32 or bfloat16. Remove it.",
    "lora_bias": _LORA_ONLY,
    "layer_replication": _LORA_ONLY,
    "optim": _ONLY_ADAMW,
    "optimizer": _ONLY_ADAMW,
    "full_determinism": _ALWAYS,
    "deterministic": _ALWAYS,
    "packing": _FLAT,
    "sample_packing": _FLAT,
    "pad_to_sequence_len": _FLAT,
    "padding_free": _FLAT,
    "group_by_length": _FLAT,
    "attn_implementation": "not needed; the layout of a batch decides how attention is computed. Remove it.",
    "flash_attention": "not needed; the layout of a batch decides how attention is computed. Remove it.",
    "deepspeed": _ONE_DEVICE,
    "fsdp": _ONE_DEVICE,
    "fsdp_config": _ONE_DEVICE,
    "output_dir": "no setting but an argument: onebase train CONFIG --out DIR",
    "out": "no setting but an argument: onebase train CONFIG --out DIR",
    "resume_from_checkpoint": "no setting but an argument: onebase train CONFIG --out DIR --resume",
    "resume": "no setting but an argument: onebase train CONFIG --out DIR --resume",
}
"""A name that has no setting here -> why, and what to do."""

PLANNED: dict[str, frozenset[str]] = {
    "task": frozenset({"token-classify", "image-classify", "seq2seq"}),
    "method": frozenset({"adalora", "loha", "lokr", "vera", "oft", "boft", "hra", "fourierft", "vblora", "randlora"})
    | frozenset({"p-tuning", "multitask-prompt-tuning", "adaption-prompt", "xlora", "poly", "bone", "miss", "road"})
    | frozenset({"trainable-tokens", "shira", "c3a", "cpt", "lily"}),
    "dtype": frozenset({"float16"}),
    "init_lora_weights": frozenset({"eva", "corda", "loftq", "lora_ga"}),
}
"""A setting's own name -> values that it does not take yet."""

SPELLINGS: dict[str, str] = {
    "fp32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "gpu": "cuda",
    "4bit": "nf4",
    "8bit": "int8",
}
"""Values that other tools spell differently."""


_NORMS = "method: ln-tuning"
_FULL = "method: full"
WRITTEN: dict[str, dict[str, str]] = {
    "method": {
        "dora": "method: lora with use_dora: true",
        "rslora": "method: lora with use_rslora: true",
        "lora+": "method: lora with loraplus_lr_ratio: 16",
        "loraplus": "method: lora with loraplus_lr_ratio: 16",
        "lora-plus": "method: lora with loraplus_lr_ratio: 16",
        "pissa": "method: lora with init_lora_weights: pissa",
        "olora": "method: lora with init_lora_weights: olora",
        "lora": "method: lora",
        "qlora": "method: lora, and outside of adapter quantize: nf4",
        "(ia)3": "method: ia3",
        "ia3": "method: ia3",
        "bit-fit": "method: bitfit",
        "bitfit": "method: bitfit",
        "bias": "method: bitfit",
        "ln": _NORMS,
        "layernorm": _NORMS,
        "layernorm-tuning": _NORMS,
        "layer-norm": _NORMS,
        "lntuning": _NORMS,
        "ln-tuning": _NORMS,
        "norm": _NORMS,
        "norm-tuning": _NORMS,
        "houlsby": "method: bottleneck with placement: houlsby",
        "pfeiffer": "method: bottleneck with placement: pfeiffer",
        "adapter": "method: bottleneck",
        "adapters": "method: bottleneck",
        "bottleneck-adapter": "method: bottleneck",
        "bottleneck": "method: bottleneck",
        "prompt": "method: prompt-tuning",
        "prompts": "method: prompt-tuning",
        "prompttuning": "method: prompt-tuning",
        "prompt-tuning": "method: prompt-tuning",
        "soft-prompt": "method: prompt-tuning",
        "soft-prompts": "method: prompt-tuning",
        "prefix": "method: prefix-tuning",
        "prefixtuning": "method: prefix-tuning",
        "prefix-tuning": "method: prefix-tuning",
        "full": _FULL,
        "full-finetune": _FULL,
        "full-finetuning": _FULL,
        "full-fine-tuning": _FULL,
        "finetune": _FULL,
        "fine-tuning": _FULL,
        "fft": _FULL,
    },
}
"""A setting's own name -> how others write its values, lower case with hyphens -> what to write here."""


def explain(key: str, known: Collection[str]) -> str | None:
    """Return what a user who wrote `key` should write, or None where only guessing is left.

    `known` are the dotted names that exist where the key was read.
    """
    if key in ABSENT:
        return ABSENT[key]
    leaves = {name: name.rpartition(".")[2] for name in known}
    if key in OURS:
        name, _, note = OURS[key].partition("; ")
        leaf = name.rpartition(".")[2]
        if name not in known and leaf in known:
            name = leaf
        return f"unknown setting; here it is '{name}'" + (f": {note}." if note else ".")
    elsewhere = [name for name, leaf in leaves.items() if leaf == key]
    if elsewhere:
        return f"unknown setting at this place; write it as {' or '.join(elsewhere)}."
    return None
