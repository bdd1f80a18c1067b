"""Counted FLOPs equal the arithmetic of the layers; parameters and bytes count shared weights once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from scone.evaluation import measure
from scone.inference.statistics import process_bytes
from scone.models.accounting import parameter_counts, trunk_forward_flops

WIDTH, LAYERS, VOCAB_SIZE, LENGTH = 16, 2, 40, 8


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=2,
        n_positions=LENGTH,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).eval()


def test_inference_flops_are_those_of_the_layers(model: GPT2LMHeadModel) -> None:
    matrices = LAYERS * 12 * WIDTH * WIDTH + WIDTH * VOCAB_SIZE
    attention = LAYERS * 2 * LENGTH * WIDTH  # scores and their use, all T × T of them
    counted = measure.inference_flops_per_token(model, np.arange(LENGTH))
    assert counted == pytest.approx(2 * (matrices + attention), rel=1e-6)
    assert counted == pytest.approx(trunk_forward_flops(model.config, LENGTH), rel=1e-6), "as the formulas say"


def test_training_takes_three_times_the_matrix_flops(model: GPT2LMHeadModel) -> None:
    tokens = np.arange(2 * LENGTH).reshape(2, LENGTH)
    ratio = measure.training_flops_per_token(model, tokens) / measure.inference_flops_per_token(model, tokens[0])
    assert 2.9 < ratio < 3.5
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_tied_weights_count_once(model: GPT2LMHeadModel) -> None:
    tied = sum(parameter.numel() for parameter in model.transformer.parameters())
    assert parameter_counts(model).resident == tied
    assert measure.resident_bytes(model) == 4 * tied


def test_machine_is_described() -> None:
    machine = measure.describe_machine()
    assert machine["num_cores"] >= 1
    assert machine["processor"]
    assert (process_bytes() or 1) > 0
