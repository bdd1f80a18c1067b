"""Trunks in GGUF files: every place that takes a trunk or a plain model takes one."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from scone.cli import main
from scone.configs.schema import ModelOptions
from scone.inference.loading import load_model
from scone.models.language_model import SconeForCausalLM
from scone.models.trunk import build_trunk
from scone.tests import tiny
from scone.tests.conftest import OF_A_RUN
from scone.tests.training import runs
from scone.tokenization.tokenizers import load_tokenizer
from scone.training.run import train

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")

as_in_a_run = pytest.mark.filterwarnings(*OF_A_RUN)
WORDS = "the cat sat on mat and dog ran to old red house by sea while it rained all day".split()  # noqa: SIM905
PIECES = ["<unk>", "<s>", "</s>", "\u2581", *("\u2581" + word for word in WORDS), *"abcdefghijklmnopqrstuvwxyz"]
VOCABULARY, WIDTH, INNER = len(PIECES), 32, 64
PIECE_TYPES = [2, 3, 3] + [1] * (VOCABULARY - 3)  # unknown, control, control, normal …


def write(path: Path, tokenizer: str = "llama", packed: bool = False) -> Path:
    """A random Llama of one layer with its tokenizer; ``packed``: its matrices in eight bits."""
    writer = gguf.GGUFWriter(str(path), "llama")
    sizes = {"context_length": 128, "embedding_length": WIDTH, "block_count": 1, "feed_forward_length": INNER}
    sizes |= {"head_count": 2, "head_count_kv": 2, "layer_norm_rms_eps": 1e-5, "vocab_size": VOCABULARY}
    for name, value in (sizes | {"rope_dimension_count": WIDTH // 2}).items():
        getattr(writer, f"add_{name}")(value)
    writer.add_tokenizer_model(tokenizer)
    writer.add_token_list(PIECES)
    writer.add_token_scores([-float(place) for place in range(VOCABULARY)])
    writer.add_token_types(PIECE_TYPES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    random = np.random.default_rng(0)
    matrices = {"token_embd": (VOCABULARY, WIDTH), "output": (VOCABULARY, WIDTH)}
    matrices |= {f"blk.0.attn_{name}": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")}
    matrices |= {"blk.0.ffn_gate": (INNER, WIDTH), "blk.0.ffn_up": (INNER, WIDTH), "blk.0.ffn_down": (WIDTH, INNER)}
    for name, shape in matrices.items():
        matrix = random.normal(size=shape, scale=0.3).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0 if packed else None
        writer.add_tensor(f"{name}.weight", gguf.quantize(matrix, kind) if packed else matrix, raw_dtype=kind)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def logits(file: Path) -> torch.Tensor:
    """What transformers computes with the file."""
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name).eval()(IDS).logits


IDS = torch.arange(1, 20)[None]


@pytest.mark.parametrize("as_folder", [False, True])
def test_the_weights_are_those_of_the_file(file: Path, logits: torch.Tensor, as_folder: bool) -> None:
    name = str(file.parent if as_folder else file)
    trunk = build_trunk(ModelOptions(base_model_name=name, init="pretrained"), load_tokenizer(name)).eval()
    assert torch.equal(trunk(IDS).logits, logits)
    assert torch.equal(load_model(name, device="cpu").model(IDS).logits, logits)


def test_from_scratch_it_gives_its_architecture(file: Path) -> None:
    trunk = build_trunk(ModelOptions(base_model_name=str(file), num_hidden_layers=2), load_tokenizer(file))
    assert trunk.config.model_type == "llama"
    assert (trunk.config.hidden_size, trunk.config.num_hidden_layers) == (WIDTH, 2)


@as_in_a_run
def test_commands_take_one(
    file: Path, logits: torch.Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [" ".join(WORDS[(row * 7 + i * i) % len(WORDS)] for i in range(120)) for row in range(30)]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    data = ["--dataset_name", str(corpus), "--cache_dir", str(tmp_path / "cache"), "--max_length", "32"]
    small = ["--min_freq", "3", "--f_gram_num_hidden_layers", "1", "--max_steps", "1", "--device", "cpu"]
    small += ["--num_workers", "0", "--report_to", "none", "--init", "pretrained", "--freeze_trunk"]
    output = tmp_path / "run"
    assert main(["train", "--base_model_name", str(file), *data, *small, "--output_dir", str(output)]) == 0
    trained = SconeForCausalLM.from_pretrained(output / "final_model").eval()
    assert torch.equal(trained.trunk(IDS).logits, logits)
    capsys.readouterr()
    assert main(["evaluate", "--model_path", str(file), *data, "--split", "test", "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["perplexity"] > 1


@as_in_a_run
@pytest.mark.parametrize("packed", [False, True])
def test_a_plain_trunk_can_be_tuned_and_saved(packed: bool, tmp_path: Path) -> None:
    """transformers calls a model of such a file quantised, and trains or saves none that is."""
    name = str(write(tmp_path / "tiny.gguf", packed=packed))
    trunk = build_trunk(ModelOptions(base_model_name=name, init="pretrained"), None)
    assert type(trunk.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    changes = {"model.base_model_name": name, "model.init": "pretrained", "model.tokenizer": None}
    sizes = {f"model.{size}": None for size in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    plain = {"model.use_f_gram_embeddings": False, "training.max_steps": 1, "training.save_steps": 1}
    run = runs.options(runs.write_corpus(tmp_path), tmp_path / "run", **changes, **sizes, **plain)
    tuned = AutoModelForCausalLM.from_pretrained(train(run, quiet=True)).state_dict()
    before = trunk.state_dict()
    assert before.keys() == tuned.keys()
    assert not any(torch.equal(before[name], tuned[name]) for name in before)


def test_mistakes_get_one_line(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trunk(path: Path) -> object:
        return build_trunk(ModelOptions(base_model_name=str(path), init="pretrained"), None)

    def model(path: Path) -> object:
        return load_model(path, device="cpu")

    said = tiny.refusal(trunk, tmp_path / "none.gguf")
    assert re.search(r"found no file .*none.gguf; expected a GGUF file", said)
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(file, tmp_path / name)
    for use in (load_tokenizer, model):
        assert re.search(r"found 2 GGUF files in .*\(a.gguf, b.gguf\); expected one", tiny.refusal(use, tmp_path))
    damaged = tmp_path / "a.gguf"
    damaged.write_bytes(file.read_bytes()[:1000])
    for use in (load_tokenizer, trunk, model):
        assert re.search(r"cannot (read|load)", tiny.refusal(use, damaged))
    monkeypatch.setattr("scone.tokenization.gguf_files.find_spec", lambda name: None)
    assert "pip install 'scone-lm[gguf]'" in tiny.refusal(load_tokenizer, file)
