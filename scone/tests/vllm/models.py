"""Random models of the sizes that vLLM takes on CPUs, whose f-grams are dense and matter; and what they say alone."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from scone.inference.embedding_table import EmbeddingTable
from scone.inference.precompute import precompute_table
from scone.models.language_model import SconeForCausalLM
from scone.models.over_encoding import OverEncodingForCausalLM
from scone.tokenization.counting import count_f_grams

VOCAB_SIZE, WIDTH, POSITIONS, SEPARATOR = 48, 64, 512, 0
HEADS = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 96}
SIZES = {"hidden_size": WIDTH, "max_position_embeddings": POSITIONS, "head_dim": 32} | HEADS
TRUNKS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": POSITIONS},
    "llama": SIZES,
    "qwen3": SIZES | {"tie_word_embeddings": True},
    "qwen2": {name: value for name, value in SIZES.items() if name != "head_dim"},
    "granite": SIZES | {"embedding_multiplier": 3.0},
    "gemma3_text": SIZES | {"sliding_window": 64, "query_pre_attn_scalar": 32},
    "gpt_neox": {
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 96,
        "max_position_embeddings": POSITIONS,
    },
}


@dataclass(frozen=True)
class Kind:
    """What a model is made of; ``rows``: the row type of its table."""

    trunk: str
    rows: str = "fp32"
    over_encoding: bool = False
    f_gram_model: bool = False
    options: dict[str, Any] = field(default_factory=dict)


KINDS = {
    # what is trained by default: a trunk of Qwen3's form, an input norm, learned rows and no f-gram model
    "modern": Kind("qwen3", options={"input_norm": True}),
    "gpt2": Kind("gpt2", f_gram_model=True),
    "llama": Kind("llama", "int8", f_gram_model=True, options={"embedding_scale": 2.0}),
    "over-encoding": Kind("qwen2", over_encoding=True, options={"embedding_scale": 0.5}),
    "granite": Kind("granite"),
    "gemma3": Kind("gemma3_text"),
    "neox": Kind("gpt_neox", "bf16"),
}


def text(length: int, seed: int = 0) -> np.ndarray:
    """Skewed tokens, separators among them, int64 ``[length]``."""
    random = np.random.default_rng(seed)
    tokens = random.zipf(1.3, length) % (VOCAB_SIZE - 1) + 1
    tokens[random.random(length) < 0.01] = SEPARATOR
    return tokens.astype(np.int64)


def prompts(count: int, longest: int, seed: int = 1) -> list[list[int]]:
    """Of 1 … ``longest`` tokens; lengths near multiples of 32, the size of KV blocks; a third begin alike."""
    random = np.random.default_rng(seed)
    tokens = text(20_000).tolist()
    found = []
    for number in range(count):
        length = int(random.integers(1, longest + 1))
        if number % 4 == 1:
            length = max(1, min(longest, round(length / 32) * 32 + int(random.integers(-2, 3))))
        start = int(random.integers(0, len(tokens) - longest))
        prompt = tokens[start : start + length]
        if number % 3 == 0:
            shared = min(len(prompt), 70)
            prompt = tokens[:shared] + prompt[shared:]
        found.append(prompt)
    return found


def make(name: str, folder: Path, seed: int = 0) -> Path:
    """A saved model with its table beside it, in ``folder``."""
    kind = KINDS[name]
    torch.manual_seed(seed)
    special = {"bos_token_id": SEPARATOR, "eos_token_id": SEPARATOR, "pad_token_id": SEPARATOR}
    config = AutoConfig.for_model(kind.trunk, vocab_size=VOCAB_SIZE, **special, **TRUNKS[kind.trunk])
    trunk = AutoModelForCausalLM.from_config(config).eval()
    torch.nn.init.normal_(trunk.get_input_embeddings().weight, std=0.5)
    trunk.get_output_embeddings().weight.data.normal_(std=0.5)
    model: Any
    if kind.over_encoding:
        model = OverEncodingForCausalLM.from_trunk(trunk, num_rows=300, separator_ids=[SEPARATOR], **kind.options)
        rows = model.hashed_embedding.rows
    else:
        vocabulary = count_f_grams(
            [text(20_000)],
            vocab_size=VOCAB_SIZE,
            max_n=5,
            min_freq=2,
            max_f_grams=6000,
            separator_ids=[SEPARATOR],
            tokenizer_fingerprint="",
            quiet=True,
        ).vocabulary
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        model = SconeForCausalLM.from_trunk(
            trunk,
            vocabulary,
            f_gram_model=sizes if kind.f_gram_model else None,
            learned_rows=5000,
            **kind.options,
        )
        embedding = model.f_gram_embedding
        rows = embedding.rows
        for part in (embedding.gain, None if embedding.gate is None else embedding.gate.weight):
            if part is not None:
                torch.nn.init.normal_(part, std=0.3)
    torch.nn.init.normal_(rows.weight, std=0.5)
    if model.input_norm is not None:
        torch.nn.init.normal_(model.input_norm.weight, mean=1.0, std=0.3)
    model.eval().save_pretrained(folder)
    if not kind.over_encoding:
        precompute_table(model, folder / "embeddings.cache", row_type=kind.rows, quiet=True)
    return folder


def make_tokenizer(folder: Path) -> None:
    """Words w00 … w47, one a token: texts can be asked for, and words to stop at."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"w{number:02}": number for number in range(VOCAB_SIZE)}, unk_token="w01"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w01", eos_token="w00").save_pretrained(folder)


