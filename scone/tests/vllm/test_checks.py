"""What cannot be served right is refused in one line, before anything starts. (vLLM is not needed for this.)"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from scone.inference.embedding_table import EmbeddingTable
from scone.models.configuration import SconeConfig
from scone.tests import tiny
from scone.tests.inference.tables import write_table
from scone.tests.vllm import models
from scone.tokenization.tokenizers import load_tokenizer, tokenizer_fingerprint
from scone.utils.errors import SconeError
from scone.vllm import checks
from scone.vllm.checks import ServingOptions, check_files, check_model_files, serving_options


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models with tables: one, one with other weights and the same f-grams, and one with f-gram model."""
    path = tmp_path_factory.mktemp("models")
    names = {"ours": ("modern", 0), "other weights": ("modern", 1), "f-gram model": ("gpt2", 0)}
    return {name: models.make(kind, path / name, seed) for name, (kind, seed) in names.items()}


@pytest.fixture
def folder(folders: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders["ours"], tmp_path / "model"))


def refusal(folder: Path, **options: Any) -> str:
    """What is said of a folder, which is one line."""
    config = SconeConfig.from_pretrained(folder)
    return tiny.refusal(check_model_files, config, str(folder), None, ServingOptions(**options))


@pytest.mark.parametrize("name", ["ours", "f-gram model"])
def test_a_sound_folder(folders: dict[str, Path], name: str) -> None:
    config = SconeConfig.from_pretrained(folders[name])
    check_model_files(config, str(folders[name]), None, ServingOptions())


def damaged(name: str, keep: int = 100, at: int = 0) -> Callable[[Path], None]:
    """Only the first ``keep`` hundredths of a file are left; three bytes are others, ``at`` from its end."""

    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        del content[len(content) * keep // 100 :]
        if at:
            content[len(content) - at : len(content) - at + 3] = b"abc"
        (folder / name).write_bytes(content)

    return damage


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / "embeddings.cache").unlink(), "found no embeddings.cache in"),
        (lambda folder: (folder / "f_grams.safetensors").unlink(), "found no f_grams.safetensors in"),
        (damaged("embeddings.cache", 60), "is damaged: it has"),
        (damaged("embeddings.cache", 0), "is no embedding table"),
        (damaged("embeddings.cache", at=10), "its checksums do not fit its header"),
        (damaged("f_grams.safetensors", 50), "cannot read the model's f-grams"),
        (damaged("f_grams.safetensors", 0), "cannot read the model's f-grams"),
        (damaged("model.safetensors", 0), "cannot read the model's weights"),
    ],
)
def test_damage(folder: Path, damage: Callable[[Path], None], says: str) -> None:
    damage(folder)
    assert says in refusal(folder)


def test_the_table_of_other_weights(folders: dict[str, Path], folder: Path) -> None:
    shutil.copy(folders["other weights"] / "embeddings.cache", folder)
    assert "is the table of another model: found weights" in refusal(folder)
    config = SconeConfig.from_pretrained(folder)
    check_model_files(config, str(folder), None, ServingOptions(check_weights=False))


def test_a_table_of_other_f_grams_or_sizes(folder: Path) -> None:
    config = SconeConfig.from_pretrained(folder)
    with EmbeddingTable.open(folder / "embeddings.cache", "mmap") as table:
        rows = table.rows(torch.arange(table.num_rows))
    write_table(folder / "embeddings.cache", rows[:-1], vocabulary=config.vocabulary_fingerprint)
    assert f"found {len(rows) - 1:,} rows of width 64" in refusal(folder)
    write_table(folder / "embeddings.cache", rows[:, :32].contiguous(), vocabulary=config.vocabulary_fingerprint)
    assert f"found {len(rows):,} rows of width 32" in refusal(folder)
    write_table(folder / "embeddings.cache", rows, vocabulary="ab" * 32)
    assert "was made from other vocabulary" in refusal(folder)


def test_f_grams_of_another_model(folder: Path) -> None:
    tiny.vocabulary().save(folder)
    assert "found f-grams with the fingerprint" in refusal(folder)


