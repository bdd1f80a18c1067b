"""Hugging Face's trainer with the row optimizer, complete checkpoints and the metrics that users watch."""

from __future__ import annotations

import logging
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from scone.data.dataset import TrainingOrder
from scone.models.accounting import RunCost
from scone.models.learned_rows import LearnedRows
from scone.models.row_files import ROWS_FOLDER, append_rows, load_shares, save_shares
from scone.models.trunk import draw_if_zero
from scone.training.distributed import (
    clip_sharded_gradients,
    load_schedule,
    load_whole_optimizer,
    load_whole_weights,
    shard,
    whole_state,
    whole_weights,
)
from scone.training.library_habits import leaving_buffers, leaving_logits, own_names, sequences_are_whole, uncompiled
from scone.training.optimizer import PER_ROW, AdamWWithRows, learned_rows
from scone.training.run_folder import COMPLETE_MARKER, complete_checkpoints
from scone.utils.errors import SconeError, library_refusal
from scone.utils.files import give_umask_mode, read_json, write_json

logger = logging.getLogger(__name__)


def trunk_matrices(model: nn.Module) -> set[nn.Parameter]:
    """The parameters that Muon trains: the trunk's matrices between token embeddings and head."""
    trunk: Any = getattr(model, "trunk", model)
    outer = [layer.weight for layer in (trunk.get_input_embeddings(), trunk.get_output_embeddings()) if layer]
    embeddings = {module.weight for module in trunk.modules() if isinstance(module, nn.Embedding)}
    return {parameter for parameter in trunk.parameters() if parameter.ndim == 2} - embeddings - set(outer)


