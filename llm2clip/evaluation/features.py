"""Features computed once: kept on disk in blocks, resumable, shared by all ranks, read through memory maps.

A block is a safetensors file that appears whole or not at all, so a job that was stopped goes on with the blocks that
are missing, on any number of ranks. Items that cannot be encoded (a damaged image) are rows of NaN; they are tried
again at the next start, so that a repaired file is noticed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from llm2clip.data.tensorfile import TensorSpec, map_tensors, write_tensors
from llm2clip.errors import ModelError, StoreError
from llm2clip.files import write_json
from llm2clip.models.fingerprint import json_digest
from llm2clip.training.world import World

BLOCK_ROWS = 4096
_MANIFEST = "features.json"
_NAME = "features"

# row numbers -> features (n, D) of some of them after the other, NaN for what cannot be encoded
Produce = Callable[[Sequence[int]], Iterator[Tensor]]


class Features:
    """Features on disk as an array: `shape`, slices and lists of rows; fp32, as the model gave them.

    Args:
        blocks: memory-mapped (n_i, D) fp32 arrays, all of `block_rows` rows but the last.
        block_rows: rows of a block.
    """

    def __init__(self, blocks: Sequence[npt.NDArray[np.float32]], block_rows: int) -> None:
        self._blocks, self._block_rows = list(blocks), block_rows
        self.shape = (sum(len(block) for block in blocks), blocks[0].shape[1])

    def __len__(self) -> int:
        return self.shape[0]

    def gather(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Copy of the rows (n,): (n, D) fp32."""
        out = np.empty((len(rows), self.shape[1]), np.float32)
        block_of = rows // self._block_rows
        for number in np.unique(block_of).tolist():
            own = block_of == number
            out[own] = self._blocks[number][rows[own] - number * self._block_rows]
        return out

    def valid(self) -> npt.NDArray[np.bool_]:
        """Which rows hold features, (rows,)."""
        return np.concatenate([~np.isnan(block[:, 0]) for block in self._blocks])

    def rows(self, wanted: npt.NDArray[np.int64] | None = None) -> UnitRows:
        """Some of the rows (None: all) as an array of unit-norm features."""
        return UnitRows(self, np.arange(len(self)) if wanted is None else wanted)


class UnitRows:
    """Rows of `Features` in some order, normalised when they are read; an array to the retrieval ops.

    Attributes:
        numbers: which rows they are.
    """

    def __init__(self, features: Features, rows: npt.NDArray[np.int64]) -> None:
        self._features, self.numbers = features, np.asarray(rows, np.int64)
        self.shape = (len(self.numbers), features.shape[1])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, part: slice | npt.NDArray[np.int64] | list[int]) -> Tensor:
        values = torch.from_numpy(self._features.gather(np.atleast_1d(self.numbers[part])))
        return torch.nn.functional.normalize(values, dim=1)


class Joined:
    """Arrays of rows, one after the other, as one."""

    def __init__(self, *parts: UnitRows) -> None:
        self._parts = parts
        self._starts = np.cumsum([0, *(len(part) for part in parts)])
        self.shape = (int(self._starts[-1]), parts[0].shape[1])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, part: slice | npt.NDArray[np.int64] | list[int]) -> Tensor:
        rows = np.atleast_1d(np.arange(len(self))[part])
        out = torch.empty(len(rows), self.shape[1])
        for start, own in zip(self._starts.tolist(), self._parts, strict=False):
            inside = (rows >= start) & (rows < start + len(own))
            out[torch.from_numpy(inside)] = own[rows[inside] - start]
        return out


class Centred:
    """Rows less their mean, normalised again; reads all rows once."""

    def __init__(self, rows: UnitRows | Joined) -> None:
        self._rows, self.shape = rows, rows.shape
        total = torch.zeros(rows.shape[1], dtype=torch.float64)
        for start in range(0, len(rows), BLOCK_ROWS):
            total += rows[start : start + BLOCK_ROWS].double().sum(0)
        self._mean = (total / max(1, len(rows))).float()

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, part: slice | npt.NDArray[np.int64] | list[int]) -> Tensor:
        return torch.nn.functional.normalize(self._rows[part] - self._mean, dim=1)


Rows = UnitRows | Joined | Centred


