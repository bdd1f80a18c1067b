"""Runs of several processes: their group, sharding (FSDP) with checkpoints that any number resumes, compilation."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from scone.models.embedded_trunk import EmbeddedTrunk
from scone.models.language_model import SconeForCausalLM
from scone.models.learned_rows import LearnedRows
from scone.utils.command_line import one_line
from scone.utils.errors import SconeError
from scone.utils.files import read_json


def shard(model: nn.Module, reshard_after_forward: bool) -> None:
    """Shard the parameters of ``model`` over all processes, in place.

    The layers that the model names as units are gathered when they compute and, with ``reshard_after_forward``, given
    back at once; without it they stay until the backward pass, as all else does, which it begins with. The learned
    rows are left alone: they are shared out in their own way (`LearnedRows.share_out`).
    """
    device = next(model.parameters()).device
    options: dict[str, Any] = {"mesh": init_device_mesh(device.type, (dist.get_world_size(),))}
    rows = {module.weight for module in model.modules() if isinstance(module, LearnedRows)}
    if rows:
        options["ignored_params"] = rows
    units = set(getattr(model, "_no_split_modules", None) or ())
    for module in model.modules():
        if type(module).__name__ in units:
            fully_shard(module, reshard_after_forward=reshard_after_forward, **options)
    fully_shard(model, reshard_after_forward=False, **options)


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def clip_sharded_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """As ``torch.nn.utils.clip_grad_norm_`` of sharded parameters, by one operation for all of this process's shards.

    Operators of DTensors cost the host some 50 µs each; one by one they take longer than a GPU needs for the step.
    """
    parameters = list(parameters)
    shards = [part for each in parameters if each.grad is not None and (part := local(each.grad)).numel()]
    square = local(parameters[0]).new_zeros((), dtype=torch.float32)  # of a frozen trunk there are none
    if shards:
        square = torch.stack(torch._foreach_norm(shards)).float().square().sum()
    dist.all_reduce(square)
    norm = square.sqrt()
    if shards:
        torch._foreach_mul_(shards, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def whole_state(state: Any, keep: bool) -> Any:
    """``state`` with every sharded tensor gathered, on the host. Every rank has to call it.

    Ranks that do not ``keep`` it get None in place of tensors.
    """
    if isinstance(state, dict):
        return {name: whole_state(value, keep) for name, value in state.items()}
    if isinstance(state, list):
        return [whole_state(value, keep) for value in state]
    if not isinstance(state, Tensor):
        return state
    whole = state.full_tensor() if isinstance(state, DTensor) else state
    return whole.cpu() if keep else None


def whole_weights(model: nn.Module, keep: bool) -> dict[str, Any]:
    """The model's state dictionary, gathered as by ``whole_state``; tied weights are in it once."""
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    repeated = every - {name for name, _ in model.named_parameters()}
    return whole_state({name: value for name, value in model.state_dict().items() if name not in repeated}, keep)


