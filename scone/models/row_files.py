"""Files of learned rows that are shared out: a checkpoint share by share, and a finished model's weights.

No process ever holds all rows. A checkpoint is one of ``torch.distributed.checkpoint``; its tensors are named
``weight/OWNER of OWNERS/FIRST``: so many rows of an owner's share, from its row FIRST on. Any number of processes reads
it.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from scone.models.learned_rows import LearnedRows
from scone.models.row_shards import RowShards
from scone.utils.files import atomic_path, read_json, write_json

BLOCK_ROWS = 1 << 15
_OF_METADATA = {
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "TensorProperties")
    ),
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
}
_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class _Unpickler(pickle.Unpickler):
    """Of metadata as ``torch.distributed.checkpoint`` writes it: it names nothing else, and nothing else is called."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _OF_METADATA or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"found {module}.{name} in the metadata; expected sizes of tensors")


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata: Metadata = _Unpickler(io.BytesIO((Path(self.path) / ".metadata").read_bytes())).load()
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata


def save_shares(
    folder: Path, tensors: Mapping[str, Tensor], shards: RowShards, hosts: dist.ProcessGroup | None
) -> None:
    """Write this rank's share of ``tensors`` ``[r, …]``; all ranks have to, and all fail where one does.

    Raises OSError, as the rank that failed first did.
    """
    blocks = {
        f"{name}/{shards.rank} of {shards.world_size}/{first}": share[first : first + BLOCK_ROWS]
        for name, share in tensors.items()
        for first in range(0, max(len(share), 1), BLOCK_ROWS)
    }
    with _first_failure():
        dcp.save(blocks, checkpoint_id=folder, process_group=hosts)


def load_shares(folder: Path, tensors: Mapping[str, Tensor], shards: RowShards) -> None:
    """Fill ``tensors`` ``[r, …]``, this rank's share of each, from what any number of ranks saved."""
    saved = _Reader(folder).read_metadata().state_dict_metadata
    direct: dict[str, Tensor] = {}
    for key, entry in saved.items():
        name, owner, owners, first = _parts(key)
        common = math.gcd(owners, shards.world_size)
        if name not in tensors or (owner - shards.rank) % common:
            continue
        share = tensors[name]
        if owners == shards.world_size:
            direct[key] = share[first : first + BLOCK_ROWS]
            continue
        block = torch.empty(entry.size, dtype=entry.properties.dtype)  # type: ignore[union-attr]
        _read(folder, {key: block})
        ids = (first + torch.arange(len(block))) * owners + owner
        ours = torch.nonzero(ids % shards.world_size == shards.rank)[:, 0]
        share[(ids[ours] // shards.world_size).to(share.device)] = block[ours].to(share.device)
    if direct:
        _read(folder, direct)


def _parts(key: str) -> tuple[str, int, int, int]:
    name, owner, first = key.split("/")
    number, owners = owner.split(" of ")
    return name, int(number), int(owners), int(first)


def _read(folder: Path, tensors: dict[str, Tensor]) -> None:
    with _first_failure(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # each process reads what it needs
        dcp.load(tensors, storage_reader=_Reader(folder), no_dist=True)


@contextmanager
def _first_failure() -> Iterator[None]:
    """What failed, where the library wraps the failures of all ranks in something that is no Exception."""
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error


def saved_shape(folder: Path, name: str = "weight") -> tuple[int, ...]:
    """Of all shares of ``name`` together, ``(R, …)``."""
    saved = _Reader(folder).read_metadata().state_dict_metadata
    sizes = [entry.size for key, entry in saved.items() if _parts(key)[0] == name]  # type: ignore[union-attr]
    return (sum(size[0] for size in sizes), *sizes[0][1:])


def append_rows(folder: Path, name: str, rows: LearnedRows) -> None:
    """Add all rows as the tensor ``name`` to the weights in ``folder`` (safetensors), which the first rank has saved
    without them. All ranks have to call it; the first writes.
    """
    blocks = _whole_blocks(rows)
    if rows.shards.rank:
        for _ in blocks:
            pass
        return
    file = max(folder.glob("model*.safetensors"))
    shape = (rows.num_rows, rows.weight.shape[1])
    with atomic_path(file) as temporary, file.open("rb") as old, temporary.open("wb") as new:
        header = json.loads(old.read(int.from_bytes(old.read(8), "little")))
        end = max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0)
        num_bytes = math.prod(shape) * rows.weight.element_size()
        header[name] = {
            "dtype": _TYPES[rows.weight.dtype],
            "shape": shape,
            "data_offsets": [end, end + num_bytes],
        }
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)
        new.write(len(encoded).to_bytes(8, "little") + encoded)
        shutil.copyfileobj(old, new, 1 << 24)
        for block in blocks:
            new.write(block.view(torch.uint8).numpy().data)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        content = read_json(index)
        content["weight_map"][name] = file.name
        content["metadata"]["total_size"] += num_bytes
        write_json(index, content)


def _whole_blocks(rows: LearnedRows) -> Iterator[Tensor]:
    """All rows in their order, on the host of the first rank, block by block; on others, empty blocks."""
    assert rows.exchange is not None
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