class FeatureCache:
    """Directory of feature arrays.

    Args:
        root: the directory; all ranks must see the same one.
        world: ranks that share the work.
        block_rows: rows of a block: what a stopped job loses at most per rank.
    """

    def __init__(self, root: Path, world: World, *, block_rows: int = BLOCK_ROWS) -> None:
        self.root, self.world, self.block_rows = root, world, block_rows

    def array(self, kind: str, identity: Mapping[str, Any], rows: int, produce: Produce) -> Features:
        """The features that `identity` names; what is not on disk yet is computed, by all ranks together.

        Args:
            kind: beginning of the directory's name.
            identity: everything that the features depend on, as JSON.
            rows: number of items.
            produce: computes rows; called once on every rank, with its share of the missing ones.

        Raises:
            ModelError: features are not finite.
            StoreError: the directory is not the same for all ranks.
        """
        full = {**identity, "rows": rows, "block_rows": self.block_rows}
        folder = self.root / f"{kind}-{json_digest(full)}"
        count = -(-rows // self.block_rows)
        if self.world.is_main and not (folder / _MANIFEST).exists():
            write_json(folder / _MANIFEST, full)
        self.world.barrier()
        self._compute(folder, rows, range(self.world.rank, count, self.world.size), produce)
        self.world.barrier()
        blocks = [self._read(folder, number, rows) for number in range(count)]
        if any(block is None for block in blocks):
            lost = [self._file(folder, number).name for number, block in enumerate(blocks) if block is None]
            raise StoreError(
                f"{folder} lacks {', '.join(lost[:5])}, which another rank has written; the cache must be a "
                "directory that all ranks share"
            )
        return Features([block for block in blocks if block is not None], self.block_rows)

    def _compute(self, folder: Path, rows: int, numbers: range, produce: Produce) -> None:
        pending: dict[int, npt.NDArray[np.int64]] = {}
        for number in numbers:
            block = self._read(folder, number, rows)
            start = number * self.block_rows
            missing = np.arange(start, min(start + self.block_rows, rows))
            if block is not None:
                missing = missing[np.isnan(block[:, 0])]
            if len(missing):
                pending[number] = missing
        todo = [row for own in pending.values() for row in own.tolist()]
        if not todo:
            return
        coming, held = produce(todo), torch.empty(0, 0)
        for number, own in pending.items():
            parts, have = [held], len(held)
            while have < len(own):
                parts.append(next(coming).float().cpu())
                have += len(parts[-1])
            values = torch.cat([part for part in parts if len(part)])
            self._keep(folder, number, rows, own, values[: len(own)].numpy())
            held = values[len(own) :]

    def _keep(
        self,
        folder: Path,
        number: int,
        rows: int,
        own: npt.NDArray[np.int64],
        values: npt.NDArray[np.float32],
    ) -> None:
        given = ~np.isnan(values).all(axis=1)
        broken = own[given & ~np.isfinite(values).all(axis=1)]
        if len(broken):
            raise ModelError(
                f"{folder.name.partition('-')[0]}: features of item {broken[0]} are NaN or infinite; the model or the "
                "store is damaged, or the precision is too low"
            )
        block = self._read(folder, number, rows)
        if block is not None and not given.any():
            return  # nothing that could not be encoded before can be now
        start = number * self.block_rows
        size = min(self.block_rows, rows - start)
        whole = np.empty((size, values.shape[1]), np.float32) if block is None else block.copy()
        whole[own - start] = values
        path = self._file(folder, number)
        write_tensors(path, {_NAME: TensorSpec("F32", (size, values.shape[1]))}, {_NAME: [whole]})

    def _file(self, folder: Path, number: int) -> Path:
        return folder / f"block-{number:06d}.safetensors"

    def _read(self, folder: Path, number: int, rows: int) -> npt.NDArray[np.float32] | None:
        """One block; None where it is not there or damaged, so that it is computed again."""
        try:
            block: npt.NDArray[np.float32] = map_tensors(self._file(folder, number))[_NAME]
        except (StoreError, KeyError):
            return None
        size = min(self.block_rows, rows - number * self.block_rows)
        return block if block.ndim == 2 and len(block) == size and block.dtype == np.float32 else None


def gather_lists(world: World, values: Sequence[Any]) -> list[Any]:
    """The lists of all ranks, one after the other, on every rank."""
    if world.size == 1:
        return list(values)
    every: list[Any] = [None] * world.size
    dist.all_gather_object(every, list(values))
    return [value for own in every for value in own]