def make_adapter(folder: Path, adapter: Path, modules: tuple[str, ...] = ("q_proj", "v_proj", "down_proj")) -> Path:
    """A LoRA adapter, as PEFT saves it, that changes much; of modules of the trunk of the model in ``folder``."""
    weights, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(0)
    found = {}
    for name, weight in weights.items():
        if name.startswith("trunk.") and name.split(".")[-2] in modules:
            for part, shape in (("A", (8, weight.shape[1])), ("B", (weight.shape[0], 8))):
                key = f"base_model.model.{name.removesuffix('.weight')}.lora_{part}.weight"
                found[key] = torch.randn(shape, generator=generator) * 0.1
    adapter.mkdir()
    save_file(found, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": list(modules), "bias": "none"}
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"task_type": "CAUSAL_LM"}))
    return adapter


def quantise(folder: Path, target: Path) -> Path:
    """The model in ``folder``, the trunk's layers in int8 with a scale an output, as compressed-tensors saves it."""
    shutil.copytree(folder, target)
    found = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if name.startswith("trunk.model.layers.") and weight.ndim == 2:
            scale = weight.abs().amax(1, keepdim=True) / 127
            found[name], found[f"{name}_scale"] = (weight / scale).round().to(torch.int8), scale
        else:
            found[name] = weight
    save_file(found, target / "model.safetensors", {"format": "pt"})
    numbers = {"num_bits": 8, "type": "int", "symmetric": True}
    weights = numbers | {"strategy": "channel", "dynamic": False}
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": numbers | {"strategy": "token", "dynamic": True},
    }
    config = {"quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed"}
    saved = json.loads((folder / "config.json").read_text())
    saved["quantization_config"] = config | {"ignore": ["re:.*lm_head"], "config_groups": {"group_0": group}}
    (target / "config.json").write_text(json.dumps(saved))
    return target


def adapt(model: Any, adapter: Path) -> None:
    """Add an adapter of `make_adapter` to the model's weights."""
    parts = load_file(adapter / "adapter_model.safetensors")
    for name in parts:
        if name.endswith(".lora_A.weight"):
            module = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            module.weight.data += 2.0 * parts[name.replace("lora_A", "lora_B")] @ parts[name]


def load(folder: Path) -> Any:
    """The model as our own engine serves it."""
    if (folder / "embeddings.cache").exists():
        table = EmbeddingTable.open(folder / "embeddings.cache")
        return SconeForCausalLM.from_pretrained(folder, table=table).eval()
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def log_probabilities(model: Any, tokens: list[int]) -> torch.Tensor:
    """Of a full forward pass over one text, ``[T, V]``."""
    return model(input_ids=torch.tensor([tokens])).logits[0].float().log_softmax(-1)
