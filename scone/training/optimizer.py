"""Adam on touched rows only, for the learned rows, and AdamW for everything dense with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from scone.kernels.row_adam import update_rows
from scone.kernels.transfer import to_device
from scone.models.learned_rows import LearnedRows, untouched_zeros
from scone.utils.errors import SconeError


class _StepsRows:
    """What the optimizers below share: a step of the rows whose gradients `LearnedRows` collects for them."""

    rows: LearnedRows | None
    _hosts: dist.ProcessGroup | None = None

    def _take_rows(self, rows: LearnedRows | None) -> None:
        self.rows = rows
        if rows is not None:
            rows.collect_for(self)

    @torch.no_grad()
    def _step_rows(self, group: dict[str, Any], state: dict[str, Any], scale: float | None) -> None:
        """Apply what is pending. Under ``torch.distributed`` it is averaged over the ranks first.

        ``scale``: by what the loss was multiplied (fp16); gradients that overflowed then are dropped.
        """
        assert self.rows is not None
        row_ids, gradients = pending_gradients(self.rows)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            row_ids, gradients = gather_over_ranks(row_ids, gradients, self._group_of_hosts())
        self.rows.pending.clear()  # trainers zero the model's gradients, not the optimizer's
        if not len(row_ids) or (scale is not None and not gradients.isfinite().all()):
            return
        weight = self.rows.weight
        gradients = gradients.div_(1.0 if scale is None else scale).to(weight.device)
        update_with_adam(weight, to_device(torch.from_numpy(row_ids), weight.device), gradients, group, state)

    def _group_of_hosts(self) -> dist.ProcessGroup | None:
        """Where hosts talk to each other; made by all ranks at their first step. None: the default group."""
        if self._hosts is None and dist.get_backend() != "gloo":
            self._hosts = dist.new_group(backend="gloo")
        return self._hosts


class RowOptimizer(_StepsRows, torch.optim.Optimizer):
    """Adam for the learned rows of a model, beside any optimizer for the rest of it, in a training loop of one's own.

    While it lives, a step costs the rows that it touches and not the R that there are. Call its ``step`` and
    ``zero_grad`` wherever the other optimizer's are called. Schedulers, state dictionaries, gradient accumulation and
    ``torch.amp.GradScaler`` work as with any optimizer; ranks of ``torch.distributed`` are averaged in ``step``. The
    rows have no part in gradient clipping: Adam's update does not depend on the gradient's scale.

    Without it, rows get dense gradients and any optimizer trains them.

    Args:
        model: a model with learned rows, which may be wrapped. Make it before ``DistributedDataParallel`` wraps the
            model, which is then told to leave the rows alone.
        lr, betas, eps: as Adam's.

    Raises:
        SconeError: the model has no learned rows.
    """

    _step_supports_amp_scaling = True  # GradScaler leaves it to us to unscale what is not in ``grad``

    def __init__(
        self, model: nn.Module, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        rows = learned_rows(model)
        if rows is None:
            raise SconeError(
                "found a model without learned rows; expected one with them; leave the row optimizer out, "
                "or build the model with learned_rows"
            )
        super().__init__([rows.weight], {"lr": lr, "betas": betas, "eps": eps})
        self._take_rows(rows)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        assert self.rows is not None
        scale = getattr(self, "grad_scale", None)  # a GradScaler sets it for the time of a step
        group, state = self.param_groups[0], self.state[self.rows.weight]
        self._step_rows(group, state, None if scale is None else float(scale))
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        assert self.rows is not None
        self.rows.pending.clear()


class AdamWWithRows(_StepsRows, torch.optim.AdamW):
    """AdamW for everything dense and `RowOptimizer` for the rows in one: one schedule, one state dictionary.

    The rows' weight is the last parameter group. As in ``torch.optim.SparseAdam``, the moments of a row move only when
    it is touched and the bias correction counts all steps; there is no weight decay, since a row that stays at zero is
    a row that was never needed.

    Args:
        groups: AdamW parameter groups, each with a list of parameters; may be none where there are rows. The rows'
            weight is left out of them.
        rows: the learned rows, or None.
        rows_learning_rate: theirs; schedulers scale it like any other group's.
        gradient_scale: the factor by which the loss was multiplied before ``backward`` (fp16), read at each step;
            None: by nothing.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        rows: LearnedRows | None = None,
        rows_learning_rate: float = 1e-3,
        gradient_scale: Callable[[], float | None] | None = None,
        **adamw: Any,
    ) -> None:
        groups = [
            group | {"params": [p for p in group["params"] if rows is None or p is not rows.weight]} for group in groups
        ]
        # nothing dense where rows are all there is to train: AdamW wants one group even so
        super().__init__([group for group in groups if group["params"]] or [{"params": []}], **adamw)
        self.gradient_scale = gradient_scale
        if rows is not None:
            self.add_param_group({"params": [rows.weight], "lr": rows_learning_rate, "weight_decay": 0.0})
        self._take_rows(rows)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = super().step(closure)
        if self.rows is not None:
            scale = self.gradient_scale() if self.gradient_scale is not None else None
            self._step_rows(self.param_groups[-1], self.state[self.rows.weight], scale)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        if self.rows is not None:
            self.rows.pending.clear()


@torch.no_grad()
def update_with_adam(
    weight: Tensor, row_ids: Tensor, gradients: Tensor, group: dict[str, Any], state: dict[str, Any]
) -> None:
    """One Adam step of the rows ``row_ids`` int64 [r], distinct, of ``weight`` [R, D] by ``gradients`` [r, D].

    Only these rows are read and written, moments included. ``group`` has the rates; ``state`` is made when it is empty.
    """
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
            weight.detach().numpy(),
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
    square = state["exp_avg_sq"].index_select(0, row_ids).mul_(beta2).addcmul_(gradients, gradients, value=1 - beta2)
    state["exp_avg"].index_copy_(0, row_ids, average)
    state["exp_avg_sq"].index_copy_(0, row_ids, square)
    denominator = square.sqrt_().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
    update = average.div_(denominator).mul_(-group["lr"] / (1 - beta1**step))
    weight.index_add_(0, row_ids, update)


def learned_rows(model: nn.Module) -> LearnedRows | None:
    """The ``LearnedRows`` of a model that may be wrapped, or None.

    Adapters (PEFT's ``modules_to_save``) keep the frozen original beside the one that trains: then the latter.
    """
    found = [module for module in model.modules() if isinstance(module, LearnedRows)]
    return next((rows for rows in found if rows.weight.requires_grad), found[0] if found else None)


def pending_gradients(rows: LearnedRows) -> tuple[np.ndarray, Tensor]:
    """Distinct row ids int64 ``[R]`` and their summed gradients ``[R, D]`` of the passes since the last step."""
    if not rows.pending:
        return np.empty(0, np.int64), rows.weight.detach().new_zeros(0, rows.weight.shape[1])
    return sum_by_row(rows.pending)


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
