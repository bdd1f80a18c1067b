"""Laws of options: defaults < file < flags, round trips, bounds, and what wrong input gets (flags: scripts/)."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from scone.configs.loading import (
    FLAG,
    Layer,
    from_mapping,
    get_option,
    load_options,
    merge,
    parse_options,
    save_options,
    to_mapping,
)
from scone.configs.schema import SconeOptions, convert, entries
from scone.tests.configs.strategies import option_values, values_of
from scone.utils.errors import SconeError

SECTIONS = ("data", "model", "training")


def parse(*argv: str) -> SconeOptions:
    return parse_options(argv, SECTIONS, "a test")[0]


@pytest.fixture
def written(tmp_path):
    """Writes a file of options; returns its path."""

    def write(text):
        path = tmp_path / "options.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


@settings(max_examples=40, deadline=None)
@given(option_values)
@example({"data.text_column": "a\x85b${"})
@example({"data.text_column": "a\u2028b\0*a &a !!int 3 {{"})
@example({"data.text_column": "9" * 5000})
def test_options_survive_a_mapping_and_a_file(tmp_path_factory, values):
    options, _ = merge([Layer("test", values)])
    assert from_mapping(to_mapping(options)) == options
    path = tmp_path_factory.mktemp("options") / "options.yaml"
    save_options(options, path)
    assert load_options(path) == options


def test_a_run_of_before_there_were_two_rankings_is_by_frequency(tmp_path):
    path = tmp_path / "options.yaml"
    save_options(SconeOptions(), path)
    path.write_text(path.read_text().replace("  ranking: null\n", ""))
    by_flag, _ = parse_options(["--config", str(path)], ("data",), "")
    assert load_options(path).data.ranking == by_flag.data.ranking == "frequency"
    chosen, _ = parse_options(["--config", str(path), "--ranking", "gain"], ("data",), "")
    assert chosen.data.ranking == "gain"
    path.write_text("data: {max_n: 4}\n")  # somebody's own file means the default
    assert load_options(path).data.ranking is None


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_an_option_means_the_same_as_flag_and_in_a_mapping(data):
    entry = data.draw(st.sampled_from([e for e in entries().values() if e.section in SECTIONS]))
    value = data.draw(values_of(entry).filter(lambda value: not (isinstance(value, str) and value[0] in "-=")))
    if isinstance(value, str) and entry.optional and value.lower() in ("none", "null"):
        return
    options, _ = parse_options([f"--{entry.flag}={'none' if value is None else value}"], SECTIONS, "a test")
    assert get_option(options, entry.name) == value
    assert options.given == {entry.name: FLAG}


@settings(max_examples=50, deadline=None)
@given(option_values, option_values)
def test_flags_win_over_the_file_and_the_file_over_defaults(lower, upper):
    options, _ = merge([Layer("file", lower), Layer(FLAG, upper)])
    for name, entry in entries().items():
        if name in upper:
            assert get_option(options, name) == upper[name]
        elif get_option(options, name) is not None:
            assert get_option(options, name) == lower.get(name, entry.default)
    assert set(upper) <= set(options.given) <= set(lower) | set(upper)


def test_defaults_are_the_promised_ones():
    promised = {
        "data": {"dataset_name": "wikitext", "dataset_config_name": "wikitext-103-v1", "text_column": "text",
                 "max_length": 512, "max_n": 3, "min_freq": 100, "max_f_grams": 1_000_000},
        "model": {"base_model_name": "gpt2"},
        "training": {"batch_size": 8, "num_epochs": 3, "learning_rate": 5e-5, "weight_decay": 0.01, "warmup_steps": 0,
                     "max_grad_norm": 1.0, "logging_steps": 100, "save_steps": 1000, "eval_steps": 1000, "seed": 42,
                     "gradient_accumulation_steps": 1, "fp16": False, "resume_from_checkpoint": None},
        "inference": {"batch_size": 32},
    }  # fmt: skip
    found = to_mapping(parse())
    assert {group: {name: found[group][name] for name in names} for group, names in promised.items()} == promised


def test_values_of_a_file_are_understood_as_people_mean_them(written):
    """And aliases: a value, or a section, said once."""
    path = written("data: {max_n: &n 4, min_freq: *n}\ntraining: &t {seed: 7}\n")
    assert load_options(path).data.min_freq == 4
    path = written("training: {learning_rate: 5e-5, batch_size: '4', fp16: 'yes', resume_from_checkpoint: true}\ndata:")
    options = parse("--config", str(path), "--batch_size", "2")
    training = options.training
    assert (training.learning_rate, training.batch_size, training.fp16) == (5e-5, 2, True)
    assert training.resume_from_checkpoint == "true"
    assert (options.given["training.fp16"], options.given["training.batch_size"]) == (str(path), FLAG)


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        ("", "training.fp16", False),
        ("--fp16", "training.fp16", True),
        ("--fp16 true", "training.fp16", True),
        ("--fp16 false", "training.fp16", False),
        ("--fp16=on", "training.fp16", True),
        ("--no-fp16", "training.fp16", False),
        ("--no_fp16", "training.fp16", False),
        ("--fp16 --seed 1", "training.fp16", True),
        ("--no-fp16 --fp16", "training.fp16", True),
        ("--resume_from_checkpoint", "training.resume_from_checkpoint", "true"),
        ("--resume_from_checkpoint --fp16", "training.resume_from_checkpoint", "true"),
        ("--resume_from_checkpoint out/checkpoint-5", "training.resume_from_checkpoint", "out/checkpoint-5"),
        ("--max-n 5 --f-gram-hidden-size=64", "data.max_n", 5),
        ("--dataset_config_name none", "data.dataset_config_name", None),
        # another data set does not inherit the default one's configuration
        ("--dataset_name wikitext", "data.dataset_config_name", "wikitext-103-v1"),
        ("--dataset_name c4", "data.dataset_config_name", None),
        ("--dataset_name c4 --dataset_config_name en", "data.dataset_config_name", "en"),
    ],
)
def test_words_of_the_command_line_mean_what_people_mean(argv, name, value):
    found = get_option(parse(*argv.split()), name)
    assert (found, type(found)) == (value, type(value))


def test_another_base_model_does_not_inherit_the_files_sizes(written, capsys):
    path = written("model: {base_model_name: gpt2, hidden_size: 768, num_hidden_layers: 12}")
    options = parse("--config", str(path), "--base_model_name", "gpt2-medium", "--num_hidden_layers", "2")
    assert (options.model.hidden_size, options.model.num_hidden_layers) == (None, 2)
    notice = capsys.readouterr().err
    assert notice.count("\n") == 1
    assert "hidden_size 768" in notice
    assert parse("--config", str(path), "--base_model_name", "gpt2").model.hidden_size == 768
    path = written("model: {hidden_size: 64}")  # sizes of no model in particular stay
    assert parse("--config", str(path), "--base_model_name", "gpt2-medium").model.hidden_size == 64


def test_the_modern_trunk_brings_its_settings_and_what_is_given_wins():
    options = from_mapping({"model": {"base_model_name": "scone-modern"}, "training": {"learning_rate": 1e-3}})
    training = options.training
    assert (training.learning_rate, training.optimizer, options.model.input_norm) == (1e-3, "muon", True)
    assert "training.optimizer" not in options.given
    for mapping in ({"init": "pretrained", "base_model_name": "scone-modern"}, {"base_model_name": "gpt2"}):
        assert from_mapping({"model": mapping}).training.optimizer == "adamw"


BAD_FILES = [
    ("training: {learning_rat: 1}", r"unknown option training.learning_rat; did you mean training.learning_rate\?"),
    ("training: {max_n: 3}", r"unknown option training.max_n; did you mean data.max_n\?"),
    ("model: {f_gram: {hidden: 3}}", r"unknown option model.f_gram.hidden; did you mean model.f_gram.hidden_size\?"),
    ("trainin: {seed: 1}", r"unknown section trainin; expected one of .*did you mean training\?"),
    ("seed: 1", r"unknown section seed; .*did you mean training.seed\?"),
    ("training: 3", r"training: found 3; expected a section"),
    ("training: {seed: [1]}", r"training.seed: found \[1\]; expected a whole number"),
    ("training: {seed: true}", r"training.seed: found True; expected a whole number"),
    ("training: {seed: null}", r"training.seed: found None; expected a whole number"),
    ("training: {batch_size: .inf}", r"training.batch_size: found inf"),
    ("data: {dataset_config_name: 1.10}", r"found 1.1; expected text or none; put it in quotes"),
    ("data: {dataset_name: ''}", r"data.dataset_name: found ''; expected text"),
    ("- 1", r"found list; expected sections: data"),
    ("data: {max_n: 3, min_freq: 2, max_n: 4}", r"found duplicate key max_n"),
    ("data:\n  max_n: 4\nmodel: {}\ndata:\n  min_freq: 2\n", r"found duplicate key data"),
    ("model:\n  f_gram:\n    start: zero\n    start: random", r"found duplicate key start"),
    # bombs, code and nonsense
    ("a: [", r"cannot read .* as YAML"),
    ("\x00", r"cannot read .* as YAML"),
    ("[" * 20_000 + "]" * 20_000, r"cannot read .* as YAML"),
    ("data: !!python/object/apply:os.getcwd []", r"cannot read .* as YAML"),
    ("data: &a\n  max_n: *a", r"options\.yaml"),
    ("data: &a {dataset_name: *a}", r"options\.yaml"),
    ("data: {dataset_name: !!binary |\n  ////}", r"options\.yaml"),
    ("data: {dataset_name: !!timestamp x}", r"options\.yaml"),
    ("data: {dataset_name: !!int x}", r"options\.yaml"),
    ("? [a, b]\n: c", r"options\.yaml"),
    ("a" * 3_000_000, r"options\.yaml"),
    ("data: {<<: 3}", r"options\.yaml"),
]


@pytest.mark.parametrize(("text", "message"), BAD_FILES, ids=[text[:40] for text, _ in BAD_FILES])
def test_a_bad_file_gets_one_clear_line_with_its_name(written, text, message):
    with pytest.raises(SconeError, match=message) as caught:
        load_options(written(text))
    line = str(caught.value)
    assert "options.yaml" in line
    assert "\n" not in line
    assert len(line) < 2000


def test_help_shows_every_option_of_the_sections(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse("--help")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for name, entry in entries().items():
        shown = entry.section in SECTIONS or entry.flag == "batch_size"
        assert (f"--{entry.flag} " in text) == shown, name
        assert entry.info.help, name
        assert convert(entry, entry.default, name) == entry.default, "a default is valid"