def test_a_named_table(folders: dict[str, Path], folder: Path) -> None:
    config = SconeConfig.from_pretrained(folder)
    (folder / "embeddings.cache").unlink()
    named = ServingOptions(embedding_cache_path=str(folders["ours"] / "embeddings.cache"))
    check_model_files(config, str(folder), None, named)
    assert "found no table nowhere.cache" in refusal(folder, embedding_cache_path="nowhere.cache")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"place": "ram"}, "found place='ram' in the additional config of scone; expected some of"),
        ({"placement": 3}, "found placement=3"),
        ({"placement": "attic"}, "found placement 'attic'"),
        ({"check_weights": "no"}, "found check_weights='no'"),
        ("ram", "found ='ram'"),
    ],
)
def test_options_that_are_none(config: Any, says: str) -> None:
    assert says in tiny.refusal(serving_options, {"scone": config})


def test_options() -> None:
    assert serving_options({}) == serving_options(None) == ServingOptions()
    given = {"placement": "gpu:1k,ram", "embedding_cache_path": "a", "check_weights": False}
    assert serving_options({"scone": given, "another's": 1}) == ServingOptions(**given)


def vllm_config(folder: Path, **changes: Any) -> Any:
    """What vLLM hands in, as far as it is looked at."""
    config: dict[str, Any] = {"additional_config": {}, "kv_transfer_config": None, "use_v2_model_runner": True}
    model = {
        "runner_type": "generate",
        "enable_prompt_embeds": False,
        "enable_sleep_mode": False,
        "model": str(folder),
        "revision": None,
        "skip_tokenizer_init": True,
        "tokenizer": str(folder),
    }
    kinds = ("pipeline", "prefill_context", "decode_context", "tensor", "data")
    cache = {"kv_offloading_size": None}
    parallel = {f"{kind}_parallel_size": 1 for kind in kinds}
    for part in (config, model, cache, parallel):
        part |= {name: value for name, value in changes.items() if name in part}
    model["hf_config"] = SconeConfig.from_pretrained(folder)
    parts = {"model_config": model, "cache_config": cache, "parallel_config": parallel}
    return SimpleNamespace(**config, **{name: SimpleNamespace(**values) for name, values in parts.items()})


FIRST = {"use_v2_model_runner": False}


@pytest.mark.parametrize(
    ("found", "changes", "says"),
    [
        ("0.25.1", {}, "found vLLM 0.25.1; expected 0.26 or later"),
        ("", {}, "found vLLM of no version"),
        ("0.32.0", {"runner_type": "pooling"}, "found --runner pooling; expected generate"),
        ("0.32.0", {"enable_prompt_embeds": True}, "found --enable-prompt-embeds; expected tokens"),
        ("0.32.0", {"enable_sleep_mode": True}, "found --enable-sleep-mode; expected a server that stays awake"),
        ("0.32.0", {"pipeline_parallel_size": 2}, "found --pipeline-parallel-size 2; expected 1"),
        ("0.32.0", {"prefill_context_parallel_size": 2}, "found --prefill-context-parallel-size 2; expected 1"),
        ("0.32.0", {"use_v2_model_runner": False, "platform": "cuda"}, "found vLLM's first model runner"),
        ("0.32.0", FIRST | {"kv_transfer_config": "a connector"}, "found --kv-transfer-config with vLLM's first"),
        ("0.32.0", FIRST | {"kv_offloading_size": 1.0}, "found --kv-offloading-size with vLLM's first"),
        (
            "0.32.0",
            FIRST | {"decode_context_parallel_size": 2},
            "found --decode-context-parallel-size with vLLM's first",
        ),
    ],
)
def test_engines_that_would_lose_f_grams(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, found: str, changes: dict[str, Any], says: str
) -> None:
    monkeypatch.setattr(checks, "version_of", lambda name: found)
    monkeypatch.setattr(checks, "find_spec", lambda name: True)
    monkeypatch.setattr(checks, "_platform", lambda: changes.get("platform", "cpu"))
    assert says in tiny.refusal(checks.check_engine, vllm_config(folders["ours"], **changes))
    for sound in ("0.26.0", "0.32.0", "1.0.0rc1", "0.1.dev1+gabc"):
        monkeypatch.setattr(checks, "version_of", lambda name, sound=sound: sound)
        checks.check_engine(vllm_config(folders["ours"]))


