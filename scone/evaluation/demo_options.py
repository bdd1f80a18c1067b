"""How large the demo is, and the options of its two trainings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scone.configs.schema import DataOptions, FGramModelOptions, ModelOptions, SconeOptions, TrainingOptions

TRUNK_FOLDER = "trunk"


@dataclass(frozen=True)
class DemoOptions:
    """What the demo does, and how large. The sizes were chosen by experiment (docs/experiments/demo.md)."""

    data: str = "python-stdlib"
    text_column: str = "text"
    output_dir: str = "demo"
    minutes: float = 8.0
    steps: int = 420
    batch_size: int = 16
    max_length: int = 256
    vocab_size: int = 4096
    hidden_size: int = 128
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    max_n: int = 4
    min_freq: int = 5
    max_f_grams: int = 300_000
    f_gram_num_hidden_layers: int = 1
    learning_rate: float = 4e-3
    seed: int = 42
    num_evaluations: int = 4
    max_test_tokens: int = 200_000


QUICK = {
    "minutes": 2.0,
    "steps": 60,
    "batch_size": 8,
    "vocab_size": 2048,
    "max_f_grams": 50_000,
    "num_evaluations": 2,
    "max_test_tokens": 20_000,
}
"""What ``--quick`` changes: every step in about a minute; too short for the gain to be large."""


def model_options(options: DemoOptions, name: str) -> SconeOptions:
    """The options of one of the two trainings; they differ in the input embedding and the folder only."""
    folder = Path(options.output_dir)
    data = DataOptions(
        dataset_name=options.data,
        dataset_config_name=None,
        text_column=options.text_column,
        max_length=options.max_length,
        max_n=options.max_n,
        min_freq=options.min_freq,
        max_f_grams=options.max_f_grams,
        cache_dir=str(folder / "cache"),
        num_workers=0,
    )
    model = ModelOptions(
        base_model_name=str(folder / TRUNK_FOLDER),
        tokenizer="train",
        vocab_size=options.vocab_size,
        use_f_gram_embeddings=name == "scone",
        learned_rows=options.max_f_grams,
        f_gram=FGramModelOptions(num_hidden_layers=options.f_gram_num_hidden_layers),
    )
    training = TrainingOptions(
        output_dir=str(folder / name),
        max_steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        rows_learning_rate=3 * options.learning_rate,  # in so few steps, 0.05 nats better than the trunk's own rate
        warmup_steps=max(1, options.steps // 12),
        lr_scheduler_type="cosine",
        logging_steps=max(1, options.steps // 40),
        eval_steps=max(1, options.steps // options.num_evaluations),
        save_steps=-(-options.steps // 2),  # a demo that is stopped goes on from here
        save_total_limit=1,
        seed=options.seed,
        device="cpu",
        report_to="none",
    )
    return SconeOptions(data, model, training)


def trunk_configuration(options: DemoOptions) -> dict[str, Any]:
    """config.json of the trunk: a small GPT-2."""
    return {
        "model_type": "gpt2",
        "n_embd": options.hidden_size,
        "n_layer": options.num_hidden_layers,
        "n_head": options.num_attention_heads,
        "n_positions": options.max_length,
        **dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), 0.0),
    }
