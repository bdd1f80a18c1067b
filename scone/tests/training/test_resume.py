"""Resuming over something else than the run began with is refused in one line, and leaves the run as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, TrainerCallback

from scone.cli import main
from scone.configs.loading import load_options
from scone.tests import tiny
from scone.tests.training.runs import WORDS, command_line, free_port, logged, options, run_command, run_ranks
from scone.tokenization.f_gram_vocabulary import FGramVocabulary
from scone.training.run import train
from scone.training.run_folder import check_kind
from scone.utils.errors import SconeError

BEGAN = {"data.max_f_grams": 40, "training.max_steps": 2, "training.save_steps": 2}
GO_ON = {"training.max_steps": 4, "training.resume_from_checkpoint": "true"}


@pytest.fixture(scope="module")
def tokenizer(corpus, tmp_path_factory):
    """Trained on the corpus as it was."""
    run = options(corpus, tmp_path_factory.mktemp("tokenizer") / "run", **(BEGAN | {"training.max_steps": 1}))
    return str(train(run, quiet=True))


@pytest.fixture(scope="module")
def begun(corpus, tokenizer, tmp_path_factory):
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    train(options(corpus, folder, **BEGAN, **{"model.tokenizer": tokenizer}), quiet=True)
    return folder


@pytest.fixture(scope="module")
def grown(corpus, tmp_path_factory):
    """The corpus with more text, in which other n-grams are frequent."""
    path = tmp_path_factory.mktemp("grown") / corpus.name
    more = [json.dumps({"text": " ".join([*WORDS[::-1]] * 12)}) for _ in range(60)]
    path.write_text("\n".join([corpus.read_text(encoding="utf-8"), *more]), encoding="utf-8")
    return path


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(corpus: Path, begun: Path, **changes: object) -> str:
    """What a resume says that must change nothing."""
    before = content(begun)
    said = tiny.refusal(train, options(corpus, begun, **(BEGAN | GO_ON | changes)), quiet=True)
    assert content(begun) == before
    return said


def test_another_f_gram_vocabulary_is_refused(grown, begun, tokenizer):
    said = refusal(grown, begun, **{"model.tokenizer": tokenizer})
    assert "other f-grams (found 40, fingerprint" in said
    assert "expected 40, fingerprint" in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.max_f_grams": 30}, "other f-grams (found 30,"),
        ({"data.max_n": 4, "data.min_freq": 60}, "other f-grams"),
        ({"data.ranking": "gain"}, "ranked by gain; expected the checkpoint's, ranked by frequency; give --ranking f"),
        ({"model.learned_rows": 10}, "learned_rows 10; expected the checkpoint's 40"),
        ({"model.hidden_size": 32}, "expected the checkpoint's"),
        ({"model.num_hidden_layers": 2}, "expected the checkpoint's"),
        ({"model.num_attention_heads": 4}, "text_config.n_head 4; expected the checkpoint's 2"),
        ({"model.hidden_act": "relu"}, "text_config.activation_function relu"),
        ({"model.combination": "replace"}, "combination replace; expected the checkpoint's add"),
        ({"model.embedding_scale": 2.0}, "embedding_scale 2.0; expected the checkpoint's 1.0"),
        ({"model.over_encoding_rows": 100}, "model_type scone_over_encoding; expected the checkpoint's scone"),
        ({"model.use_f_gram_embeddings": False}, "model_type gpt2; expected the checkpoint's scone"),
        ({"training.freeze_trunk": True}, "cannot resume from"),  # its optimizer has other parameters
    ],
)
def test_another_model_is_refused(corpus, begun, tokenizer, changes, message):
    assert message in refusal(corpus, begun, **{"model.tokenizer": tokenizer} | changes)


def test_a_run_that_names_no_ranking_keeps_the_one_it_began_with(corpus, tokenizer, tmp_path):
    """Two steps read 6 tokens for each f-gram, four read 13, and from 10 on a fresh run has f-grams by gain."""
    run = BEGAN | {"model.tokenizer": tokenizer}
    ranking = {}
    for name, steps in (("long", {"training.max_steps": 4}), ("short", {}), ("short", GO_ON)):
        final_model = train(options(corpus, tmp_path / name, **(run | steps)), quiet=True)
        ranking[name] = FGramVocabulary.load(final_model).ranking
        # so that the file repeats the run
        assert load_options(tmp_path / name / "options.yaml").data.ranking == ranking[name]
    assert ranking == {"long": "gain", "short": "frequency"}


TRUNKS = [
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_theta 500000.0; expected"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings True; expected the checkpoint's False"),
    ({"rms_norm_eps": 1e-3}, "rms_norm_eps 0.001; expected"),
]


def test_another_number_of_experts_for_each_token_is_refused(corpus, tokenizer, tmp_path):
    """Routers are not seen in the shapes of weights; what is of training alone may change."""

    def trunk(**changes: object) -> None:
        sizes = {"num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2}
        AutoConfig.for_model("mixtral", **(tiny.SIZES | sizes | changes)).save_pretrained(tmp_path / "trunk")

    trunk()
    run = BEGAN | {"model.base_model_name": str(tmp_path / "trunk"), "model.tokenizer": tokenizer}
    train(options(corpus, tmp_path / "run", **run), quiet=True)
    trunk(num_experts_per_tok=1)
    assert "num_experts_per_tok 1; expected the checkpoint's 2" in refusal(corpus, tmp_path / "run", **run)
    trunk(attention_dropout=0.5, router_aux_loss_coef=0.5, initializer_range=1.0)
    train(options(corpus, tmp_path / "run", **(run | GO_ON)), quiet=True)


OF_THE_FUNCTION = {
    "gpt2": {"n_head", "layer_norm_epsilon", "scale_attn_weights", "scale_attn_by_inverse_layer_idx"},
    "mixtral": {"num_experts_per_tok", "rms_norm_eps", "num_key_value_heads"},
    "gpt_oss": {"num_experts_per_tok", "swiglu_limit", "sliding_window", "rope_theta"},
    "gemma2": {"query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", "sliding_window"},
    "granitemoe": {"attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling"},
}
MAY_CHANGE = {
    *(
        "vocab_size",
        "use_cache",
        "initializer_range",
        "output_router_logits",
        "router_aux_loss_coef",
        "output_attentions",
    ),
    *("router_jitter_noise", "attn_pdrop", "embd_pdrop", "resid_pdrop", "attention_dropout"),
    *("summary_first_dropout", "bos_token_id", "eos_token_id", "pad_token_id", "output_hidden_states", "return_dict"),
    *("chunk_size_feed_forward", "is_encoder_decoder"),
}


@pytest.mark.parametrize("kind", OF_THE_FUNCTION)
def test_what_a_configuration_names_decides_the_function(kind, tmp_path):
    """Of every number and switch of an architecture: another is refused, or it is one of the few that may change."""
    config = AutoConfig.for_model(kind)
    saved = config.to_dict()
    refused, passed = set(), set()

    def said_of(changed: dict[str, object]) -> str:
        (tmp_path / "config.json").write_text(json.dumps(changed), encoding="utf-8")
        try:
            check_kind(tmp_path, type(config), config)
        except SconeError as error:
            return str(error)
        return ""

    assert not said_of(saved)
    for name, value in {**saved, **(saved.get("rope_parameters") or {})}.items():
        if isinstance(value, (bool, int, float)):
            other = not value if isinstance(value, bool) else 2 * value + 1
            part = {name: other} if name in saved else {"rope_parameters": saved["rope_parameters"] | {name: other}}
            said = said_of(saved | part)
            (passed if not said else refused if f"{name} " in said else set()).add(name)
    assert passed <= MAY_CHANGE | {"tie_word_embeddings"}, "the latter is compared once the weights are read"
    assert refused >= OF_THE_FUNCTION[kind]


@pytest.mark.parametrize("plain", [False, True])
def test_what_a_trunks_weights_do_not_show_is_compared(corpus, tokenizer, tmp_path, plain):
    """The trunk's folder was edited: the weights fit, and another function would go on with them."""
    tiny.trunk("llama").config.save_pretrained(tmp_path / "trunk")
    sizes = {"model.base_model_name": str(tmp_path / "trunk"), "model.tokenizer": tokenizer}
    sizes |= {"model.use_f_gram_embeddings": not plain, "training.max_steps": 1, "training.save_steps": 1}
    train(options(corpus, tmp_path / "run", **(BEGAN | sizes)), quiet=True)
    for changes, message in TRUNKS:
        tiny.trunk("llama", **changes).config.save_pretrained(tmp_path / "trunk")
        assert message in refusal(corpus, tmp_path / "run", **sizes | {"training.max_steps": 2})


