"""The commands by their verb: where each script is, and what it does in one line."""

from __future__ import annotations

VERBS = {
    "demo": ("demo", "the whole method on real text: train plain and SCONE, compare, write a report"),
    "train": ("train", "count f-grams on a corpus and train one model"),
    "train-configurations": ("train_configurations", "train several f-gram configurations on one corpus"),
    "hydra-train": ("hydra_train", "train with Hydra overrides and sweeps"),
    "count": ("count", "count the f-grams of a corpus and show their coverage"),
    "precompute": ("precompute_embeddings", "write a model's embedding table"),
    "table": ("table", "inspect an embedding table, or change its row type or length"),
    "evaluate": ("evaluate", "perplexity and zero-shot accuracy of a model"),
    "generate": ("generate", "continue a prompt"),
    "serve": ("serve", "serve a model over HTTP: an OpenAI-compatible API, metrics, and a page"),
    "benchmark": ("benchmark", "compare models: perplexity, speed, memory, FLOPs"),
    "inspect": ("inspect", "show a text's tokens with their f-grams, ranks and counts"),
    "verify": ("verify", "check a model folder, vocabulary, table or token file"),
}
"""Verb → (module in scone.scripts, one line of help)."""
