"""Row-RMS for the learned rows, and AdamW, with or without Muon for matrices, for everything dense beside it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from scone.kernels.common import to_device
from scone.kernels.row_rms import rounding_key, update_rows
from scone.models.learned_rows import LearnedRows, Pass, RowShards, group_of_hosts, number_of_ranks, sum_parts
from scone.training.distributed import local
from scone.training.muon import muon_step
from scone.utils.errors import SconeError

logger = logging.getLogger(__name__)

PRIOR_VISITS = 4.0
"""How many visits the mean row counts for in a row's second moment."""
MEMORY = 0.99
"""Decay of the columns' second moments and of the mean row's, per step."""
PER_ROW = {"sums", "visits"}
"""What of the optimizer's state has a number for each row."""


class _StepsRows:
    """What the optimizers below share: a step of the rows whose gradients `LearnedRows` collects for them."""

    rows: LearnedRows | None
    _hosts: dist.ProcessGroup | None = None

    def _take_rows(self, rows: LearnedRows | None) -> None:
        self.rows = rows
        if rows is not None:
            rows.collect_for(self)

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)  # type: ignore[misc]
        if self.rows is not None:
            self.rows.pending.clear()

    @torch.no_grad()
    def _step_rows(self, scale: float | None) -> None:
        """Apply what is pending. Under ``torch.distributed`` it is averaged over the ranks first: of rows that are
        shared out, each owner gets what concerns it; of others, each rank gets all.

        ``scale``: by what the loss was multiplied (fp16); gradients that overflowed then are dropped.
        """
        rows, world_size = self.rows, number_of_ranks()
        assert rows is not None
        passes = list(rows.pending)
        rows.pending.clear()  # trainers zero the model's gradients, not the optimizer's
        row_ids, gradients = sum_of(passes, rows)
        if rows.exchange is not None:
            # where every rank made one pass, on the route that its rows came on
            is_one = rows.exchange.all_agree(len(passes) == 1)
            route = passes[0].route if is_one else rows.exchange.route(row_ids)
            assert route is not None, "of rows that are shared out"
            in_all = route.in_all
            if in_all:
                row_ids, gradients = route.give_back(gradients)
        else:
            if world_size > 1:
                self._hosts = self._hosts or group_of_hosts()
                row_ids, gradients = gather_over_ranks(row_ids, gradients, self._hosts)
            in_all = len(row_ids)
        if not in_all:
            return
        gradients = gradients.float().div_(world_size * (1.0 if scale is None else scale))
        figures = _of_columns(row_ids, gradients, world_size, rows.exchange is not None)
        if scale is not None and not figures.isfinite().all():
            return
        device = gradients.device if rows.are_pinned_for(gradients.device) else rows.weight.device
        update_with_rms(
            *(rows.weight, to_device(torch.from_numpy(row_ids), device), gradients.to(device)),
            self.param_groups[-1]["lr"],  # type: ignore[attr-defined]
            self.state[rows.weight],  # type: ignore[attr-defined]
            (figures[:-1] / figures[-1]).to(device),
            rows.shards,
        )

    def start_rows_again(self) -> None:
        """Put the rows, and what is known of each, back to their start: wherever a text is read from the beginning
        again (`trainer.RowPasses` says why). What is known of the columns stays.
        """
        assert self.rows is not None
        self.rows.pending.clear()
        with torch.no_grad():
            self.rows.reset()
        state = self.state[self.rows.weight]  # type: ignore[attr-defined]
        for name in PER_ROW.intersection(state):
            state[name].zero_()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As any optimizer's; of the state of all rows, rows that are shared out take what concerns theirs."""
        super().load_state_dict(state_dict)  # type: ignore[misc]
        if self.rows is not None:
            state = self.state[self.rows.weight]  # type: ignore[attr-defined]
            its_number = state_dict["param_groups"][-1]["params"][-1]
            for name, value in state_dict["state"].get(its_number, {}).items():
                if name in state and name != "step":  # PyTorch makes it a parameter's type, which may be bf16
                    own = name in PER_ROW and len(value) == self.rows.num_rows
                    value = self.rows.shards.own(value).contiguous() if own else value
                    state[name] = value.to(self.rows.weight.device)


