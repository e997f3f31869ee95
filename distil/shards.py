"""Arrays too large for memory, indexed as others are: in shards on disk, or decoded whenever they are asked for.

A shard is a .npy file of SHARD rows that appears when it is whole, so an interrupted call goes on where it was. Behind
the rows stands their checksum, which is looked at when a shard is read for the first time.
"""

import contextlib
import errno
import itertools
import json
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distil import disk, machine

MAX_CORRUPT = 0.01  # share of unreadable items that is tolerated
SHARD = 8192  # rows in a file
MOST, ROOM = 50_000, 2e9  # images, and bytes of them, that are held in memory to compare samples with


def spaced(n: int, most: int) -> np.ndarray:
    """Which of n rows to take, at most so many and evenly spaced over all: growing int64."""
    return np.linspace(0, n - 1, min(n, most)).round().astype(int)


def some(images: "np.ndarray | Rows") -> np.ndarray:
    """The images (N, C, H, W) uint8 to compare samples with: all of them, or evenly spaced ones that memory holds."""
    return images[spaced(len(images), min(MOST, int(ROOM / math.prod(images.shape[1:]))))]


class Rows:
    """Has `shape` and `dtype` of an array and is indexed as one; a subclass reads rows (B,) into found (B, ...)."""

    def __init__(self, shape: tuple[int, ...], dtype: Any):
        self.shape, self.dtype, self.rows = shape, np.dtype(dtype), np.arange(shape[0])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        rows = self.rows[index]
        found = np.empty((rows.size, *self.shape[1:]), self.dtype)
        self.read(rows.reshape(-1), found)
        return found.reshape(*rows.shape, *self.shape[1:])


class OnTheFly(Rows):
    """The arrays `decode(item)` of `shape`, which a pool of threads makes whenever they are indexed.

    In the place of one that cannot be decoded comes the next of the same label. It is named on stderr, and in the file
    `log` if there is one, from which the count goes on. Damaged: more than 1 % of all turned out to be unreadable.
    OSError: the disk or the memory failed, which says nothing of an image.
    """

    def __init__(
        self, items: Sequence, labels: Any, decode: Callable, shape: tuple, dtype: str = "uint8",
        log: Path | None = None,
    ):  # fmt: skip
        super().__init__((len(items), *shape), dtype)
        self.items, self.labels, self.decode, self.log = items, labels, decode, log
        known = json.loads(log.read_text("utf-8")) if log and log.exists() else {}
        self.unreadable = {int(i): reason for i, reason in known.items()}
        self.pool, self.lock = ThreadPoolExecutor(), threading.Lock()

    def read(self, rows: np.ndarray, found: np.ndarray) -> None:
        for i, image in enumerate(self.pool.map(self._one, rows.tolist())):
            found[i] = image

    def stand_in(self, i: int) -> int:
        """The number of the item that has been found in the place of i, usually i itself."""
        for j in itertools.chain(range(i, len(self)), range(i)):
            if j not in self.unreadable and (self.labels is None or self.labels[j] == self.labels[i]):
                return j
        raise disk.Damaged(f"no image of the label of {self.items[i]} can be read")

    def _one(self, i: int) -> np.ndarray:
        while True:
            j = self.stand_in(i)
            try:
                return self.decode(self.items[j])
            except Exception as error:  # decoders raise almost anything on broken bytes
                if isinstance(error, MemoryError):
                    raise OSError(f"the memory does not suffice for {self.items[j]}") from error
                if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):  # Pillow's have no number
                    raise
                with self.lock:
                    if j not in self.unreadable:  # else another thread was faster
                        self._remember(j, error)

    def _remember(self, i: int, error: Exception) -> None:
        self.unreadable[i] = f"{self.items[i]}: {error!r}"
        if len(self.unreadable) > MAX_CORRUPT * len(self):
            count = f"{len(self.unreadable)} of {len(self)} images cannot be read, more than {MAX_CORRUPT:.0%}"
            first = "; ".join(list(self.unreadable.values())[:3])
            raise disk.Damaged(f"{count}; remove or repair them. The first are {first}") from error
        machine.note(f"{self.unreadable[i]}: unreadable, the next image takes its place")
        if self.log:
            disk.write_json(self.log, self.unreadable)


def shard_file(folder: Path, name: str, i: int) -> Path:
    return folder / f"{name}-{i:05d}.npy"


