"""The Triton row update equals its reference: on a GPU, or interpreted (TRITON_INTERPRET=1) without one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scone.kernels import row_rms
from scone.tests.kernels import reference
from scone.tests.kernels.test_row_rms import numbers, problem
from scone.tests.kernels.triton_device import DEVICE, zeros_beyond_31_bits


@pytest.mark.parametrize(("num_rows", "width", "share"), [(1, 1, 1.0), (20, 7, 0.5), (9, 300, 0.7), (5, 16, 0.0)])
@pytest.mark.parametrize("seed", [0, 3])
def test_triton_equals_the_reference(seed: int, num_rows: int, width: int, share: float) -> None:
    ours, touched, gradients = problem(seed, num_rows, width, share)
    theirs = [array.astype(np.float64) for array in ours]
    options = numbers(seed, width)
    reference.rms_rows(*theirs, touched, gradients.astype(np.float64), **options)
    on_device = [torch.from_numpy(array).to(DEVICE) for array in (*ours, touched, gradients, options.pop("columns"))]
    from scone.kernels.rows_triton import update_rows_triton  # where Triton is installed

    update_rows_triton(*on_device, torch.tensor([options.pop("mean")], device=DEVICE), **options)
    for our, their in zip(on_device, theirs, strict=False):
        np.testing.assert_allclose(our.cpu().numpy(), their, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("stride", [1, 3])
def test_bf16_rows_are_rounded_as_on_the_cpu(stride: int) -> None:
    from scone.kernels.rows_triton import update_rows_triton

    (weight, sums, visits), touched, gradients = problem(2, 50, 300, 0.7)
    options = numbers(2, 300)
    columns, mean = torch.from_numpy(options.pop("columns")), torch.tensor([options.pop("mean")])
    rest = [torch.from_numpy(array) for array in (sums, visits, touched, gradients)]
    start = torch.from_numpy(weight).bfloat16()
    for step in (1, 2**31 + 5):
        key = row_rms.rounding_key(step)
        results = []
        for first in (start.float(), start):
            ours = [tensor.to(DEVICE, copy=True) for tensor in (first, *rest, columns, mean)]
            update_rows_triton(*ours, **options, key=key, stride=stride, first=stride - 1)
            results.append(ours[0].cpu())
        numbers_of_rows = torch.arange(50) * stride + stride - 1
        expected = row_rms.rounded_stochastically(results[0], numbers_of_rows, key)
        assert (results[1] != expected).float().mean() < 1e-3  # where the last bit of fp32 differs
        torch.testing.assert_close(results[1], expected, atol=0, rtol=2**-7)
        assert not torch.equal(expected, results[0].bfloat16())


def test_rows_behind_two_to_the_31_numbers_are_updated(monkeypatch: pytest.MonkeyPatch) -> None:
    from scone.kernels.rows_triton import update_rows_triton

    weight = zeros_beyond_31_bits(monkeypatch, 1024, torch.bfloat16)
    last = len(weight) - 1
    state = torch.zeros(2, len(weight), device=DEVICE)
    gradient, columns = torch.ones(1, 1024, device=DEVICE), torch.ones(1024, device=DEVICE)
    at, mean = torch.tensor([last], device=DEVICE), torch.ones(1, device=DEVICE)
    update_rows_triton(weight, *state, at, gradient, columns, mean, prior=4.0, learning_rate=0.5)
    assert weight[last].unique().tolist() == [-0.5]
    assert state[:, last].tolist() == [1.0, 1.0]
    for elsewhere in (0, last - 2**21, last - 1):
        assert not weight[elsewhere].any()
