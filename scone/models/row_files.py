"""Files of learned rows that are shared out: a checkpoint share by share, and a finished model's weights.

No process ever holds all rows. Each rank writes its share to a safetensors file, ``2-of-4.safetensors``, say, and any
number of processes reads them. ``torch.distributed.checkpoint`` would do as well, were its metadata no pickle.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from scone.models.learned_rows import LearnedRows, RowShards
from scone.utils.files import atomic_path, read_json, write_json

ROWS_FOLDER = "rows"
"""Of a checkpoint."""
BLOCK_ROWS = 1 << 15
_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def save_shares(
    folder: Path, tensors: Mapping[str, Tensor], shards: RowShards, hosts: dist.ProcessGroup | None
) -> None:
    """Write this rank's share of ``tensors`` ``[r, …]``; all ranks have to, and where one fails, all fail.

    Raises OSError, with the number of the failure of the first rank that failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{shards.rank + 1}-of-{shards.world_size}.safetensors"
    entries = {name: (share.dtype, tuple(share.shape)) for name, share in tensors.items()}
    blocks = (block.cpu() for share in tensors.values() for block in share.split(BLOCK_ROWS))
    code = 0
    try:
        _write(path, None, entries, blocks)
    except OSError as error:
        code = error.errno or -1
    codes = [torch.zeros(1, dtype=torch.int64) for _ in range(shards.world_size)]
    dist.all_gather(codes, torch.tensor([code]), group=hosts)
    if failed := [int(each) for each in codes if each]:
        raise OSError(failed[0], os.strerror(failed[0]), str(folder))
    for other in folder.glob("*.safetensors") if shards.rank == 0 else ():
        if not other.stem.endswith(f"-of-{shards.world_size}"):  # left by other processes that were killed here
            other.unlink()


def load_shares(folder: Path, tensors: Mapping[str, Tensor], shards: RowShards) -> None:
    """Fill ``tensors`` ``[r, …]``, this rank's share of each, from what any number of ranks saved."""
    files = _files(folder)
    for owner, path in enumerate(files):
        if (owner - shards.rank) % math.gcd(len(files), shards.world_size):
            continue
        with safe_open(path, "pt") as file:
            for name in tensors.keys() & set(file.keys()):
                share, saved = tensors[name], file.get_slice(name)
                for first in range(0, saved.get_shape()[0], BLOCK_ROWS):
                    block = saved[first : first + BLOCK_ROWS]
                    ids = (first + torch.arange(len(block))) * len(files) + owner
                    ours = torch.nonzero(ids % shards.world_size == shards.rank)[:, 0]
                    share[(ids[ours] // shards.world_size).to(share.device)] = block[ours].to(share)


def saved_shape(folder: Path) -> tuple[int, ...]:
    """Of all shares of the weight together, ``(R, D)``."""
    shapes = []
    for path in _files(folder):
        with safe_open(path, "pt") as file:
            shapes.append(file.get_slice("weight").get_shape())
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _files(folder: Path) -> list[Path]:
    """Of all owners, in their order. Raises FileNotFoundError where one is missing."""
    found = next(iter(folder.glob("*-of-*.safetensors")), None)
    owners = int(found.stem.rpartition("-")[2]) if found is not None else 1
    paths = [folder / f"{owner}-of-{owners}.safetensors" for owner in range(1, owners + 1)]
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"found no {path.name}; expected {owners} files of rows")
    return paths


def _write(
    path: Path, old: Path | None, entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], blocks: Iterable[Tensor]
) -> None:
    """Write safetensors to ``path``: all tensors of ``old``, then those of ``entries``, which come in ``blocks``."""
    header: dict[str, Any] = {}
    with atomic_path(path) as temporary, temporary.open("wb") as new, (old or Path(os.devnull)).open("rb") as before:
        if old is not None:
            header = json.loads(before.read(int.from_bytes(before.read(8), "little")))
        end = max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0)
        for name, (dtype, shape) in entries.items():
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _TYPES[dtype], "shape": shape, "data_offsets": [begin, end]}
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)
        new.write(len(encoded).to_bytes(8, "little") + encoded)
        shutil.copyfileobj(before, new, 1 << 24)
        for block in blocks:
            new.write(block.contiguous().view(torch.uint8).numpy().data)


def append_rows(folder: Path, name: str, rows: LearnedRows) -> None:
    """Add all rows as the tensor ``name`` to the weights in ``folder`` (safetensors), which the first rank has saved
    without them. All ranks have to call it; the first writes.
    """
    blocks = _whole_blocks(rows)
    if rows.shards.rank:
        deque(blocks, maxlen=0)  # its part of each
        return
    file = max(folder.glob("model*.safetensors"))
    shape = (rows.num_rows, rows.weight.shape[1])
    _write(file, file, {name: (rows.weight.dtype, shape)}, blocks)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        content = read_json(index)
        content["weight_map"][name] = file.name
        content["metadata"]["total_size"] += math.prod(shape) * rows.weight.element_size()
        write_json(index, content)


def _whole_blocks(rows: LearnedRows) -> Iterator[Tensor]:
    """All rows in their order, on the host of the first rank, block by block; on others, empty blocks."""
    assert rows.exchange is not None
    rows.wait()
    shards, weight = rows.shards, rows.weight.detach()
    group = rows.exchange.hosts if weight.device.type == "cpu" else None
    most = -(-shards.num_rows // shards.world_size)
    step = max(1, BLOCK_ROWS // shards.world_size)
    for first in range(0, most, step):
        size = min(step, most - first)
        mine = weight.new_zeros(size, weight.shape[1])
        own = weight[first : first + size]
        mine[: len(own)] = own
        parts = [torch.empty_like(mine) for _ in range(shards.world_size)] if shards.rank == 0 else None
        dist.gather(mine, parts, group=group)
        if parts is None:
            yield mine[:0]
            continue
        block = torch.stack(parts, 1).view(-1, weight.shape[1])
        yield block[: shards.num_rows - first * shards.world_size].cpu()
