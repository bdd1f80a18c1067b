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
from torch import Tensor
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
    # as wide as kernels for quantised weights want it, and with layers that say more than the input vectors
    "wide": SIZES
    | {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 256}
    | {"initializer_range": 0.1},
    "gpt_neox": {name: value for name, value in SIZES.items() if name not in ("head_dim", "num_key_value_heads")},
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
    "llama": Kind("llama", "int8", f_gram_model=True, options={"combination": "gate", "embedding_scale": 2.0}),
    "over-encoding": Kind("qwen2", over_encoding=True, options={"embedding_scale": 0.5}),
    "granite": Kind("granite"),
    "gemma3": Kind("gemma3_text"),
    "neox": Kind("gpt_neox", "bf16"),
    "quantised": Kind("wide", "int8", options={"input_norm": True}),
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
    family = "llama" if kind.trunk == "wide" else kind.trunk
    config = AutoConfig.for_model(family, vocab_size=VOCAB_SIZE, **special, **TRUNKS[kind.trunk])
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
        if embedding.gain is not None:
            torch.nn.init.normal_(embedding.gain, std=0.3)
    torch.nn.init.normal_(rows.weight, std=0.5)
    if model.input_norm is not None:
        torch.nn.init.normal_(model.input_norm.weight, mean=1.0, std=0.3)
    model.eval().save_pretrained(folder)
    if not kind.over_encoding:
        precompute_table(model, folder / "embeddings.cache", row_type=kind.rows, quiet=True)
    return folder


def make_tokenizer(folder: Path, size: int = VOCAB_SIZE) -> None:
    """Words w00 … w47, one a token: texts can be asked for, and words to stop at."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"w{number:02}": number for number in range(size)}, unk_token="w01"))
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


def quantise(folder: Path, form: str, target: Path, plain: Path) -> None:
    """The model in ``folder`` with the trunk's layers quantised: in ``target``, and what that means in ``plain``.

    Forms, as their libraries save them, with scales that bf16 holds exactly: ``int8`` (compressed-tensors: weights by
    output, inputs by token), ``gptq`` and ``awq`` (4 bits, groups of 32 inputs), ``fp8`` (blocks of 128 × 128).
    """
    shutil.copytree(folder, target)
    shutil.copytree(folder, plain)
    weights = load_file(folder / "model.safetensors")
    found, meant = dict(weights), dict(weights)
    for name, weight in weights.items():
        if not name.startswith("trunk.model.layers.") or weight.ndim != 2:
            continue
        del found[name]
        parts, meant[name] = FORMS[form](weight)
        found |= {name.removesuffix("weight") + part: value.contiguous() for part, value in parts.items()}
    save_file(found, target / "model.safetensors", {"format": "pt"})
    save_file(meant, plain / "model.safetensors", {"format": "pt"})
    saved = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(saved | {"quantization_config": CONFIGS[form]}))


def _int8(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale = (weight.abs().amax(1, keepdim=True) / 127).bfloat16().float()
    numbers = (weight / scale).round().clamp(-127, 127)
    return {"weight": numbers.to(torch.int8), "weight_scale": scale}, numbers * scale


def _fp8(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    blocks = weight.unflatten(0, (-1, 128)).unflatten(2, (-1, 128))
    scale = (blocks.abs().amax((1, 3), keepdim=True) / 448).bfloat16().float()
    numbers = (blocks / scale).to(torch.float8_e4m3fn)
    parts = {"weight": numbers.view_as(weight), "weight_scale_inv": scale[:, 0, :, 0]}
    return parts, (numbers.float() * scale).view_as(weight)


def _gptq(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Numbers −8 … 7 and a scale, of each output and group; packed by inputs."""
    grouped = weight.t().unflatten(0, (-1, GROUP))
    scale = (grouped.abs().amax(1, keepdim=True) / 7).bfloat16().float()
    numbers = (grouped / scale).round().clamp(-8, 7)
    inputs, outputs = weight.shape[1], weight.shape[0]
    parts = {
        "qweight": _packed((numbers + 8).flatten(0, 1).view(-1, 8, outputs).transpose(1, 2)),
        "scales": scale[:, 0].half(),
        "qzeros": torch.full((inputs // GROUP, outputs // 8), 0x77777777, dtype=torch.int32),
        "g_idx": (torch.arange(inputs) // GROUP).int(),
    }
    return parts, (numbers * scale).flatten(0, 1).t()


def _awq(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Numbers 0 … 15, a zero among them and a scale, of each output and group; packed by outputs in an own order."""
    grouped = weight.t().unflatten(0, (-1, GROUP))
    least, most = grouped.amin(1, keepdim=True).clamp(max=0), grouped.amax(1, keepdim=True).clamp(min=0)
    scale = ((most - least) / 15).bfloat16().float()
    zero = (-least / scale).round().clamp(0, 15)
    numbers = (grouped / scale + zero).round().clamp(0, 15)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    parts = {
        "qweight": _packed(numbers.flatten(0, 1).unflatten(1, (-1, 8))[..., order]),
        "qzeros": _packed(zero[:, 0].unflatten(1, (-1, 8))[..., order]),
        "scales": scale[:, 0].half(),
    }
    return parts, ((numbers - zero) * scale).flatten(0, 1).t()


def _packed(numbers: Tensor) -> Tensor:
    """Eight numbers of four bits ``[…, 8]`` in an int32 each, the first one lowest."""
    bits = numbers.long() << torch.arange(0, 32, 4)
    return bits.sum(-1).to(torch.int32)


GROUP = 32
FORMS = {"int8": _int8, "fp8": _fp8, "gptq": _gptq, "awq": _awq}
_NUMBERS = {"num_bits": 8, "type": "int", "symmetric": True}
CONFIGS: dict[str, dict[str, Any]] = {
    "int8": {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["re:.*lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": _NUMBERS | {"strategy": "channel", "dynamic": False},
                "input_activations": _NUMBERS | {"strategy": "token", "dynamic": True},
            }
        },
    },
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
}


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
