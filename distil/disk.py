"""Files: they appear whole or not at all, say when they are damaged, and belong to one process at a time."""

import contextlib
import errno
import glob
import hashlib
import importlib
import json
import math
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import torch.distributed as dist

from distil.machine import note, rank_and_world


class Damaged(OSError, ValueError):
    """A file does not hold what was written into it. The message names it, and what to do."""


def temporary(path: Path) -> Path:
    """A name beside `path` that no other process takes. What dead processes of this machine left there is removed."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        process = re.fullmatch(rf".*\.{re.escape(platform.node())}-(\d+)\.part", left.name)
        if process and not alive(int(process[1])):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
    return path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}.part")


def alive(process: int) -> bool:
    """Whether this machine has a process of that number; on Windows, where asking would end it, always."""
    if os.name == "nt":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        return True
    return True


@contextlib.contextmanager
def whole(path: str | os.PathLike) -> Iterator[Path]:
    """Write to the path that this gives: when the block ends well, `path` appears at once, as a whole.

    A kill leaves the former file or the new one, never half of one. OSError, in one sentence, where the disk is full.
    """
    path = Path(path)
    part = temporary(path)
    try:
        yield part
        with part.open("r+b") as file:  # Windows flushes only what may be written
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save says that a disk is full with a RuntimeError
        causes = (error, error.__context__)
        if not any(getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT) for cause in causes):
            raise
        written, free = (part.stat().st_size if part.exists() else 0), shutil.disk_usage(path.parent).free
        full = f"the disk is full after {written:,} bytes of it, {free:,} are free"
        raise OSError(f"{path} cannot be written: {full}; make room there and give the same command again") from error
    finally:
        part.unlink(missing_ok=True)


def reserve(path: Path) -> None:
    """OSError unless the disk has room for all of a file with holes: a memory map would end the process instead."""
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


SEAL = re.compile(rb"sha256 ([0-9a-f]{64})\n")  # the last line of a sealed file
SEAL_SIZE = 72  # bytes


def checksum(path: Path, size: int | None = None) -> str:
    """The sha256 of a file, or of its first `size` bytes."""
    found, size = hashlib.sha256(), path.stat().st_size if size is None else size
    with path.open("rb") as file:
        while size > 0 and (block := file.read(min(size, 1 << 20))):
            found.update(block)
            size -= len(block)
    return found.hexdigest()


def seal(path: Path) -> None:
    """Appends a line with the checksum of all that is in a file. Readers of .npy and .pt files do not look that far."""
    line = f"sha256 {checksum(path)}\n"
    with path.open("ab") as file:
        file.write(line.encode())


def seal_of(path: Path) -> str | None:
    """The checksum in the last line of a file; None: it has none, as those of earlier versions."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - SEAL_SIZE))
        found = SEAL.fullmatch(file.read())
    return found and found[1].decode()


def check_seal(path: Path, remedy: str) -> bool:
    """Whether a file has a seal. Damaged, with the `remedy`, if that is not the checksum of what the file holds."""
    expected = seal_of(path)
    if expected is not None and checksum(path, path.stat().st_size - SEAL_SIZE) != expected:
        raise Damaged(f"{path} is damaged, what it holds is not what was written (another checksum): {remedy}")
    return expected is not None


@contextlib.contextmanager
def lock(folder: str | os.PathLike, remedy: str | None = None) -> Iterator[None]:
    """Inside the block no other process has the folder, which is made, and tried by writing into it.

    The system forgets the lock of a process that died. Of several processes rank 0 takes it for all.

    remedy: what is advised where another process has it; None: that one is waited for.
    OSError, in one sentence: another one has it, or the folder cannot be written.
    """
    rank, world = rank_and_world()
    with held(Path(folder), remedy) if rank == 0 else contextlib.nullcontext():
        if world > 1:
            dist.barrier()
        yield