def write_shards(
    folder: Path, arrays: dict, count: int, make: Callable, *, batch: int, what: str, rank: int = 0, world: int = 1
) -> None:
    """Writes the `count` rows of some arrays into files of SHARD rows each: NAME-00000.npy, NAME-00001.npy, ...

    Files that are there are left alone. Of several processes number `rank` of `world` writes every world-th file.

    arrays: {name: (shape of one row, dtype)}; the file of the first one appears last.
    make: from row numbers (B,), B at most `batch`, to {name: (B, *shape)}.
    what: their name for the progress bar, and for the OSError where the disk has no room for what is still missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    numbers = range(rank, math.ceil(count / SHARD), world)
    todo = [i for i in numbers if not all(shard_file(folder, name, i).exists() for name in arrays)]
    sizes = [min(SHARD, count - i * SHARD) for i in todo]
    row = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in arrays.values())  # bytes
    disk.need_room(folder, sum(sizes) * row, what)
    with machine.progress_bar(total=sum(sizes), desc=what, unit="img", disable=rank > 0 or not todo) as bar:
        for i, size in zip(todo, sizes, strict=True):
            with contextlib.ExitStack() as stack:  # it renames the last file first
                files = {name: stack.enter_context(disk.whole(shard_file(folder, name, i))) for name in arrays}
                parts = {}
                for name, (shape, dtype) in arrays.items():
                    parts[name] = np.lib.format.open_memmap(files[name], "w+", dtype, (size, *shape))
                    disk.reserve(files[name])
                for first in range(0, size, batch):
                    rows = np.arange(first, min(first + batch, size))
                    for name, values in make(i * SHARD + rows).items():
                        parts[name][rows] = values
                    bar.update(len(rows))
                for name in arrays:
                    parts.pop(name).flush()  # Windows renames no file that is still mapped
                    disk.seal(files[name])


def save_array(file: Path, values: np.ndarray) -> None:
    """Writes a .npy file with its checksum, whole or not at all."""
    with disk.whole(file) as part:
        with part.open("wb") as opened:
            np.save(opened, values)
        disk.seal(part)


def remedy(file: Path, first: str = "remove it and ") -> str:
    return f"{first}run the command that wrote into {file.parent} again, that completes it"


def open_array(file: Path, shape: tuple[int, ...] | None, check: bool = True) -> np.ndarray:
    """The memory-mapped array of a file; FileNotFoundError or ValueError where it is missing or damaged.

    check: whether its checksum is looked at, for which all of it is read.
    """
    try:
        found = np.load(file, mmap_mode="r")
        if found.shape != (shape or found.shape):
            raise ValueError(f"its shape is {found.shape}, not {shape}")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{file} is missing: {remedy(file, first='')}") from error
    except OSError:
        raise
    except Exception as error:  # numpy parses what stands before the numbers, which raises almost anything
        raise disk.Damaged(f"{file} is damaged ({machine.sentence(error)}): {remedy(file)}") from error
    if check:
        disk.check_seal(file, remedy(file))
    return found


def allow_files(count: int) -> None:
    """Lets this process open so many files more, as far as the system allows it: each memory map keeps one."""
    try:
        import resource
    except ImportError:  # Windows does not count them
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        wanted = soft + count if hard == resource.RLIM_INFINITY else min(soft + count, hard)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class Shards(Rows):
    """An array of `shape` in files of `per_file` rows, memory-mapped; halves become floats. Raises as `open_array`."""

    def __init__(self, folder: Path, name: str, shape: tuple[int, ...], per_file: int | None = None):
        self.per_file = per_file or SHARD
        sizes = [min(self.per_file, shape[0] - start) for start in range(0, shape[0], self.per_file)]
        self.paths = [shard_file(folder, name, i) for i in range(len(sizes))]
        shapes = [(size, *shape[1:]) for size in sizes]
        allow_files(len(sizes))
        self.files = [open_array(path, shape, check=False) for path, shape in zip(self.paths, shapes, strict=True)]
        rank, world = machine.rank_and_world()
        self.unread = set(range(rank, len(sizes), world))  # whose checksum this process is to look at
        dtype = self.files[0].dtype
        super().__init__(shape, np.float32 if dtype == np.float16 else dtype)

    def read(self, rows: np.ndarray, found: np.ndarray) -> None:
        numbers, inside = np.divmod(rows, self.per_file)
        for i in np.unique(numbers).tolist():
            if i in self.unread:
                disk.check_seal(self.paths[i], remedy(self.paths[i]))
                self.unread.discard(i)
            found[numbers == i] = self.files[i][inside[numbers == i]]

    def seals(self) -> bytes:
        """The checksums of all files; those of earlier versions have none, and their sizes stand for them."""
        return repr([disk.seal_of(path) or path.stat().st_size for path in self.paths]).encode()


class Embeddings:
    """The embeddings of captions called `name`, indexed as an array: (B, *shape) bfloat16. `empty`, (*shape): that of
    the empty prompt. On disk lie the bits of the corner `stored` of `shape`; all outside of it is zero."""

    def __init__(self, folder: Path, name: str, record: dict[str, Any]):
        self.name, self.shape = name, record["captions"][name]["shape"]
        stored = record["captions"][name]["stored"]
        self.bits = Shards(folder, name, (record["count"], *stored), record["shard"])
        self.empty = self._floats(open_array(folder / f"{name}-empty.npy", (1, *stored)))[0]

    def __getitem__(self, index: Any) -> Tensor:
        return self._floats(self.bits[index])

    def _floats(self, bits: np.ndarray) -> Tensor:
        """(B, *stored) bits of bfloat16, which numpy lacks -> (B, *shape) bfloat16."""
        stored = torch.from_numpy(bits.astype(np.int32)).to(torch.int16).view(torch.bfloat16)
        padded = stored.new_zeros(len(stored), *self.shape)
        padded[(slice(None), *map(slice, stored.shape[1:]))] = stored
        return padded
