"""AdamW for everything dense, and Adam on touched rows only for the learned rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from scone.kernels.common import to_device
from scone.kernels.row_adam import update_rows
from scone.models.learned_rows import LearnedRows, untouched_zeros


class AdamWWithRows(torch.optim.AdamW):
    """AdamW whose last parameter group may be the weight of ``LearnedRows``.

    The rows' gradients are the ones that the module's forward passes left in ``pending``. Only the distinct rows among
    them are read and written, moments included, so a step costs the rows it touches and not R. As in
    ``torch.optim.SparseAdam``, the moments of a row move only when it is touched and the bias correction counts all
    steps; there is no weight decay, since a row that stays at zero is a row that was never needed.

    Args:
        groups: AdamW parameter groups; may be none where there are rows.
        rows: the learned rows, or None.
        rows_learning_rate: theirs; schedulers scale it like any other group's.
        gradient_scale: the factor by which the loss was multiplied before ``backward`` (fp16), read at each step.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        rows: LearnedRows | None = None,
        rows_learning_rate: float = 1e-3,
        gradient_scale: Callable[[], float] | None = None,
        **adamw: Any,
    ) -> None:
        # nothing dense where rows are all there is to train: AdamW wants one group even so
        super().__init__(list(groups) or [{"params": []}], **adamw)
        self.rows = rows
        self.gradient_scale = gradient_scale
        self._hosts: dist.ProcessGroup | None = None
        if rows is not None:
            self.add_param_group({"params": [rows.weight], "lr": rows_learning_rate, "weight_decay": 0.0})

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step. Under ``torch.distributed`` the rows' gradients are averaged over the ranks first."""
        loss = super().step(closure)
        if self.rows is not None:
            scale = self.gradient_scale() if self.gradient_scale is not None else 1.0
            row_ids, gradients = pending_gradients(self.rows)
            if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
                row_ids, gradients = gather_over_ranks(row_ids, gradients, self._group_of_hosts())
            self.rows.pending.clear()  # trainers zero the model's gradients, not the optimizer's
            if len(row_ids):
                device = self.rows.weight.device
                self._update_rows(to_device(torch.from_numpy(row_ids), device), gradients.div_(scale).to(device))
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        if self.rows is not None:
            self.rows.pending.clear()

    def _group_of_hosts(self) -> dist.ProcessGroup | None:
        """Where hosts talk to each other; made by all ranks at their first step. None: the default group."""
        if self._hosts is None and dist.get_backend() != "gloo":
            self._hosts = dist.new_group(backend="gloo")
        return self._hosts

    @torch.no_grad()
    def _update_rows(self, row_ids: Tensor, gradients: Tensor) -> None:
        assert self.rows is not None
        weight = self.rows.weight
        group = self.param_groups[-1]
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros(())
            num_rows, width = weight.shape
            state["exp_avg"] = untouched_zeros(num_rows, width, weight.device)
            state["exp_avg_sq"] = untouched_zeros(num_rows, width, weight.device)
        state["step"] += 1
        step = state["step"].item()
        beta1, beta2 = group["betas"]
        if weight.device.type == "cpu" and weight.dtype == torch.float32:
            update_rows(
                torch.get_num_threads(),
                weight.numpy(),
                state["exp_avg"].numpy(),
                state["exp_avg_sq"].numpy(),
                row_ids.numpy(),
                gradients.numpy(),
                learning_rate=group["lr"],
                betas=group["betas"],
                eps=group["eps"],
                step=step,
            )
            return
        average = state["exp_avg"].index_select(0, row_ids).lerp_(gradients, 1 - beta1)
        square = (
            state["exp_avg_sq"].index_select(0, row_ids).mul_(beta2).addcmul_(gradients, gradients, value=1 - beta2)
        )
        state["exp_avg"].index_copy_(0, row_ids, average)
        state["exp_avg_sq"].index_copy_(0, row_ids, square)
        denominator = square.sqrt_().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
        update = average.div_(denominator).mul_(-group["lr"] / (1 - beta1**step))
        weight.index_add_(0, row_ids, update)


def pending_gradients(rows: LearnedRows) -> tuple[np.ndarray, Tensor]:
    """Distinct row ids int64 ``[R]`` and their summed gradients ``[R, D]`` of the passes since the last step."""
    touched = [(ids, leaf.grad) for ids, leaf in rows.pending if leaf.grad is not None]
    if not touched:
        return np.empty(0, np.int64), rows.weight.new_zeros(0, rows.weight.shape[1])
    return sum_by_row(touched)


def sum_by_row(parts: Sequence[tuple[np.ndarray, Tensor]]) -> tuple[np.ndarray, Tensor]:
    """Distinct row ids and the sums of their gradients ``[r, D]`` over ``parts``, each of which has distinct ids.

    The ids are on the host, so it needs no answer from an accelerator. Parts are added one after the other: the sums
    are the same bits wherever they are computed.
    """
    if len(parts) == 1:
        return parts[0]
    row_ids, inverse = np.unique(np.concatenate([ids for ids, _ in parts]), return_inverse=True)
    first = parts[0][1]
    total = first.new_zeros(len(row_ids), first.shape[1])
    places = to_device(torch.from_numpy(inverse.reshape(-1)), first.device)
    for place, (_, gradients) in zip(places.split([len(ids) for ids, _ in parts]), parts, strict=True):
        total.index_add_(0, place, gradients)
    return row_ids, total


def gather_over_ranks(
    row_ids: np.ndarray, gradients: Tensor, hosts: dist.ProcessGroup | None
) -> tuple[np.ndarray, Tensor]:
    """The average over all ranks, the same on each. Ranks touch different rows, so ids travel with the gradients: from
    host to host, where they are known, while accelerators are still at the backward pass.

    ``hosts``: a group of all ranks in which they can talk.
    """
    all_ids = ids_of_all_ranks(row_ids, hosts)
    longest = max(map(len, all_ids))
    if not longest:
        return row_ids, gradients
    padded = nn.functional.pad(gradients, (0, 0, 0, longest - len(gradients)))
    gathered = [torch.empty_like(padded) for _ in all_ids]
    dist.all_gather(gathered, padded)
    distinct, total = sum_by_row([(ids, part[: len(ids)]) for ids, part in zip(all_ids, gathered, strict=True)])
    return distinct, total.div_(len(all_ids))


def ids_of_all_ranks(row_ids: np.ndarray, group: dist.ProcessGroup | None) -> list[np.ndarray]:
    """``row_ids`` int64 ``[R]`` of every rank, in the order of ranks."""
    world_size = dist.get_world_size()
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size)]
    dist.all_gather(sizes, torch.tensor([len(row_ids)]), group=group)
    counts = [int(size) for size in sizes]
    mine = torch.from_numpy(row_ids)
    padded = nn.functional.pad(mine, (0, max(counts) - len(mine)))
    gathered = [torch.empty_like(padded) for _ in counts]
    if len(padded):
        dist.all_gather(gathered, padded, group=group)
    return [ids[:count].numpy() for ids, count in zip(gathered, counts, strict=True)]
