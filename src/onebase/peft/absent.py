"""PEFT's public names that are not here, with the reason and what to use instead: an import of one says both."""

from collections.abc import Mapping

_METHODS = (
    "AdaLoraConfig AdamssConfig AdaptionPromptConfig BOFTConfig BeftConfig C3AConfig CPTConfig CartridgeConfig DeftConfig "
    "DeloraConfig FourierFTConfig FrodConfig GloraConfig GraloraConfig HRAConfig HiraConfig LilyConfig LoHaConfig "
    "LoKrConfig MissConfig MultitaskPromptTuningConfig MultitaskPromptTuningInit OFTConfig OSFConfig PeanutConfig "
    "PolyConfig PromptEncoderConfig PromptEncoderReparameterizationType PsoftConfig PveraConfig RandLoraConfig RoadConfig "
    "ShadowConfig ShiraConfig SupertuningConfig TinyLoraConfig TrainableTokensConfig UniLoraConfig VBLoRAConfig VeraConfig "
    "WaveFTConfig XLoraConfig"
)
_TUNERS = (
    "AdaLoraModel AdamssModel AdaptionPromptModel BOFTModel BeftModel C3AModel DeftModel DeloraModel FourierFTModel "
    "FrodModel GloraModel GraloraModel HRAModel HiraModel IA3Model LNTuningModel LilyModel LoHaModel LoKrModel LoraModel "
    "MissModel OFTModel OSFModel PEFT_TYPE_TO_MIXED_MODEL_MAPPING PEFT_TYPE_TO_TUNER_MAPPING PeanutModel PolyModel "
    "PsoftModel PveraModel RandLoraModel RoadModel ShadowModel ShiraModel SupertuningModel TinyLoraModel "
    "TrainableTokensModel UniLoraModel VBLoRAModel VeraModel WaveFTModel XLoraModel"
)
_VARIANTS = (
    "ArrowConfig BdLoraConfig EvaConfig KasaConfig LoftQConfig LoraGAConfig LoraRuntimeConfig MontecloraConfig VeloraConfig "
    "create_arrow_model find_kappa_target_modules get_eva_state_dict initialize_lora_eva_weights preprocess_loraga "
    "replace_lora_weights_loftq"
)
_VIRTUAL = (
    "CPTEmbedding CartridgeEncoder PrefixEncoder PromptEmbedding PromptEncoder "
    "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING bloom_model_postprocess_past_key_value "
    "compose_cartridge_adapters initialize_kv_prefix_from_past_key_values initialize_kv_prefix_from_text "
    "prompt_embeddings_from_past_key_values"
)
_GROUPS = {
    _METHODS: "is of a method that onebase does not have. Use LoraConfig, IA3Config, LNTuningConfig, PromptTuningConfig or "
    "PrefixTuningConfig, or peft for this adapter.",
    _TUNERS: "is of the classes that PEFT puts between model and layers; here there is one PeftModel for every method. Use "
    "get_peft_model, and ask model.peft_config which method it is.",
    _VARIANTS: "is of a start or a variant of LoRA that onebase does not have. Use LoraConfig without it "
    "(init_lora_weights: 'pissa', 'olora', 'orthogonal', 'gaussian'; use_dora; use_rslora), or peft for this adapter.",
    _VIRTUAL: "is of how PEFT makes virtual tokens, which are made in another way here. Use PromptTuningConfig or "
    "PrefixTuningConfig; their tensors are in get_peft_model_state_dict(model).",
    "PeftMixedModel": "is for adapters of several methods on one model, which onebase does not have. Use one model for each "
    "method, or peft.",
    "convert_to_lora save_as_lora": "makes LoRA of another method's adapter. Use: onebase export ADAPTER --portable, which "
    "folds what a plain LoRA can hold.",
    "get_base_model_state_dict set_base_model_state_dict": "reads and writes the base under its own names, and here the "
    "base is never changed. Keep the state_dict of the model from before get_peft_model, or take it after unload().",
    "get_layer_status get_model_status": "is PEFT's look into its own layers. Use print_trainable_parameters(), "
    "active_adapters and peft_config.",
    "inject_adapter_in_model": "is not needed: get_peft_model puts the adapter into the model itself. Use get_peft_model(model, "
    "config).get_base_model(), which is the same model with the adapter's layers in it.",
    "shift_tokens_right": "is transformers' own. Use: from transformers.models.bart.modeling_bart import shift_tokens_right",
}  # fmt: skip

ABSENT: Mapping[str, str] = {name: reason for names, reason in _GROUPS.items() for name in names.split()}
"""Why a name of PEFT's is not here and what to use, by name."""
