"""Row-RMS on the CPU against its reference implementation."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scone.kernels import row_rms
from scone.tests.kernels import reference


def problem(seed: int, num_rows: int, width: int, share: float) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Weight, sums and visits; the touched rows in any order; and their gradients, of many sizes, some zero."""
    rng = np.random.default_rng(seed)
    touched = np.flatnonzero(rng.random(num_rows) < share)
    rng.shuffle(touched)
    gradients = rng.standard_normal((len(touched), width)) * 10.0 ** rng.integers(-6, 3, (len(touched), 1))
    gradients[rng.random(len(touched)) < 0.1] = 0.0
    arrays = [
        rng.standard_normal((num_rows, width)).astype(np.float32),
        rng.random(num_rows).astype(np.float32),
        rng.integers(0, 5, num_rows).astype(np.float32),
    ]
    return arrays, touched, gradients.astype(np.float32)


def numbers(seed: int, width: int) -> dict[str, object]:
    rng = np.random.default_rng(seed + 1)
    mean = 0.0 if seed % 7 == 0 else float(rng.random())
    return {"columns": (rng.random(width) + 0.1).astype(np.float32), "mean": mean, "prior": 4.0, "learning_rate": 0.1}


def update(arrays: list[np.ndarray], touched: np.ndarray, gradients: np.ndarray, **options: object) -> None:
    """`update_rows` of arrays, in place; rows may be a tensor."""
    columns, mean = torch.from_numpy(options.pop("columns")), torch.tensor([options.pop("mean")])
    tensors = [array if isinstance(array, torch.Tensor) else torch.from_numpy(array) for array in arrays]
    rows = (torch.from_numpy(touched), torch.from_numpy(gradients))
    row_rms.update_rows(*tensors, *rows, columns, mean, **options)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), num_rows=st.integers(1, 30), width=st.integers(1, 9), share=st.floats(0, 1))
def test_row_update_equals_its_reference(seed, num_rows, width, share):
    ours, touched, gradients = problem(seed, num_rows, width, share)
    theirs, before = [array.astype(np.float64) for array in ours], [array.copy() for array in ours]
    update(ours, touched, gradients, **numbers(seed, width))
    reference.rms_rows(*theirs, touched, gradients.astype(np.float64), **numbers(seed, width))
    untouched = np.setdiff1d(np.arange(num_rows), touched)
    for our, their, old in zip(ours, theirs, before, strict=True):
        np.testing.assert_allclose(our, their, atol=1e-4, rtol=1e-4)
        np.testing.assert_array_equal(our[untouched], old[untouched])


def test_any_number_of_threads_gives_the_same_bits(monkeypatch):
    monkeypatch.setattr(row_rms, "VALUES_PER_THREAD", 1)
    results = []
    for num_threads in (1, 2, 7):
        arrays, touched, gradients = problem(1, 50, 8, 0.5)
        monkeypatch.setattr(torch, "get_num_threads", lambda n=num_threads: n)
        update(arrays, touched, gradients, **numbers(1, 8))
        results.append(arrays)
    for other in results[1:]:
        for first, again in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(first, again)


def test_bf16_rows_are_the_fp32_update_rounded_at_random():
    """Bit for bit what PyTorch's operators make of it; a share as its rows are among all; what is not finite stays."""
    (weight, sums, visits), touched, gradients = problem(1, 40, 9, 0.8)
    weight[touched[0], :3] = np.nan, np.inf, -np.inf
    weight = torch.from_numpy(weight).bfloat16()
    options = numbers(1, 9) | {"key": row_rms.rounding_key(7)}
    exact = weight.float().numpy()
    update([exact, sums.copy(), visits.copy()], touched, gradients, **options)
    expected = row_rms.rounded_stochastically(torch.from_numpy(exact), torch.arange(40), options["key"])
    whole = weight.clone()
    update([whole, sums.copy(), visits.copy()], touched, gradients, **options)
    assert expected[touched[0]].isfinite().tolist() == [False] * 3 + [True] * 6
    assert torch.equal(whole.view(torch.int16), expected.view(torch.int16))
    for rank in range(3):
        share = weight[rank::3].clone()
        ours = touched % 3 == rank
        arguments = [array[rank::3].copy() for array in (sums, visits)]
        place = {"stride": 3, "first": rank}
        update([share, *arguments], touched[ours] // 3, gradients[ours], **options, **place)
        assert torch.equal(share.view(torch.int16), whole[rank::3].view(torch.int16))


def test_the_mean_of_many_roundings_is_the_update_in_fp32():
    """Over rows and steps; each is a neighbour of it; and rounding to the nearest would not have moved at all."""
    count, moves = 2000, torch.tensor([0.0, 1e-4, -1e-4, 3e-3, -2e-3, 1.9e-3])
    values = (1.0 + moves).expand(count, -1).contiguous()
    for numbers_from in (0, 2**32 - 5):
        rows = torch.arange(count) + numbers_from
        found = torch.stack([row_rms.rounded_stochastically(values, rows, row_rms.rounding_key(s)) for s in range(20)])
        assert (found[..., 0] == 1).all()
        assert ((found.float() - values).abs() < 2**-7).all()
        chance = torch.where(moves >= 0, moves * 2**7, -moves * 2**8)
        grid = torch.where(moves >= 0, 2.0**-7, 2.0**-8)
        error = (found.float() - values).mean((0, 1)).abs()
        assert (error <= 4 * grid * (chance * (1 - chance) / (20 * count)).sqrt() + 1e-9).all(), error
