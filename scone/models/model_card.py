"""The model card: README.md of a saved model, from what the run knows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from scone.configs.schema import SconeOptions
from scone.utils.files import atomic_path
from scone.utils.text import human_count

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CARD_FILE = "README.md"
_MADE_BY = "<!-- made by scone train: edit freely, a later save keeps a card without this line -->"


def write_model_card(
    folder: str | Path,
    options: SconeOptions,
    model: PreTrainedModel,
    train_tokens: int,
    steps: int,
    metrics: Mapping[str, float],
) -> Path:
    """Write ``README.md`` into the model's folder, unless somebody wrote one there; returns its path.

    ``train_tokens``: of the training split. ``metrics``: the trainer's last evaluation, empty where there was none.
    """
    path = Path(folder) / CARD_FILE
    if path.exists() and _MADE_BY not in path.read_text(encoding="utf-8", errors="replace"):
        return path
    with atomic_path(path) as temporary:
        temporary.write_text(model_card(options, model, train_tokens, steps, metrics), encoding="utf-8")
    return path


def model_card(
    options: SconeOptions, model: PreTrainedModel, train_tokens: int, steps: int, metrics: Mapping[str, float]
) -> str:
    """The card's Markdown: what the model is, what it was trained on, what was measured, how it is used."""
    name = Path(options.training.output_dir).name
    sections = [
        _head(options, model),
        f"# {name}\n\n{_what(options, model)}",
        _table("Model", _sizes(options, model)),
        _table("Training", _training(options, train_tokens, steps)),
        _table("Measured", _measured(options, metrics))
        if metrics
        else "## Measured\n\nThe corpus has no validation split.",
        _usage(name, hasattr(model.config, "num_f_grams")),
        _LICENCE,
    ]
    return f"{chr(10).join(section + chr(10) for section in sections)}\n{_MADE_BY}\n"


_LICENCE = """## Licence and limits

No licence is stated: it is yours to choose, within what the licences of the corpus and of the base model allow. The
model repeats what its corpus says, private or wrong; nothing beyond the figures above was tested."""


def _head(options: SconeOptions, model: PreTrainedModel) -> str:
    """The block that the Hugging Face hub reads."""
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    lines.append("tags: [scone, f-grams]" if hasattr(model.config, "num_f_grams") else "tags: [baseline]")
    if options.model.init == "pretrained":
        lines.append(f"base_model: {json.dumps(options.model.base_model_name)}")
    return "\n".join([*lines, "---"])


def _what(options: SconeOptions, model: PreTrainedModel) -> str:
    start = "from its pretrained weights" if options.model.init == "pretrained" else "from scratch"
    trunk = f"a {model.config.get_text_config().model_type} language model, trained {start}"
    if not hasattr(model.config, "num_f_grams"):
        return f"{trunk[0].upper()}{trunk[1:]}: the plain baseline of a SCONE model."
    return (
        f"SCONE ([arXiv 2502.01637](https://arxiv.org/abs/2502.01637)): {trunk}, whose input embeddings know the "
        f"{model.config.num_f_grams:,} most frequent n-grams of its corpus (`f_grams.safetensors`)."
    )


def _sizes(options: SconeOptions, model: PreTrainedModel) -> dict[str, str]:
    config = model.config
    trunk = getattr(model, "trunk", model)
    sizes = {
        "parameters of the trunk": human_count(sum(weight.numel() for weight in trunk.parameters())),
        "width": f"{config.get_text_config().hidden_size:,}",
        "vocabulary": f"{config.get_text_config().vocab_size:,} tokens",
    }
    if hasattr(config, "num_f_grams"):
        others = sum(weight.numel() for weight in model.parameters()) - sum(w.numel() for w in trunk.parameters())
        sizes |= {
            "f-grams": f"{config.num_f_grams:,} of 2 to {config.max_n} tokens",
            "learned rows": f"{config.learned_rows:,}",
            "parameters of f-gram model and rows": human_count(others),
        }
    return sizes


def _training(options: SconeOptions, train_tokens: int, steps: int) -> dict[str, str]:
    data = options.data
    corpus = Path(data.dataset_name).name if Path(data.dataset_name).exists() else data.dataset_name
    return {
        "corpus": " ".join(filter(None, (corpus, data.dataset_config_name))),
        "tokens of the corpus": f"{train_tokens:,}",
        "steps": f"{steps:,}",
        "sequence length": f"{data.max_length:,} tokens",
        "learning rate": f"{options.training.learning_rate:g}",
        "seed": str(options.training.seed),
        "all options": "`options.yaml`",
    }


def _measured(options: SconeOptions, metrics: Mapping[str, float]) -> dict[str, str]:
    limit = options.training.max_eval_tokens
    where = "" if limit is None else f" (first {limit:,} tokens)"
    names = {"eval_loss": "validation loss, nats a token", "eval_perplexity": "validation perplexity"}
    return {name + where: f"{metrics[key]:.4f}" for key, name in names.items() if key in metrics}


def _table(title: str, rows: Mapping[str, str]) -> str:
    body = "\n".join(f"| {name} | {value.replace('|', chr(92) + '|')} |" for name, value in rows.items())
    return f"## {title}\n\n| | |\n|---|---|\n{body}"


def _usage(name: str, has_f_grams: bool) -> str:
    if not has_f_grams:
        return f'## Use\n\n```bash\nscone generate --model_path {name}/final_model --prompt "Once upon a time"\n```'
    return f"""## Use

```bash
scone precompute --model_path {name}/final_model --output_path {name}/embeddings.cache
scone generate --model_path {name}/final_model --embedding_cache_path {name}/embeddings.cache --prompt "Once upon"
```

```python
from scone import EmbeddingTable, SconeForCausalLM

table = EmbeddingTable.open("{name}/embeddings.cache", placement="mmap")
model = SconeForCausalLM.from_pretrained("{name}/final_model", table=table)
```"""
