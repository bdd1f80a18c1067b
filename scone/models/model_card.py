"""The model card: README.md of a saved model, from what the run knows (text in model_card.md.j2)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard, ModelCardData

from scone.configs.schema import SconeOptions
from scone.utils.files import atomic_path
from scone.utils.text import human_count

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CARD_FILE = "README.md"
TEMPLATE = Path(__file__).with_suffix(".md.j2")


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
    made_by = TEMPLATE.read_text(encoding="utf-8").splitlines()[-1]
    if path.exists() and made_by not in path.read_text(encoding="utf-8", errors="replace"):
        return path
    config, data, pretrained = model.config, options.data, options.model.init == "pretrained"
    scone, trunk, text_config = hasattr(config, "num_f_grams"), getattr(model, "trunk", model), config.get_text_config()
    of_trunk, of_model = (sum(weight.numel() for weight in each.parameters()) for each in (trunk, model))
    sizes = {
        "parameters of the trunk": human_count(of_trunk),
        "width": f"{text_config.hidden_size:,}",
        "vocabulary": f"{text_config.vocab_size:,} tokens",
    }
    if scone:
        sizes["f-grams"] = f"{config.num_f_grams:,} of 2 to {config.max_n} tokens"
        sizes["learned rows"] = f"{config.learned_rows:,}"
        sizes["parameters of f-gram model and rows"] = human_count(of_model - of_trunk)
    corpus = Path(data.dataset_name).name if Path(data.dataset_name).exists() else data.dataset_name
    training = {
        "corpus": " ".join(filter(None, (corpus, data.dataset_config_name))),
        "tokens of the corpus": f"{train_tokens:,}",
        "steps": f"{steps:,}",
        "sequence length": f"{data.max_length:,} tokens",
        "learning rate": f"{options.training.learning_rate:g}",
        "seed": str(options.training.seed),
        "all options": "`options.yaml`",
    }
    limit = options.training.max_eval_tokens
    where = "" if limit is None else f" (first {limit:,} tokens)"
    names = {"eval_loss": "validation loss, nats a token", "eval_perplexity": "validation perplexity"}
    card = ModelCard.from_template(
        ModelCardData(
            library_name="transformers",
            pipeline_tag="text-generation",
            tags=["scone", "f-grams"] if scone else ["baseline"],
            base_model=options.model.base_model_name if pretrained else None,
        ),
        template_path=str(TEMPLATE),
        name=Path(options.training.output_dir).name,
        f_grams=f"{config.num_f_grams:,}" if scone else "",
        trunk=(
            f"{text_config.model_type} language model, trained "
            f"{'from its pretrained weights' if pretrained else 'from scratch'}"
        ),
        tables={
            "Model": sizes,
            "Training": training,
            "Measured": {name + where: f"{metrics[key]:.4f}" for key, name in names.items() if key in metrics},
        },
    )
    with atomic_path(path) as temporary:
        temporary.write_text(str(card), encoding="utf-8")
    return path