def test_another_tokenizer_of_the_same_size_is_refused(grown, begun):
    """Trained on other text it gives other tokens, whatever model reads them."""
    assert "another tokenizer" in refusal(grown, begun)


def test_other_data_for_the_same_model_is_warned_of(corpus, grown, tokenizer, tmp_path, caplog):
    plain = {"model.use_f_gram_embeddings": False, "model.tokenizer": tokenizer}
    train(options(corpus, tmp_path / "run", **(BEGAN | plain)), quiet=True)
    train(options(corpus, tmp_path / "run", **(BEGAN | GO_ON | plain)), quiet=True)
    assert "the training split differs" not in caplog.text
    train(options(grown, tmp_path / "run", **(BEGAN | GO_ON | plain | {"training.max_steps": 6})), quiet=True)
    assert "the training split differs from the one that checkpoint-4 was trained on" in caplog.text


def test_a_damaged_optimizer_is_one_line(corpus, begun, tokenizer, tmp_path):
    state = begun / "checkpoint-2" / "optimizer.pt"
    whole = state.read_bytes()
    state.write_bytes(whole[: len(whole) // 2])
    try:
        assert "cannot resume from" in refusal(corpus, begun, **{"model.tokenizer": tokenizer})
    finally:
        state.write_bytes(whole)


@pytest.mark.parametrize("launcher", ["processes", "hydra"])
def test_every_way_to_train_refuses(grown, begun, tokenizer, launcher, monkeypatch, tmp_path, capsys):
    before = content(begun)
    if launcher == "processes":
        flags = command_line(grown, begun, "--max_f_grams", "40", "--max_steps", "4", "--resume_from_checkpoint")
        flags[flags.index("--tokenizer") + 1] = tokenizer
        run_ranks(run_command, 2, free_port(), flags, tmp_path)
        status, said = (tmp_path / "0.status").read_text() != "0", (tmp_path / "0.err").read_text()
    else:
        monkeypatch.chdir(tmp_path)
        values = {"data.dataset_name": grown, "data.cache_dir": grown.parent / "cache", "training.output_dir": begun}
        values |= {"model.tokenizer": tokenizer, "data.max_f_grams": 40, "data.min_freq": 3, "data.max_length": 32}
        values |= {"model.num_attention_heads": 2, "model.hidden_size": 16, "model.num_hidden_layers": 1}
        values |= {"training.device": "cpu", "data.num_workers": 0, "training.resume_from_checkpoint": "true"}
        words = [f"{name}={value}" for name, value in values.items()]
        status, said = main(["hydra-train", *words, "training.report_to=none"]), capsys.readouterr().err
    assert status
    assert "other f-grams (found 40" in said
    after = content(begun)
    assert {name: after[name] for name in before} == before
    assert after.keys() == before.keys()


def test_no_epochs_and_a_step_train(corpus, tmp_path):
    run = options(corpus, tmp_path / "run", **{"training.num_epochs": 0, "training.max_steps": 1})
    assert (train(run, quiet=True) / "model.safetensors").exists()


@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_a_resume_trains_at_the_rates_that_it_is_given(corpus, tmp_path, schedule):
    """Of the trunk in the log; rows and decay among the checkpoint's groups."""
    changes = {"training.save_steps": 2, "training.logging_steps": 1, "training.lr_scheduler_type": schedule}
    rates = {"training.learning_rate": 0.001, "training.rows_learning_rate": 0.002, "training.weight_decay": 0.3}
    whole = train(options(corpus, tmp_path / "whole", **changes, **rates, **{"training.max_steps": 4}), quiet=True)
    begun = tmp_path / "begun"
    train(options(corpus, begun, **changes, **{"training.max_steps": 2}), quiet=True)
    train(options(corpus, begun, **changes, **rates, **GO_ON), quiet=True)
    assert logged(begun, "learning_rate")[2:] == logged(whole.parent, "learning_rate")[2:]
    groups = [
        [
            {name: group[name] for name in ("lr", "initial_lr", "weight_decay")}
            for group in torch.load(run / "checkpoint-4" / "optimizer.pt", weights_only=True)["param_groups"]
        ]
        for run in (whole.parent, begun)
    ]
    assert groups[1] == groups[0]


@pytest.mark.parametrize(("place", "said"), [("weights", "loss nan"), ("gradients", "grad_norm nan")])
def test_a_run_that_is_lost_stops_and_keeps_the_checkpoints_before_it(corpus, tmp_path, place, said):
    """Checkpoints at steps 2, 4 and 6, a line in the log at 10: what is lost at step 5 is seen before it is saved."""

    class Break(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **_):
            if state.global_step == 4 and place == "weights":
                next(model.parameters()).data.fill_(float("inf"))
            if state.global_step == 5 and place == "gradients":
                next(model.parameters()).register_hook(lambda gradient: gradient * float("nan"))

    changes = {"training.max_steps": 10, "training.save_steps": 2, "training.logging_steps": 10}
    run = options(corpus, tmp_path / "run", **changes)
    found = tiny.refusal(train, run, quiet=True, callbacks=[Break()])
    assert said in found
    assert "by step 6; expected numbers" in found
    assert "run/checkpoint-4" in found
    assert max(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == "checkpoint-4"


@pytest.mark.parametrize("began", ["pretrained", "resumed"])
def test_a_separator_of_zeros_goes_on_as_a_vector(corpus, tokenizer, tmp_path, began):
    """Trunks of before have one; the gradients of a deep one ended there with the first step."""
    trunk = {"model.base_model_name": "llama", "model.tokenizer": tokenizer, "training.learning_rate": 1e-5}
    folder = tmp_path / "run"
    train(options(corpus, folder, **BEGAN, **trunk, **{"model.use_f_gram_embeddings": False}), quiet=True)
    at, name = folder / "checkpoint-2", "model.embed_tokens.weight"
    weights = load_file(at / "model.safetensors")
    separator = AutoTokenizer.from_pretrained(folder / "final_model").pad_token_id
    weights[name][separator] = 0
    save_file(weights, at / "model.safetensors", {"format": "pt"})
    if began == "resumed":
        changes = BEGAN | GO_ON | trunk
    else:
        at, folder = folder / "final_model", tmp_path / "second"
        save_file(weights, at / "model.safetensors", {"format": "pt"})
        sizes = {"model.hidden_size": None, "model.num_hidden_layers": None, "model.num_attention_heads": None}
        changes = BEGAN | trunk | sizes | {"model.base_model_name": str(at), "model.init": "pretrained"}
    train(options(corpus, folder, **changes, **{"model.use_f_gram_embeddings": False}), quiet=True)
    rows = load_file(folder / "final_model" / "model.safetensors")[name]
    assert 0.2 < float(rows[separator].std() / rows.std()) < 5