def test_a_trunk_that_reads_tokens_in_its_layers(folder: Path) -> None:
    """vLLM would leave them out."""
    config = vllm_config(folder)
    config.model_config.hf_config.text_config.hidden_size_per_layer_input = 4
    assert "whose layers read tokens beside their vectors" in tiny.refusal(checks.check_files, config)


def test_the_command_line_gets_the_line_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "embeddings.cache").unlink()
    monkeypatch.setattr(checks, "check_engine", lambda config: None)
    with pytest.raises(SconeError, match=r"found no embeddings\.cache"):
        check_files(vllm_config(folder))
    with pytest.raises(SconeError, match=r"found no embeddings\.cache"):
        checks.ChecksOfOurs.verify_and_update_config(vllm_config(folder))
    monkeypatch.setattr(sys, "argv", ["/usr/bin/vllm", "serve"])
    with pytest.raises(SystemExit, match=r"scone: found no embeddings\.cache"):
        checks.ChecksOfOurs.verify_and_update_config(vllm_config(folder))


def test_rows_on_no_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = vllm_config(folder, additional_config={"scone": {"placement": "gpu:10,ram"}})
    monkeypatch.setattr(checks, "_platform", lambda: "cuda")
    check_files(config)
    monkeypatch.setattr(checks, "_platform", lambda: "cpu")
    with pytest.raises(SconeError, match="found placement 'gpu:10,ram' without a GPU"):
        check_files(config)


def test_a_foreign_tokenizer_is_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    def said(**changes: Any) -> str:
        caplog.clear()
        check_files(vllm_config(folder, **changes))
        return "\n".join(caplog.messages)

    assert said(skip_tokenizer_init=False) == ""  # there is none, as vLLM itself will say
    models.make_tokenizer(folder)
    assert said(skip_tokenizer_init=False) == ""  # whose f-grams do not name one
    other = folder / "other"
    models.make_tokenizer(other, models.VOCAB_SIZE + 1)
    assert "found the token 48 in the tokenizer" in said(skip_tokenizer_init=False, tokenizer=str(other))
    assert said(tokenizer=str(other)) == ""
    checks.warn_of_tokenizer(str(folder), models.VOCAB_SIZE, tokenizer_fingerprint(load_tokenizer(folder)))
    assert not caplog.messages
    checks.warn_of_tokenizer(str(folder), models.VOCAB_SIZE, "0" * 64)
    assert "is not the one with which the model's f-grams were counted" in caplog.messages[0]


@pytest.mark.parametrize("kind", ["tensor", "data"])
def test_several_processes_share_rows_in_ram(folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(checks, "check_engine", lambda config: None)
    monkeypatch.setattr(checks, "_platform", lambda: "cuda")
    for given, expected in {"gpu:10,ram": "gpu:10,shared", "gpu:10, ram:20,disk": "gpu:10,shared:20,disk"}.items():
        additional = {"scone": {"placement": given, "check_weights": False}, "another's": 1}
        config = vllm_config(folder, additional_config=additional)
        checks.ChecksOfOurs.verify_and_update_config(config)
        assert config.additional_config == additional
        config = vllm_config(folder, additional_config=additional, **{f"{kind}_parallel_size": 2})
        checks.ChecksOfOurs.verify_and_update_config(config)
        assert serving_options(config.additional_config) == ServingOptions(placement=expected, check_weights=False)
        assert config.additional_config["another's"] == 1
    config = vllm_config(folder, **{f"{kind}_parallel_size": 2})
    checks.ChecksOfOurs.verify_and_update_config(config)
    assert serving_options(config.additional_config).placement == "shared"
