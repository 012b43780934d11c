"""Published models in the small: folders as `transformers` saves them, to be read, changed and spoiled."""

import json
import os
import shutil

import pytest
import torch

WHY = "needs the extra: pip install -r requirements-hf.txt"
transformers = pytest.importorskip("transformers", reason=WHY)
tokenizers = pytest.importorskip("tokenizers", reason=WHY)
safetensors = pytest.importorskip("safetensors.torch", reason=WHY)

T, ORIGINAL, V = 64, 32, 300  # positions of the tiny models, those before a scaling, and their vocabulary
FROM = dict(original_max_position_embeddings=ORIGINAL)
LLAMA = dict(
    hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6, max_position_embeddings=T
)
SIZES = {
    "llama": LLAMA,
    "qwen2": LLAMA | dict(num_key_value_heads=3),
    "gpt_neox": LLAMA,
    "gpt2": dict(n_embd=48, n_layer=2, n_head=6, n_positions=T),
    "bloom": dict(hidden_size=48, n_layer=2, n_head=6),
}
Q = "model.layers.0.self_attn.q_proj.weight"  # of a llama


def train_bpe(file):
    """Write a tokenizer.json as GPT-2's, of 300 tokens; 0 ends a text."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=V, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator([f"line {n} says that {n} times {n} is {n * n}.\n" for n in range(99)], trainer)
    inner.save(str(file))


@torch.no_grad()
def scatter(model):
    """Draw every parameter anew, so large that attention and logits differ clearly, norms and biases too."""
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_" in name:
            parameter.normal_(std=0.3).add_(1.0 if name.endswith("weight") else 0.0)
        elif parameter.dim() == 1:
            parameter.normal_(std=0.5)
        else:
            parameter.normal_(std=1.0 if "emb" in name or "wte" in name or "wpe" in name else 1.5 * 48**-0.5)
    return model


def save(folder, bpe, model_type, dtype=torch.float32, **settings):
    """A model of the family, drawn anew, as a folder."""
    sizes = SIZES[model_type] | dict(vocab_size=V, bos_token_id=0, eos_token_id=0) | settings
    config = transformers.AutoConfig.for_model(model_type, **sizes)
    model = scatter(transformers.AutoModelForCausalLM.from_config(config)).to(dtype)
    model.save_pretrained(folder)
    shutil.copy(bpe, folder / "tokenizer.json")
    return folder


def oracle(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def edit(folder, **changes):
    """Change keys of config.json; None takes one out."""
    path = folder / "config.json"
    cfg = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in cfg.items() if value is not None}), encoding="utf-8")
    return folder


def copy(folder, target, **changes):
    shutil.copytree(folder, target)
    return edit(target, **changes)


def stored(folder):
    return safetensors.load_file(folder / "model.safetensors")


def store(folder, tensors, file="model.safetensors"):
    safetensors.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file)
    return folder


def shard(folder):
    """Write the folder's model again in pieces of 10 kB; returns their names."""
    oracle(folder).save_pretrained(folder, max_shard_size="10KB")
    (folder / "model.safetensors").unlink()
    return sorted(path.name for path in folder.glob("model-*.safetensors"))


def cut(path, share=0.5):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def changed(folder, name, change):
    store(folder, stored(folder) | {name: change(stored(folder)[name])})


def retokenized(folder, change):
    """Change the JSON of tokenizer.json."""
    path = folder / "tokenizer.json"
    inner = json.loads(path.read_text(encoding="utf-8"))
    change(inner)
    path.write_text(json.dumps(inner), encoding="utf-8")


def refused(done, *words):
    assert done.returncode == 2, done.stdout + done.stderr
    script = next(os.path.basename(word) for word in map(str, done.args) if word.endswith(".py"))
    assert done.stderr.startswith(f"{script}: ") and done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert word in done.stderr
