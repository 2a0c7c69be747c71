"""Tiny random models, tokenizers, GGUF files and wheels, built in code."""

import hashlib
import zipfile
from pathlib import Path

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 300,
}


def hush(text: str) -> None:
    """Take what is said and say nothing."""


def llama_folder(folder: Path, *, seed: int = 0, tokenizer: bool = True, **config) -> Path:
    """Write a tiny Llama, as `save_pretrained` does."""
    import torch
    import transformers

    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    settings = {**SIZES, "num_key_value_heads": 2, "tie_word_embeddings": True, **config}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    torch.set_rng_state(generator_state)
    model.save_pretrained(folder)
    if tokenizer:
        word_tokenizer().save_pretrained(folder)
    return folder


def word_tokenizer():
    import tokenizers
    import transformers

    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "one": 3, "base": 4}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def gguf_file(path: Path, *, pre: str = "smollm") -> Path:
    """Write a tiny Llama as a GGUF file, with a byte-level vocabulary."""
    import gguf
    import numpy as np

    hidden, inner, heads, kv_heads, layers = 32, 64, 4, 2, 2
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(gguf_byte_alphabet())
    merges = ["Ċ Ċ", "Ġ Ġ"]
    tokens = specials + alphabet + [merge.replace(" ", "") for merge in merges]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Tiny Of Tests")
    writer.add_block_count(layers)
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(
        [gguf.TokenType.CONTROL] * len(specials) + [gguf.TokenType.NORMAL] * (len(tokens) - len(specials))
    )
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")
    rng = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(name, rng.normal(size=shape).astype(np.float32))

    kv = hidden // heads * kv_heads
    add("token_embd.weight", len(tokens), hidden)
    add("output_norm.weight", hidden)
    for layer in range(layers):
        block = f"blk.{layer}."
        add(block + "attn_norm.weight", hidden)
        add(block + "ffn_norm.weight", hidden)
        add(block + "attn_q.weight", hidden, hidden)
        add(block + "attn_k.weight", kv, hidden)
        add(block + "attn_v.weight", kv, hidden)
        add(block + "attn_output.weight", hidden, hidden)
        add(block + "ffn_gate.weight", inner, hidden)
        add(block + "ffn_up.weight", inner, hidden)
        add(block + "ffn_down.weight", hidden, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_byte_alphabet() -> list[str]:
    import tokenizers

    return tokenizers.pre_tokenizers.ByteLevel.alphabet()


def wheel(path: Path, members: dict[str, bytes]) -> str:
    """Write a wheel-like archive; return its SHA-256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return hashlib.sha256(path.read_bytes()).hexdigest()
