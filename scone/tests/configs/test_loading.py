"""Laws of options: defaults < file < flags, round trips, bounds, and what wrong input gets."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scone.configs.loading import (
    FLAG,
    Layer,
    from_mapping,
    get_option,
    load_options,
    load_yaml,
    merge,
    parse_options,
    save_options,
    to_mapping,
)
from scone.configs.schema import SconeOptions
from scone.configs.values import convert, entries
from scone.tests.configs.strategies import option_values, values_of
from scone.utils.errors import SconeError

SECTIONS = ("data", "model", "training")


def parse(*argv: str) -> SconeOptions:
    return parse_options(argv, SECTIONS, "a test")[0]


@settings(max_examples=50, deadline=None)
@given(option_values)
def test_options_survive_a_mapping_and_a_file(tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]) -> None:
    options, _ = merge([Layer("test", values)])
    assert from_mapping(to_mapping(options)) == options
    path = tmp_path_factory.mktemp("options") / "options.yaml"
    save_options(options, path)
    assert load_options(path) == options


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_an_option_means_the_same_as_flag_and_in_a_mapping(data: st.DataObject) -> None:
    entry = data.draw(st.sampled_from([e for e in entries().values() if e.section in SECTIONS]))
    value = data.draw(values_of(entry).filter(lambda value: not (isinstance(value, str) and value[0] in "-=")))
    if isinstance(value, str) and entry.optional and value.lower() in ("none", "null"):
        return
    options, _ = parse_options([f"--{entry.flag}={'none' if value is None else value}"], SECTIONS, "a test")
    assert get_option(options, entry.name) == value
    assert options.given == {entry.name: FLAG}


@settings(max_examples=50, deadline=None)
@given(option_values, option_values)
def test_flags_win_over_the_file_and_the_file_over_defaults(lower: dict[str, Any], upper: dict[str, Any]) -> None:
    options, _ = merge([Layer("file", lower), Layer(FLAG, upper)])
    for name, entry in entries().items():
        if name in upper:
            assert get_option(options, name) == upper[name]
        elif name in lower and get_option(options, name) is not None:
            assert get_option(options, name) == lower[name]
        elif name not in lower and get_option(options, name) is not None:
            assert get_option(options, name) == entry.default
    assert set(upper) <= set(options.given) <= set(lower) | set(upper)


def test_defaults_are_the_promised_ones() -> None:
    promised = {
        "data.dataset_name": "wikitext",
        "data.dataset_config_name": "wikitext-103-v1",
        "data.text_column": "text",
        "data.max_length": 512,
        "data.max_n": 3,
        "data.min_freq": 100,
        "data.max_f_grams": 1_000_000,
        "model.base_model_name": "gpt2",
        "training.batch_size": 8,
        "training.num_epochs": 3,
        "training.learning_rate": 5e-5,
        "training.weight_decay": 0.01,
        "training.warmup_steps": 0,
        "training.max_grad_norm": 1.0,
        "training.logging_steps": 100,
        "training.save_steps": 1000,
        "training.eval_steps": 1000,
        "training.seed": 42,
        "training.gradient_accumulation_steps": 1,
        "training.fp16": False,
        "training.resume_from_checkpoint": None,
        "inference.batch_size": 32,
    }
    options = parse()
    assert {name: get_option(options, name) for name in promised} == promised


def test_every_option_has_help_and_a_valid_default() -> None:
    for name, entry in entries().items():
        assert entry.info.help, name
        assert convert(entry, entry.default, name) == entry.default


def test_yaml_writes_5e_5_as_text_and_is_understood(tmp_path: Path) -> None:
    path = tmp_path / "options.yaml"
    path.write_text(
        "training: {learning_rate: 5e-5, batch_size: '4', fp16: 'yes', resume_from_checkpoint: true}\ndata:\n"
    )
    options = parse("--config", str(path), "--batch_size", "2")
    assert isinstance(load_yaml(path)["training"]["learning_rate"], str)
    assert options.training.learning_rate == 5e-5
    assert options.training.batch_size == 2
    assert options.training.fp16 is True
    assert options.training.resume_from_checkpoint == "true"
    assert options.given["training.fp16"] == str(path)
    assert options.given["training.batch_size"] == FLAG


@pytest.mark.parametrize(
    ("argv", "fp16"),
    [
        ([], False),
        (["--fp16"], True),
        (["--fp16", "true"], True),
        (["--fp16", "false"], False),
        (["--fp16=on"], True),
        (["--no-fp16"], False),
        (["--no_fp16"], False),
        (["--fp16", "--seed", "1"], True),
        (["--no-fp16", "--fp16"], True),
    ],
)
def test_switches_work_with_and_without_a_value(argv: list[str], fp16: bool) -> None:
    assert parse(*argv).training.fp16 is fp16


def test_a_switch_does_not_swallow_the_argument_behind_it() -> None:
    options, extra = parse_options(
        ["--use_memory_map", "some text"],
        ("inference",),
        "a test",
        add_arguments=lambda parser: parser.add_argument("text"),
    )
    assert options.inference.use_memory_map is True
    assert extra.text == "some text"


def test_resume_takes_a_folder_or_nothing() -> None:
    assert parse("--resume_from_checkpoint").training.resume_from_checkpoint == "true"
    assert parse("--resume_from_checkpoint", "--fp16").training.resume_from_checkpoint == "true"
    assert parse("--resume_from_checkpoint", "out/checkpoint-5").training.resume_from_checkpoint == "out/checkpoint-5"


def test_dashes_may_stand_for_underscores() -> None:
    assert parse("--max-n", "5", "--f-gram-hidden-size=64").data.max_n == 5


def test_none_takes_an_option_back() -> None:
    assert parse("--dataset_config_name", "none").data.dataset_config_name is None


def test_another_data_set_does_not_inherit_the_default_configuration() -> None:
    assert parse("--dataset_name", "wikitext").data.dataset_config_name == "wikitext-103-v1"
    assert parse("--dataset_name", "c4").data.dataset_config_name is None
    assert parse("--dataset_name", "c4", "--dataset_config_name", "en").data.dataset_config_name == "en"


def test_another_base_model_does_not_inherit_the_files_sizes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "options.yaml"
    path.write_text("model: {base_model_name: gpt2, hidden_size: 768, num_hidden_layers: 12}")
    options = parse("--config", str(path), "--base_model_name", "gpt2-medium", "--num_hidden_layers", "2")
    assert options.model.hidden_size is None
    assert options.model.num_hidden_layers == 2
    notice = capsys.readouterr().err
    assert notice.count("\n") == 1
    assert "hidden_size 768" in notice
    assert parse("--config", str(path), "--base_model_name", "gpt2").model.hidden_size == 768


def test_the_modern_trunk_brings_its_settings_and_what_is_given_wins() -> None:
    options = from_mapping({"model": {"base_model_name": "scone-modern"}, "training": {"learning_rate": 1e-3}})
    assert (options.training.learning_rate, options.training.optimizer, options.model.input_norm) == (
        1e-3,
        "muon",
        True,
    )
    assert "training.optimizer" not in options.given
    for mapping in ({"init": "pretrained", "base_model_name": "scone-modern"}, {"base_model_name": "gpt2"}):
        assert from_mapping({"model": mapping}).training.optimizer == "adamw"


def test_sizes_of_a_file_without_a_base_model_stay(tmp_path: Path) -> None:
    path = tmp_path / "options.yaml"
    path.write_text("model: {hidden_size: 64}")
    assert parse("--config", str(path), "--base_model_name", "gpt2-medium").model.hidden_size == 64


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--max_n", "1"],
            r"--max_n: found 1; expected a whole number from 2 to 255; meaning: length of the longest f-gram",
        ),
        (["--min_freq", "0"], r"--min_freq: found 0; expected a whole number of at least 1"),
        (["--learning_rate", "fast"], r"--learning_rate: found fast; expected a number"),
        (["--learning_rate", "nan"], r"--learning_rate: found nan"),
        (["--batch_size", "2.5"], r"--batch_size: found 2.5; expected a whole number"),
        (["--batch_size"], r"--batch_size: expected one argument"),
        (["--fp16=maybe"], r"--fp16: found maybe; expected true or false"),
        (["--init", "warm"], r"--init: found warm; expected one of scratch, pretrained"),
        (["--max_steps", "0"], r"--max_steps: found 0; expected -1"),
        (["--memory_budget", "4 bananas"], r"--memory_budget: .*4GiB"),
        (["--maxn", "3"], r"unknown option --maxn; did you mean --max_n\?"),
        (["--use_memory_map"], r"unknown option --use_memory_map; it belongs to other commands"),
        (["--zzzzz"], r"unknown option --zzzzz; leave it out"),
        (["train"], r"found the argument 'train'; expected only options"),
        (["--fp16", "--bf16"], r"found both fp16 and bf16"),
        (["--hidden_size", "10", "--num_attention_heads", "3"], r"model.hidden_size: found 10 with 3 attention heads"),
        (["--max_length", "2048", "--max_position_embeddings", "1024"], r"data.max_length: found 2048"),
        (["--config", "no/such/file.yaml"], r"found no file no/such/file.yaml"),
    ],
)
def test_a_bad_flag_gets_one_clear_line(argv: list[str], message: str) -> None:
    with pytest.raises(SconeError, match=message) as caught:
        parse(*argv)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {learning_rat: 1}", r"unknown option training.learning_rat; did you mean training.learning_rate\?"),
        ("training: {max_n: 3}", r"unknown option training.max_n; did you mean data.max_n\?"),
        (
            "model: {f_gram: {hidden: 3}}",
            r"unknown option model.f_gram.hidden; did you mean model.f_gram.hidden_size\?",
        ),
        ("trainin: {seed: 1}", r"unknown section trainin; expected one of .*did you mean training\?"),
        ("seed: 1", r"unknown section seed; .*did you mean training.seed\?"),
        ("training: 3", r"training: found 3; expected a section"),
        ("training: {seed: [1]}", r"training.seed: found \[1\]; expected a whole number"),
        ("training: {seed: true}", r"training.seed: found True; expected a whole number"),
        ("training: {seed: null}", r"training.seed: found None; expected a whole number"),
        ("training: {batch_size: .inf}", r"training.batch_size: found inf"),
        ("data: {dataset_config_name: 1.10}", r"found 1.1; expected text or none; put it in quotes"),
        ("data: {dataset_config_name: 2020-01-01}", r"expected text or none; put it in quotes"),
        ("data: {dataset_name: ''}", r"data.dataset_name: found ''; expected text"),
        ("- 1", r"found list; expected sections: data"),
        ("a: [", r"cannot read .* as YAML"),
        ("data: {max_n: 3, min_freq: 2, max_n: 4}", r"line 1: found max_n a second time; expected each key once"),
        ("data:\n  max_n: 4\nmodel: {}\ndata:\n  min_freq: 2\n", r"line 4: found data a second time"),
        ("model:\n  f_gram:\n    start: zero\n    start: random", r"line 4: found start a second time"),
        ("\x00", r"cannot read .* as YAML"),
        ("data: !!python/object/apply:os.getcwd []", r"cannot read .* as YAML"),
    ],
)
def test_a_bad_file_gets_one_clear_line_with_its_name(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "options.yaml"
    path.write_text(text)
    with pytest.raises(SconeError, match=message) as caught:
        load_options(path)
    assert "options.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=60))
def test_no_file_content_raises_anything_but_scone_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(content)
    with contextlib.suppress(SconeError):
        load_options(path)


def test_help_shows_every_option_of_the_sections_but_those_of_past_experiments(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse("--help")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for entry in entries().values():
        shown = (entry.section in SECTIONS or entry.flag == "batch_size") and not entry.info.hidden
        assert (f"--{entry.flag} " in text) == shown, entry.name
    hidden = {entry.flag for entry in entries().values() if entry.info.hidden}
    assert {"f_gram_dropout", "f_gram_length_warmup_steps"} <= hidden
    assert parse("--f_gram_dropout", "0.1").training.f_gram_dropout == 0.1, "still read"


def test_a_script_may_expose_single_options_with_its_own_defaults() -> None:
    options, _ = parse_options(
        ["--device", "cpu"],
        ("inference.batch_size", "training.device"),
        "a test",
        defaults={"inference.batch_size": 8},
    )
    assert options.inference.batch_size == 8
    assert options.training.device == "cpu"
    with pytest.raises(SconeError, match="unknown option --seed"):
        parse_options(["--seed", "1"], ("inference",), "a test")