def _of_columns(row_ids: np.ndarray, gradients: Tensor, world_size: int, are_own: bool) -> Tensor:
    """Sums of squares over the columns of all rows' gradients, and the number of rows, ``[D + 1]``, alike on all ranks.

    They are added owner by owner, so that rows that are shared out (``are_own``: these are this rank's) and rows that
    every rank has a copy of give the same bits.
    """

    def of(part: Tensor) -> Tensor:
        return torch.cat([part.square().sum(0), part.new_full((1,), len(part))])

    if are_own:
        mine = of(gradients)
        parts = [torch.empty_like(mine) for _ in range(world_size)]
        dist.all_gather(parts, mine)
    elif world_size > 1:
        owned = [np.flatnonzero(row_ids % world_size == owner) for owner in range(world_size)]
        parts = [of(gradients[to_device(torch.from_numpy(places), gradients.device)]) for places in owned]
    else:
        return of(gradients)
    return torch.stack(parts).cumsum(0)[-1]


class RowOptimizer(_StepsRows, torch.optim.Optimizer):
    """Row-RMS (`update_with_rms`) for the learned rows of a model, beside any optimizer for the rest, in any loop.

    While it lives, a step costs the rows that it touches and not the R that there are. Call its ``step`` and
    ``zero_grad`` wherever the other optimizer's are called. Schedulers, state dictionaries, gradient accumulation and
    ``torch.amp.GradScaler`` work as with any optimizer; ranks of ``torch.distributed`` are averaged in ``step``. The
    rows have no part in gradient clipping: their update does not depend on the gradient's scale.

    Without it, rows get dense gradients and any optimizer trains them.

    Args:
        model: a model with learned rows, which may be wrapped. Make it before ``DistributedDataParallel`` wraps the
            model, which is then told to leave the rows alone.
        lr: the root mean square of a mean row's step; `rows_learning_rate` of the training tokens is a good one.

    Raises:
        SconeError: the model has no learned rows.
    """

    _step_supports_amp_scaling = True  # GradScaler leaves it to us to unscale what is not in ``grad``

    def __init__(self, model: nn.Module, lr: float = 1e-3) -> None:
        rows = learned_rows(model)
        if rows is None:
            raise SconeError(
                "found a model without learned rows; expected one with them; leave the row optimizer out, "
                "or build the model with learned_rows"
            )
        super().__init__([rows.weight], {"lr": lr})
        self._take_rows(rows)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        assert self.rows is not None
        scale = getattr(self, "grad_scale", None)  # a GradScaler sets it for the time of a step
        self._step_rows(None if scale is None else float(scale))
        return loss