def load_whole_weights(model: nn.Module, folder: Path) -> None:
    """Load whole weights (safetensors) into a sharded model, of one file or of an index; tied ones are there once.

    File by file, and of each tensor a process keeps its shard; torch's `set_model_state_dict` wants all at once, and
    all parameters on one device.
    """
    if (folder / SAFE_WEIGHTS_NAME).exists():
        files = {SAFE_WEIGHTS_NAME}
    else:
        files = set(read_json(folder / SAFE_WEIGHTS_INDEX_NAME)["weight_map"].values())
    cut = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, DTensor)}
    for file in sorted(files):
        part: dict[str, Tensor] = {}
        with safe_open(folder / file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (no mapping)
                part[name] = opened.get_tensor(name)
                if name in cut:
                    ours, whole = cut[name], part[name].to(cut[name].device)
                    part[name] = distribute_tensor(whole, ours.device_mesh, ours.placements, src_data_rank=None)
        model.load_state_dict(part, strict=False)


def load_whole_optimizer(optimizer: torch.optim.Optimizer, file: Path) -> None:
    """Load a whole optimizer's state into one of sharded parameters: each moment is cut as its parameter is.

    Rates, decay and the like stay those that this run was given: the file's would take their place without a word.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, moments in saved["state"].items():
        parameter = parameters[index]
        if isinstance(parameter, DTensor):
            for name, value in moments.items():
                if value.shape == parameter.shape:
                    whole = value.to(parameter.device)
                    moments[name] = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
    given = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    for group, settings in zip(optimizer.param_groups, given, strict=True):
        group.update(settings)


def load_schedule(scheduler: LambdaLR, file: Path) -> None:
    """How far a schedule had come; its rates are those of this run, and the optimizer's groups get them."""
    saved = torch.load(file, weights_only=True)
    rates = [
        rate * part(saved["last_epoch"]) for rate, part in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    scheduler.load_state_dict(saved | {"base_lrs": scheduler.base_lrs, "_last_lr": rates})
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


_GLOO_SAYS = ("gloo", "Connection closed by peer", "Connection reset by peer", "Socket Timeout")


def reinit_process_group(backend: str | None) -> None:
    """Reinitialise the process group after torchrun restarted the processes.

    Its store lives on through a restart (torch 2.13), with the addresses of the killed processes in it, and whoever
    comes first would read those: each restart gets names of its own. ``backend`` as for ``init_process_group``.
    """
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restarts == "0" or dist.is_initialized():
        return
    store, rank, world_size = next(rendezvous("env://"))
    store = dist.PrefixStore(f"restart {restarts}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)


def destroy_process_group() -> None:
    """Destroy the process group, if there is one, at the end of the program, when no model is held any more.

    What is left of a group of gloo's can abort a process that exits (pytorch issue 190489), and its launcher then ends
    the others, who may still be saving. A sharded model holds the group, and is held by cycles of the trainer's.
    """
    if dist.is_available() and dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


@contextmanager
def report_lost_ranks() -> Iterator[None]:
    """Raise SconeError instead of the communication library's error when another rank is lost."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            raise SconeError(
                f"a process that prepares batches ended or was killed ({one_line(str(error))[:120]}), most often for "
                "want of memory; expected it to live; give a lower --num_workers, and go on with "
                "--resume_from_checkpoint"
            ) from error
        if not is_lost_rank(error):
            raise
        raise SconeError(
            "lost the connection to another process of this run, which ended or was killed (its own message is above "
            "or in its log); expected all of them; start again with --resume_from_checkpoint to go on from the last "
            "checkpoint (torchrun --max_restarts N does so by itself)"
        ) from error


def is_lost_rank(error: RuntimeError) -> bool:
    """Whether a communication library failed, and not the computation."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return False
    return isinstance(error, dist.DistError) or any(words in str(error) for words in _GLOO_SAYS)


def compile_for_training(
    model: PreTrainedModel, *, dynamic: bool | None = None, backend: str | Callable[..., Any] = "inductor"
) -> None:
    """Compile a plain trunk as a whole; for our models compile trunk, loss and f-gram model separately.

    Between them the host reads node ids, which a graph cannot hold. The loss must not stay outside: uncompiled, the
    copies of the logits in fp32 took an eighth of a step at a vocabulary of 50,257 (width 1,024 × 6 layers, one H200).

    Args:
        dynamic: whether batch sizes may change, as for ``torch.compile``. The f-gram model's always do.
        backend: ``torch.compile``'s.
    """
    options: dict[str, Any] = {"dynamic": dynamic, "backend": backend}
    if not isinstance(model, EmbeddedTrunk):
        model.compile(**options)
        return
    model.trunk.compile(**options)
    model.loss_function = torch.compile(model.loss_function, **options)
    embedding = model.f_gram_embedding if isinstance(model, SconeForCausalLM) else None
    if embedding is not None and embedding.f_gram_model is not None:
        embedding.f_gram_model.compile(dynamic=True, backend=backend)
