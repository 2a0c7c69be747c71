"""PEFT's default targets: the modules that its methods go on where target_modules is not given, by `config.model_type`.

Source: peft 0.21.2, utils/constants.py. A test holds them equal to the installed PEFT's.
"""

from collections.abc import Mapping

Names = str | tuple[str, ...]


def _by_model(models: Mapping[Names, str]) -> dict[str, Names]:
    return {model: names for names, listed in models.items() for model in listed.split()}


LORA_TARGETS: Mapping[str, Names] = _by_model(
    {
        ("q", "v"): "t5 mt5",
        (
            "q_proj",
            "v_proj",
        ): "bart opt gptj gpt_neo llama llama4 mistral mixtral stablelm gemma gemma2 gemma3_text qwen2 qwen3",
        ("c_attn",): "gpt2 gpt_bigcode",
        ("query_key_value",): "bloom gpt_neox chatglm RefinedWebModel RefinedWeb falcon",
        ("q", "v", "q_proj", "v_proj"): "blip-2",
        ("query", "value"): "bert roberta xlm-roberta electra layoutlm",
        ("query_proj", "value_proj"): "deberta-v2",
        ("in_proj",): "deberta",
        ("Wqkv",): "mpt",
        ("c_proj", "c_attn"): "btlm",
        ("qkv_proj",): "codegen",
        ("q_proj", "v_proj", "fc1", "fc2"): "phi",
        r".*language_model\..*\.(q_proj|v_proj)": "gemma4",
        ("q_proj", "k_proj", "v_proj", "o_proj"): "nemotron_h",
        ("key", "value", "receptance", "output"): "rwkv",
        ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"): "rwkv7",
    }
)
"""Of LoRA."""

IA3_TARGETS: Mapping[str, Names] = _by_model(
    {
        ("k", "v", "wo"): "t5",
        ("k", "v", "wi_1"): "mt5",
        ("c_attn", "mlp.c_proj"): "gpt2 gpt_bigcode",
        ("query_key_value", "mlp.dense_4h_to_h"): "bloom",
        ("key", "value", "output.dense"): "roberta bert",
        ("q_proj", "k_proj", "fc2"): "opt",
        ("q_proj", "v_proj", "fc_out"): "gptj",
        ("query_key_value", "dense_4h_to_h"): "gpt_neox RefinedWebModel RefinedWeb falcon",
        ("q_proj", "v_proj", "c_proj"): "gpt_neo",
        ("q_proj", "v_proj", "fc2"): "bart phi",
        ("k_proj", "v_proj", "down_proj"): "llama mistral",
        ("q_proj", "v_proj", "down_proj"): "llama4 gemma gemma2 gemma3_text qwen2 qwen3",
        ("k_proj", "v_proj", "w2"): "mixtral",
        ("key_proj", "value_proj", "output.dense"): "deberta-v2",
        ("in_proj", "output.dense"): "deberta",
    }
)
"""Of IA3."""

IA3_FEEDFORWARD: Mapping[str, Names] = _by_model(
    {
        ("wo",): "t5",
        (): "mt5",
        ("mlp.c_proj",): "gpt2 gpt_bigcode",
        ("mlp.dense_4h_to_h",): "bloom",
        ("output.dense",): "roberta bert deberta-v2 deberta",
        ("fc2",): "opt bart phi",
        ("fc_out",): "gptj",
        ("dense_4h_to_h",): "gpt_neox RefinedWeb RefinedWebModel falcon",
        ("c_proj",): "gpt_neo",
        ("down_proj",): "llama llama4 mistral gemma gemma2 gemma3_text qwen2 qwen3",
        ("w2",): "mixtral",
    }
)
"""Those of IA3's whose input is scaled."""

LN_TARGETS: Mapping[str, Names] = _by_model(
    {
        ("input_layernorm", "post_attention_layernorm", "norm"): "llama mistral gemma",
        ("input_layernorm", "post_attention_layernorm", "ln_f"): "bloom falcon",
        (
            "multi_modal_projector",
            "input_layernorm",
            "post_attention_layernorm",
            "norm",
            "embed_tokens",
            "lm_head",
        ): "llava",
        ("layer_norm", "final_layer_norm"): "t5 mt5",
        ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"): "bart",
        ("ln_1", "ln_2", "ln_f"): "gpt2",
        ("layernorm", "LayerNorm", "final_layer_norm", "self_attn_layer_norm"): "blip-2",
        ("ln_1", "ln_f"): "gptj",
        ("input_layernorm", "final_layernorm"): "phi",
        (
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
            "norm",
        ): "gemma2 gemma3_text",
        ("post_attention_layernorm",): "qwen2 qwen3",
    }
)
"""Of LayerNorm tuning."""