class AdamWWithRows(_StepsRows, torch.optim.AdamW):
    """AdamW for everything dense and `RowOptimizer` for the rows in one: one schedule, one state dictionary.

    The rows' weight is the last parameter group; it has no weight decay, which took nothing off the loss. Groups that
    say ``"muon": True`` are matrices that Muon trains (`muon_step`).

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
        every = self.param_groups
        self.param_groups = [group for group in every if not group.get("muon")]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = every
        for group in every:
            if group.get("muon"):
                muon_step(group, self.state)
                for parameter in group["params"]:  # AdamW asks every parameter's state for it when it is loaded
                    self.state[parameter].setdefault("step", torch.zeros(()))
        if self.rows is not None:
            self._step_rows(self.gradient_scale() if self.gradient_scale is not None else None)
        return loss

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        """Of sharded parameters AdamW updates what is here: an update is element by element, and each of the 1,500
        operators that it takes on the DTensors of 12 layers costs the host 50 µs.
        """
        has_complex: bool = super()._init_group(group, *lists)  # type: ignore[no-untyped-call]
        for tensors in lists:
            tensors[:] = map(local, tensors)
        return has_complex


@torch.no_grad()
def update_with_rms(
    weight: Tensor,
    row_ids: Tensor,
    gradients: Tensor,
    learning_rate: float,
    state: dict[str, Any],
    now: Tensor | None = None,
    shards: RowShards = RowShards(0),  # noqa: B008
) -> None:
    """One row-RMS step of the rows ``row_ids`` int64 [r], distinct, of ``weight`` [R, D] by ``gradients`` [r, D].

    A row moves by its gradient over the root of second moments that are factored as in Adafactor (Shazeer and Stern,
    2018): one number a column, a moving average over steps, times one number a row, the mean over the visits that the
    row has had. ``PRIOR_VISITS`` of a mean row count as visits too, so that a row's first gradient is not divided by
    itself. There is no momentum. Only these rows are read and written; ``state`` is made when it is empty and takes 8
    bytes a row, where the gradients are (``weight`` is there too, or in pinned memory). ``now`` [D]: mean squares of
    the step's gradients, where other processes have rows too.

    Rows in bfloat16 are computed in fp32 and rounded up or down at random: rounded to the nearest, a step below 1/512
    of a number would leave it as it is for ever. The noise is a hash of step, row and column, so a resumed run, and a
    row that another process owns (``shards``: which of all rows these are), have the same.
    """
    device = gradients.device
    if "sums" not in state:
        if state:
            logger.warning("the learned rows were trained with Adam before; their row-RMS starts anew")
            state.clear()
        state["step"] = torch.zeros(())
        state["sums"] = torch.zeros(len(weight), device=device)
        state["visits"] = torch.zeros(len(weight), device=device)  # loading would make integers floats too
        state["columns"] = torch.ones(weight.shape[1], device=device)
        state["mean"] = torch.zeros(1, device=device)
    state.update({name: state[name].to(device) for name in ("sums", "visits", "columns", "mean")})  # may be loaded
    state["step"] += 1
    fresh = 1 - min(MEMORY, 1 - 1 / state["step"].item())  # the first steps average all there were
    columns, mean, sums, visits = state["columns"], state["mean"], state["sums"], state["visits"]
    gradients = gradients.float()
    now = gradients.square().mean(0) if now is None else now
    columns.lerp_((now / now.mean().clamp_min(1e-30)), fresh).clamp_min_(1e-8)
    mean.lerp_((now / columns).mean(), fresh)
    update_rows(
        *(weight.detach(), sums, visits, row_ids, gradients.contiguous(), columns, mean),
        prior=PRIOR_VISITS,
        learning_rate=learning_rate,
        key=rounding_key(int(state["step"])),
        stride=shards.world_size,
        first=shards.rank,
    )


def rows_learning_rate(tokens_of_a_pass: int) -> float:
    """The rate that suits row-RMS for so many training tokens, each read once: 2e-3 · √(82 M / tokens), between 5e-4
    and 1e-2.

    A row's path is a sum of steps of one size, so its noise grows with the root of its visits; fewer tokens allow
    longer steps. Measured on the modern trunk: at 4 M tokens 1e-2 is best (1e-3: half the gain; 3e-3 and 3e-2: 2 to 3 %
    worse), at 20 M 4e-3 (1e-2: 1 % worse), at 82 M 2e-3 and 4e-3 (1e-2: 1 to 2 % worse); docs/experiments/recipe.md.
    """
    return min(max(2e-3 * (82e6 / max(tokens_of_a_pass, 1)) ** 0.5, 5e-4), 1e-2)


def learned_rows(model: nn.Module) -> LearnedRows | None:
    """The ``LearnedRows`` of a model that may be wrapped, or None.

    Adapters (PEFT's ``modules_to_save``) keep the frozen original beside the one that trains: then the latter.
    """
    found = [module for module in model.modules() if isinstance(module, LearnedRows)]
    return next((rows for rows in found if rows.weight.requires_grad), found[0] if found else None)


def sum_of(passes: Sequence[Pass], rows: LearnedRows) -> tuple[np.ndarray, Tensor]:
    """Distinct row ids int64 ``[r]`` of ``passes`` and their summed gradients ``[r, D]``."""
    if not passes:
        return np.empty(0, np.int64), rows.weight.detach().new_zeros(0, rows.weight.shape[1])
    return sum_by_row([(each.row_ids, each.gradients) for each in passes])


def sum_by_row(parts: Sequence[tuple[np.ndarray, Tensor]]) -> tuple[np.ndarray, Tensor]:
    """Distinct row ids and the sums of their gradients ``[r, D]`` over ``parts``, each of which has distinct ids.

    The ids are on the host, so it needs no answer from an accelerator.
    """
    if len(parts) == 1:
        return parts[0]
    row_ids, inverse = np.unique(np.concatenate([ids for ids, _ in parts]), return_inverse=True)
    places = np.split(inverse.reshape(-1), np.cumsum([len(ids) for ids, _ in parts])[:-1])
    return row_ids, sum_parts(len(row_ids), places, [gradients for _, gradients in parts])


def gather_over_ranks(
    row_ids: np.ndarray, gradients: Tensor, hosts: dist.ProcessGroup | None
) -> tuple[np.ndarray, Tensor]:
    """The sum over all ranks, the same on each. Ranks touch different rows, so ids travel with the gradients: from
    host to host, where they are known, while accelerators are still at the backward pass.

    ``hosts``: a group of all ranks in which they can talk.
    """
    all_ids: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(all_ids, row_ids, group=hosts)
    longest = max(map(len, all_ids))
    if not longest:
        return row_ids, gradients
    padded = nn.functional.pad(gradients, (0, 0, 0, longest - len(gradients)))
    gathered = [torch.empty_like(padded) for _ in all_ids]
    dist.all_gather(gathered, padded)
    return sum_by_row([(ids, part[: len(ids)]) for ids, part in zip(all_ids, gathered, strict=True)])
