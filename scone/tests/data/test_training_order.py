"""The order of a run's blocks: the same for every process, and known for each epoch without the ones before."""

from __future__ import annotations

from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler

from scone.data.dataset import TrainingOrder


def batches(num_blocks, *, steps_done=0, rank=0, **run) -> list[list[int]]:
    """What one process reads in the epoch that begins after ``steps_done``, the way the trainer's loader shares out."""
    order = TrainingOrder(num_blocks, seed=3, **run, steps_done=lambda: steps_done)
    sampler = BatchSampler(order, run["batch_size"], drop_last=False)
    shared = BatchSamplerShard(sampler, run["processes"], rank) if run["processes"] > 1 else sampler
    found = list(shared)
    assert len(found) == len(shared)
    return found


RUNS = {"batch_size": st.integers(1, 5), "processes": st.integers(1, 4), "accumulation": st.integers(1, 3)}


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 60), st.fixed_dictionaries(RUNS), st.integers(0, 3))
def test_an_epoch_reads_every_block_in_as_many_steps_as_it_says(num_blocks, run, epoch):
    order = TrainingOrder(num_blocks, seed=3, **run)
    steps_done = epoch * order.steps_per_epoch
    of_ranks = [batches(num_blocks, **run, steps_done=steps_done, rank=rank) for rank in range(run["processes"])]
    assert {block for found in of_ranks for batch in found for block in batch} == set(range(num_blocks))
    for found in of_ranks:
        assert -(-len(found) // run["accumulation"]) == order.steps_per_epoch


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 3), st.integers(0, 300))
def test_two_processes_read_what_one_reads_in_batches_of_twice_the_size(num_blocks, batch_size, accumulation, steps):
    run = {"batch_size": batch_size, "processes": 2, "accumulation": accumulation, "max_steps": steps}
    whole = batches(num_blocks, **(run | {"batch_size": 2 * batch_size, "processes": 1}))
    halves = [batches(num_blocks, **run, rank=rank) for rank in (0, 1)]
    for one, left, right in zip(whole, *halves, strict=True):
        assert (left + right)[: len(one)] == one


@given(st.integers(4, 60), st.integers(0, 300), st.data())
def test_a_resumed_epoch_goes_on_where_it_was(num_blocks, max_steps, data):
    """Also with batches shared out and skipped, where accelerate forgets to tell the sampler of the epoch."""
    run = {"batch_size": 2, "processes": 2, "accumulation": 1, "max_steps": max_steps}
    steps = TrainingOrder(num_blocks, seed=3, **run).steps_per_epoch
    whole = batches(num_blocks, **run, steps_done=2 * steps, rank=1)
    done = data.draw(st.integers(0, steps - 1))
    order = TrainingOrder(num_blocks, seed=3, **run, steps_done=lambda: 2 * steps + done)
    shared = BatchSamplerShard(BatchSampler(order, run["batch_size"], drop_last=False), 2, 1)
    assert list(SkipBatchSampler(shared, done)) == whole[done:]


def test_epochs_and_seeds_have_orders_of_their_own():
    def blocks(seed, epoch):
        return list(TrainingOrder(50, seed=seed, batch_size=1, steps_done=lambda: 50 * epoch))

    assert len({tuple(blocks(*run)) for run in [(0, 0), (0, 1), (7, 0), (7, 1)]}) == 4
    assert sorted(blocks(0, 1)) == list(range(50))
