"""AdamW for everything dense, and Adam on touched rows only for the learned rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

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
        if rows is not None:
            self.add_param_group({"params": [rows.weight], "lr": rows_learning_rate, "weight_decay": 0.0})

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step. Under ``torch.distributed`` the rows' gradients are averaged over the ranks first."""
        loss = super().step(closure)
        if self.rows is not None:
            scale = self.gradient_scale() if self.gradient_scale is not None else 1.0
            row_ids, gradients = gather_over_ranks(*pending_gradients(self.rows))
            self.rows.pending.clear()  # trainers zero the model's gradients, not the optimizer's
            if len(row_ids):
                device = self.rows.weight.device
                self._update_rows(row_ids.to(device), gradients.div_(scale).to(device))
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        if self.rows is not None:
            self.rows.pending.clear()

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


def pending_gradients(rows: LearnedRows) -> tuple[Tensor, Tensor]:
    """Distinct row ids ``[R]`` and their summed gradients ``[R, D]`` of the passes since the last step."""
    touched = [(ids, leaf.grad) for ids, leaf in rows.pending if leaf.grad is not None]
    if len(touched) == 1:
        return touched[0]  # the rows of one pass are distinct
    return sum_by_row(
        torch.cat([ids for ids, _ in touched]) if touched else rows.weight.new_zeros(0, dtype=torch.int64),
        torch.cat([gradient for _, gradient in touched]) if touched else rows.weight.new_zeros(0, rows.weight.shape[1]),
    )


def sum_by_row(row_ids: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the gradients of equal row ids, so that each row is updated once."""
    distinct, inverse = torch.unique(row_ids, return_inverse=True)
    summed = gradients.new_zeros(len(distinct), gradients.shape[1])
    return distinct, summed.index_add_(0, inverse.to(gradients.device), gradients)


def gather_over_ranks(row_ids: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    """The average over all ranks, the same on each: ranks touch different rows, so ids travel with the gradients."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return row_ids, gradients
    world_size = dist.get_world_size()
    row_ids = row_ids.to(gradients.device)  # rows on the host: their gradients are where the ranks can talk
    sizes = [torch.zeros(1, dtype=torch.int64, device=row_ids.device) for _ in range(world_size)]
    dist.all_gather(sizes, torch.tensor([len(row_ids)], device=row_ids.device))
    longest = int(max(size.item() for size in sizes))
    padded_ids = nn.functional.pad(row_ids, (0, longest - len(row_ids)))
    padded_gradients = nn.functional.pad(gradients, (0, 0, 0, longest - len(gradients)))
    all_ids = [torch.empty_like(padded_ids) for _ in range(world_size)]
    all_gradients = [torch.empty_like(padded_gradients) for _ in range(world_size)]
    dist.all_gather(all_ids, padded_ids)
    dist.all_gather(all_gradients, padded_gradients)
    counts = [int(size.item()) for size in sizes]
    ids = torch.cat([part[:count] for part, count in zip(all_ids, counts, strict=True)])
    summed = torch.cat([part[:count] for part, count in zip(all_gradients, counts, strict=True)])
    return sum_by_row(ids, summed.div_(world_size))