@contextlib.contextmanager
def held(folder: Path, remedy: str | None = None) -> Iterator[None]:
    """The same for this process alone."""
    path, told = folder / ".lock", False
    new = [place for place in (folder, *folder.parents) if not os.path.lexists(place)]
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = path.open("a+")
        except OSError as error:
            raise OSError(f"{folder} cannot be written ({error.strerror}): give another folder") from error
        with file:
            if _flock(file) and path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                try:
                    file.truncate(0)
                    file.write(f"process {os.getpid()} on {platform.node()}")
                    file.flush()
                    yield
                finally:
                    with contextlib.suppress(OSError):  # an empty file that stays locks nothing
                        path.unlink(missing_ok=True)
                        for place in new:  # what was made for the lock goes with it, if nothing is in it
                            place.rmdir()
                return
            file.seek(0)
            owner = file.read() or "another process"
        if remedy is not None:
            raise OSError(f"{folder} is in use by {owner}: {remedy}")
        if not told:
            note(f"{folder} is in use by {owner}: waiting for it")
        told = True
        time.sleep(0.5)


def _flock(file: TextIO) -> bool:
    """Whether the lock on an open file was to be had; some file systems have none, nor has Windows."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (OSError, ImportError) as error:
        note(f"{file.name} cannot be locked ({error}): see to it that no other run has this folder")
    return True


NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}  # JSON knows no such numbers


def standard(value: Any) -> Any:
    """`value` as standard JSON has it: numbers that are not finite become words, which `numbers_again` turns back."""
    if isinstance(value, dict):
        return {key: standard(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [standard(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def numbers_again(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON with the numbers that `standard` made words of."""
    return {key: NOT_FINITE.get(value, value) if isinstance(value, str) else value for key, value in pairs}


def write_json(path: str | os.PathLike, value: Any, indent: int | None = 2) -> None:
    """Writes `value` as standard JSON to `path`, whole or not at all."""
    with whole(path) as part:
        part.write_text(json.dumps(standard(value), indent=indent, allow_nan=False) + "\n", "utf-8")


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The object that `write_json` wrote. FileNotFoundError: there is none. Damaged, with the `remedy`: it is none."""
    try:
        found = json.loads(path.read_text("utf-8"), object_pairs_hook=numbers_again)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path} is damaged ({type(error).__name__}: {error}): {remedy}") from error
    if not isinstance(found, dict):
        raise Damaged(f"{path} is damaged (it holds no JSON object): {remedy}")
    return found


def need_room(folder: str | os.PathLike, size: int, what: str) -> None:
    """OSError, in one sentence, unless the disk of `folder` has room for `size` bytes of `what`.

    A write to a memory map on a full disk would kill the process without a word.
    """
    free = shutil.disk_usage(folder).free
    if size > free:
        raise OSError(f"{what} take {size / 1e9:.1f} GB and {folder} has room for {free / 1e9:.1f} GB: make room there")


def read_log(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The records of a log.jsonl, and how many of its lines are none: a kill may cut the last one."""
    lines, records = path.read_bytes().splitlines(), []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line, object_pairs_hook=numbers_again)
            if isinstance(record, dict) and isinstance(record.get("step"), int) and "student" in record:
                records.append(record)
    return records, len(lines) - len(records)


@contextlib.contextmanager
def open_log(folder: Path, start: int, kind: str, config: dict[str, Any]) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that appends a record to log.jsonl, and to the library that `kind` names; on rank 0 alone.

    Records from step `start` on are dropped first: a killed run wrote them, and the resumed one will write them again.
    """
    if rank_and_world()[0] > 0:
        yield lambda record: None
        return
    path = folder / "log.jsonl"
    if path.exists():
        records, unreadable = read_log(path)
        if unreadable:
            note(f"{path}: {unreadable} of {unreadable + len(records)} lines cannot be read and are dropped")
        with whole(path) as part:
            kept = [json.dumps(standard(record)) + "\n" for record in records if record["step"] < start]
            part.write_text("".join(kept))
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(path.open("a", buffering=1))
        also: Callable[..., Any] | None = None
        if kind == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = stack.enter_context(SummaryWriter(str(folder), purge_step=start))

            def also(values: dict[str, float], step: int) -> None:
                for key, value in values.items():
                    writer.add_scalar(key, value, step)
        elif kind != "jsonl":  # wandb, trackio
            run = importlib.import_module(kind).init(project="lift-place", name=folder.name, config=config)
            stack.callback(run.finish)
            also = run.log

        def log(record: dict[str, Any]) -> None:
            file.write(json.dumps(standard(record), allow_nan=False) + "\n")
            if also is not None:
                keys = [key for key in record if key not in ("step", "student", "method", "seed")]
                also({f"{record['student']}/{key}": record[key] for key in keys}, step=record["step"])

        yield log