class SconeTrainer(Trainer):
    """Trains a SCONE model, an over-encoding one or a plain trunk.

    Weight decay acts on matrices. Three groups may have their own learning rate: the trunk, the f-gram model with its
    gain, and the learned rows. ``muon`` has Muon train the trunk's matrices. ``fsdp`` ("none", "full_shard",
    "shard_grad_op") shards the model over the processes; ``checkpoints_kept`` None keeps all; ``facts`` are noted in
    each (see `check_resume`). ``train`` raises TrainedAlready where nothing is left to do, all of it loaded.
    """

    def __init__(
        self,
        *args: Any,
        fsdp: str = "none",
        muon: bool = False,
        checkpoints_kept: int | None = None,
        facts: Mapping[str, str] | None = None,
        f_gram_learning_rate: float | None,
        rows_learning_rate: float,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.f_gram_learning_rate = f_gram_learning_rate
        self.rows_learning_rate = rows_learning_rate
        self.muon = muon
        assert self.model is not None
        self.rows = learned_rows(self.model)
        self.run_cost = RunCost(self.model)
        self.stop = StopOnSignal()
        self.add_callback(self.stop)
        self.add_callback(CourseOfTheRun(self, checkpoints_kept, facts or {}))
        if self.accelerator.ddp_handler is not None:  # gradients are reduced where they are, and not copied for it
            self.accelerator.ddp_handler.gradient_as_bucket_view = True
            self.accelerator.prepare_model = partial(leaving_buffers, self.accelerator.prepare_model)
        if self.is_fsdp_enabled:
            raise SconeError(
                "found FSDP in the launcher's configuration; expected the option --fsdp full_shard, which knows what "
                "of the model is shared out; leave FSDP out of the launcher's configuration"
            )
        self.sharded = fsdp != "none" and self.args.world_size > 1
        if fsdp != "none" and not self.sharded:
            logger.warning("fsdp=%s ignored: running in a single process", fsdp)
        if self.sharded:
            shard(self.model, reshard_after_forward=fsdp == "full_shard")
            # the model reduces its own gradients now: prepare it (device, precision) as one that is not wrapped
            self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)
        self.accelerator.prepare_model = partial(leaving_logits, self.accelerator, self.accelerator.prepare_model)
        self._logged, self._logged_at = self.run_cost.state_dict(), time.perf_counter()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            assert model is not None
            groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
            matrices = trunk_matrices(model) if self.muon else set()
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    rate = self.args.learning_rate
                    if "f_gram_embedding." in name and self.f_gram_learning_rate is not None:
                        rate = self.f_gram_learning_rate
                    decay = self.args.weight_decay if parameter.ndim >= 2 else 0.0
                    groups.setdefault((rate, decay, parameter in matrices), []).append(parameter)
            scaler = self.accelerator.scaler
            self.optimizer = AdamWWithRows(
                [
                    {"params": params, "lr": rate, "weight_decay": decay} | ({"muon": True} if muon else {})
                    for (rate, decay, muon), params in groups.items()
                ],
                rows=self.rows,
                rows_learning_rate=self.rows_learning_rate,
                gradient_scale=scaler.get_scale if scaler is not None else None,
                lr=self.args.learning_rate,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        is_new = self.lr_scheduler is None
        scheduler: Any = super().create_scheduler(num_training_steps, optimizer)
        if is_new and self.rows is not None:
            once_a_pass(scheduler, self.row_passes(num_training_steps))
        return scheduler

    def row_passes(self, max_steps: int) -> RowPasses:
        return RowPasses(max_steps, self._get_train_sampler().steps_per_epoch)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As Hugging Face's. Before and after it the learned rows are parameters that any other loop may train."""
        try:
            if self.rows is not None and self.optimizer is not None:  # trained before
                self.rows.collect_for(getattr(self.optimizer, "optimizer", self.optimizer))
            return super().train(*args, **kwargs)
        finally:
            if self.rows is not None:
                self.rows.release()

    def _get_train_sampler(self, train_dataset: Any = None) -> TrainingOrder:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        return TrainingOrder(
            len(dataset),
            seed=self.args.seed,
            batch_size=self._train_batch_size,
            processes=self.args.world_size,
            accumulation=self.args.gradient_accumulation_steps,
            steps_done=lambda: self.state.global_step,
            max_steps=self.args.max_steps,
            num_epochs=self.args.num_train_epochs,
        )

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if not self.sharded:
            return super()._clip_grad_norm(model)
        return clip_sharded_gradients(model.parameters(), self.args.max_grad_norm)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if model.training:
            self.run_cost.count(inputs)
        is_short = model.training and len(inputs["input_ids"]) < self._train_batch_size
        packed = "position_ids" in inputs
        with uncompiled() if is_short else nullcontext(), nullcontext() if packed else sequences_are_whole():
            return super().compute_loss(model, inputs, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As Hugging Face's. It and its callbacks leave torch's generators as they were: even a data loader without
        workers draws a seed, so that how often a run was evaluated would decide its dropout. Nor is their time part of
        the tokens a second that the run logs.
        """
        started = time.perf_counter()
        device = self.args.device
        devices = [] if device.type in ("cpu", "mps") else [device]  # `fork_rng` knows no generator of the latter
        with torch.random.fork_rng(devices, device_type=device.type):
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        self._logged_at += time.perf_counter() - started
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            if self.accelerator.scaler is None:  # fp16 leaves out steps that overflow
                self._check_finite(logs)
            now, before, at = self.run_cost.state_dict(), self._logged, time.perf_counter()
            positions = max(1, now["positions"] - before["positions"])
            logs["tokens_per_second"] = round(positions * self.args.world_size / (at - self._logged_at), 1)
            if now["nodes"]:
                logs["match_rate"] = round((now["matched"] - before["matched"]) / positions, 4)
                logs["nodes_per_position"] = round((sum(now["nodes"]) - sum(before["nodes"])) / positions, 4)
            self._logged, self._logged_at = now, at
        if "eval_loss" in logs:
            logs["eval_perplexity"] = round(math.exp(min(logs["eval_loss"], 700.0)), 4)
        super().log(logs, start_time)

    def _check_finite(self, logs: Mapping[str, float]) -> None:
        """Raises SconeError, on every rank, where loss or gradients are no numbers: from then on no weight is one."""
        step, found = self.state.global_step, {name: logs[name] for name in ("loss", "grad_norm") if name in logs}
        if all(map(math.isfinite, found.values())):
            return
        said = " and ".join(f"{name} {value}" for name, value in found.items())
        kept = complete_checkpoints(Path(str(self.args.output_dir)))
        raise SconeError(
            f"found {said} by step {step}; expected numbers; "
            + (f"the last checkpoint before it is {kept[-1]}: resume from it" if kept else "start again")
            + " with a lower learning rate or, if that is not it, another seed"
        )

    # A sharded run writes the checkpoints of any other, whole weights and a whole optimizer, so that each resumes the
    # other's, in any number of processes. Only learned rows that are shared out are written share by share, and a
    # finished model has them in their place among its weights.

    @property
    def _shared_rows(self) -> LearnedRows | None:
        return self.rows if self.rows is not None and self.rows.exchange is not None else None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        rows = self._shared_rows
        assert self.model is not None
        with own_names(self.model) if _internal_call else nullcontext():
            if not self.sharded and rows is None:
                super().save_model(output_dir, _internal_call)
                return
            state = whole_weights(self.model, keep=self.args.should_save)
            if self.args.should_save:
                self._save(output_dir, state_dict=state)
        if rows is not None and not _internal_call:  # else it is a checkpoint
            name = next(name for name, module in self.model.named_modules() if module is rows)
            append_rows(Path(output_dir or str(self.args.output_dir)), f"{name}.weight", rows)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            give_umask_mode(Path(output_dir or str(self.args.output_dir)), "*.safetensors")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        rows = self._shared_rows
        state = {} if rows is None else self.optimizer.state[rows.weight]
        shares = {name: state.pop(name) for name in PER_ROW.intersection(state)} if rows is not None else {}
        if not self.sharded:
            super()._save_optimizer_and_scheduler(output_dir)
        else:
            optimizer = whole_state(self.optimizer.state_dict(), keep=self.args.should_save)
            if self.args.should_save:
                torch.save(optimizer, Path(output_dir) / OPTIMIZER_NAME)
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)
        state.update(shares)
        if rows is not None:
            assert rows.exchange is not None
            rows.wait()
            shares["weight"] = rows.weight.detach()
            save_shares(Path(output_dir) / ROWS_FOLDER, shares, rows.shards, rows.exchange.hosts)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        with _loading(checkpoint):
            load_whole_optimizer(self.optimizer, Path(checkpoint) / OPTIMIZER_NAME)
            load_schedule(self.lr_scheduler, Path(checkpoint) / SCHEDULER_NAME)
            rows = self.rows
            if rows is not None and (Path(checkpoint) / ROWS_FOLDER).exists():
                state = self.optimizer.state[rows.weight]
                # a run that met no f-gram yet has no state of rows
                zeros = torch.zeros(len(rows.weight), device=rows.weight.device)
                shares = {name: zeros.clone() for name in PER_ROW if "columns" in state}
                state.update(shares)
                load_shares(Path(checkpoint) / ROWS_FOLDER, {"weight": rows.weight.detach()} | shares, rows.shards)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Of weights that are tied, or lie share by share; `check_resume` has refused all that is missing."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        marker = read_json(Path(resume_from_checkpoint) / COMPLETE_MARKER)
        if "cost" in marker:  # those of older versions have none
            self.run_cost.load_state_dict(marker["cost"])
            self._logged = self.run_cost.state_dict()
        with _loading(resume_from_checkpoint):
            if not self.sharded:
                super()._load_from_checkpoint(resume_from_checkpoint, model)
                draw_if_zero(self.accelerator.unwrap_model(self.model))
                return
            assert self.model is not None
            load_whole_weights(self.model, Path(resume_from_checkpoint))


def _loading(checkpoint: str) -> AbstractContextManager[None]:
    """Turn library errors about damaged or mismatched checkpoints into one line."""
    advice = "give the options that the run began with, or resume from another checkpoint"
    return library_refusal(f"cannot resume from {checkpoint}", advice)


class RowPasses:
    """The passes of a run of ``max_steps`` steps, of which ``steps_per_pass`` read all of the text once. Where they do
    not divide evenly, the first pass is the shorter one (`TrainingOrder`): rows that are kept have then read all of the
    text, and none of it twice.

    Rows start again with each pass: a row that has seen the tokens after its f-gram says them at the second reading;
    the trunk learns to believe it, and text that nobody has read gets worse. On the modern trunk, four passes over
    20.5 M tokens make four test texts 53 % worse than plain's; fewer f-grams, a tenth of the rate, or half of the
    matches dropped leave 2 to 8 %; rows that start again are 10 % better (docs/experiments/passes.md). Models of click
    rates know the same of sparse features, and mend it so (Fan et al., arXiv 2407.01607).
    """

    def __init__(self, max_steps: int, steps_per_pass: int) -> None:
        self.max_steps = max_steps
        self.steps_per_pass = steps_per_pass
        self.number = -(-max_steps // steps_per_pass)
        self.first = max_steps - (self.number - 1) * steps_per_pass

    def begins_at(self, step: int) -> bool:
        """Whether ``step`` is the first of a pass that is not the run's first."""
        return self.first <= step < self.max_steps and (step - self.first) % self.steps_per_pass == 0

    def in_the_run(self, step: int) -> float:
        """Where in the run a step would be that is as far on as ``step`` is in its pass."""
        if step >= self.max_steps:
            return self.max_steps
        done, length = step, self.first
        if step >= self.first:
            done, length = (step - self.first) % self.steps_per_pass, self.steps_per_pass
        return done * self.max_steps / length


def once_a_pass(scheduler: LambdaLR, passes: RowPasses) -> None:
    """Have the last group, the rows, go through the run's schedule once in every pass."""
    whole_run = scheduler.lr_lambdas[-1]
    if passes.number > 1:
        # a function: of any other object the state dictionary would want the attributes
        scheduler.lr_lambdas[-1] = lambda step: whole_run(passes.in_the_run(step))  # type: ignore[arg-type]


class TrainedAlready(Exception):
    """The checkpoint to resume from is that of the last step."""


class CourseOfTheRun(TrainerCallback):
    """What happens between a run's steps: rows start again with each pass, after a resume too; a checkpoint is marked
    as complete once all of it is on disk, and old ones are removed only after that.
    """

    def __init__(self, trainer: SconeTrainer, checkpoints_kept: int | None, facts: Mapping[str, str]) -> None:
        self.trainer, self.checkpoints_kept, self.facts = trainer, checkpoints_kept, dict(facts)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if 0 < state.max_steps <= state.global_step:  # resumed after its last step, it would take one more
            raise TrainedAlready
        self.trainer._logged_at = time.perf_counter()  # what was before, loading and all, trained no tokens
        if self.trainer.rows is not None and state.is_world_process_zero:
            passes = self.trainer.row_passes(state.max_steps)
            if passes.number > 1:
                times = passes.max_steps / passes.steps_per_pass
                logger.warning("the text is read %.3g times; the learned rows start again with each pass", times)

    @torch.no_grad()
    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        trainer = self.trainer
        if trainer.rows is not None and trainer.row_passes(state.max_steps).begins_at(state.global_step):
            own: Any = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # accelerate wraps it
            own.start_rows_again()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.trainer.rows is not None:
            self.trainer.rows.pending.clear()  # of an fp16 step that overflowed, and was skipped
        control.should_log |= control.should_save  # what is logged is looked at: no checkpoint of weights that are lost

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if dist.is_initialized():
            dist.barrier()  # every rank wrote a file of its own
        if not state.is_world_process_zero:
            return
        folder = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        cost = self.trainer.run_cost.state_dict()
        write_json(folder / COMPLETE_MARKER, {"step": state.global_step, "cost": cost} | self.facts)
        if self.checkpoints_kept is not None:
            for old in complete_checkpoints(folder.parent)[: -self.checkpoints_kept]:
                shutil.rmtree(old)


class StopOnSignal(TrainerCallback):
    """Ctrl-C, and SIGTERM on machines that are taken back: finish the step, save a checkpoint, stop.

    A second signal ends the process at once. For one process only: ranks would stop at different steps.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Callable[..., Any] | int | None] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if args.world_size == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, handler)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.received is not None:
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._restore()
