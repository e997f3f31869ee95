"""The machine: processes, devices, seeds, and files that appear whole or not at all."""

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
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

# ---- Processes and devices -------------------------------------------------------------------------------------------


def rank_and_world() -> tuple[int, int]:
    """The number of this process and of all that torchrun started; (0, 1) without it."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextlib.contextmanager
def processes(device: str, hours: int = 12) -> Iterator[None]:
    """Inside the block the processes that torchrun started know each other; without torchrun nothing happens.

    device: "cpu" for processes that only wait for each other; "auto" or "cuda" lets GPUs exchange gradients.
    hours: how long one process may wait for the others, for instance while rank 0 downloads and decodes.

    SystemExit, after one sentence and with code 1, where another process has ended before its time.
    """
    if "RANK" not in os.environ or dist.is_initialized():
        yield
        return
    cuda = device in ("auto", "cuda") and torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=hours))
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo/transport" in str(error)):  # how NCCL and gloo say it
            raise
        message = (
            f"process {dist.get_rank()} stops, for another one has ended; the same command goes on from what is saved"
        )
        raise SystemExit(message) from error
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def rank_0_first() -> Iterator[None]:
    """Rank 0 runs the block before the other processes do."""
    rank, world = rank_and_world()
    if rank > 0:
        dist.barrier()
    yield
    if rank == 0 and world > 1:
        dist.barrier()


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of x over all processes, same shape."""
    if dist.is_initialized():
        x = x.clone()
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


def find_device(name: str) -> torch.device:
    """The device that --device names; under torchrun the GPU of this process.

    Raises:
        ValueError: it does not exist on this machine.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if cuda else "mps" if mps else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    have = ["cpu"] + ["mps"] * mps + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if name not in have and not (name == "cuda" and cuda):
        raise ValueError(f"--device {name} is not on this machine: choose from auto, {', '.join(have)}")
    return torch.device(name)


def on_device(net: nn.Module, device: torch.device) -> nn.Module:
    """`net` on the device, in the memory layout in which its convolutions are fast there."""
    return net.to(device, memory_format=torch.channels_last if device.type == "cuda" else torch.contiguous_format)


def describe() -> dict[str, str | int]:
    """What the seconds of a run depend on: processor, cores and threads, GPU, versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


# ---- Seeds and fingerprints ------------------------------------------------------------------------------------------


def hash_seed(*numbers: int) -> int:
    """One seed from several numbers; near ones give unrelated streams."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest(), "little")


def digest(*parts: bytes) -> str:
    """16 hexadecimal digits that change with the parts."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()[:16]


# ---- Files -----------------------------------------------------------------------------------------------------------


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
        with part.open("rb") as file:
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
    with _locked(Path(folder), remedy) if rank == 0 else contextlib.nullcontext():
        if world > 1:
            dist.barrier()
        yield


@contextlib.contextmanager
def _locked(folder: Path, remedy: str | None) -> Iterator[None]:
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

            writer = stack.enter_context(SummaryWriter(str(folder)))

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


# ---- Words to the user -----------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """A line on stdout, once, whatever the number of processes."""
    if rank_and_world()[0] == 0:
        print(text, flush=True)


class Lines:
    """Stands for stderr where that is a file or a pipe: what a progress bar draws over itself becomes lines."""

    def write(self, text: str) -> None:
        if text := text.strip():
            sys.stderr.write(f"{text}\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress_bar(*iterable: Any, **options: Any) -> tqdm:
    """A progress bar, options as of `tqdm`; where stderr is no terminal, a line every ten seconds."""
    if sys.stderr.isatty():
        return tqdm(*iterable, mininterval=0.5, **options)
    return tqdm(*iterable, mininterval=10, file=Lines(), **options)


def note(text: str) -> None:
    """A line on stderr that leaves progress bars whole."""
    tqdm.write(text, sys.stderr)


REFUSED = (ValueError, OSError, ImportError)  # what a wrong flag or file causes


@contextlib.contextmanager
def refusing(program: str, errors: tuple[type[Exception], ...] = REFUSED) -> Iterator[None]:
    """What a user gave and cannot be used becomes one sentence on stderr and exit code 2, without a traceback."""
    try:
        yield
    except errors as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def library(name: str, purpose: str, install: str) -> Any:
    """The optional library `name`; ImportError, with what to `install`, where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if error.name != name:
            raise
        raise ImportError(f"{purpose} needs {name}: pip install {install}") from error


class Stop:
    """Inside the block the first Ctrl-C or SIGTERM is answered at once and noted, so that a step is finished and saved
    before the end. The next one ends the process; what comes within a second is the same, for launchers repeat it.

    number: of the signal; 0 without one.
    """

    def __init__(self) -> None:
        self.number, self.before, self.former = 0, None, {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            self.out, self.into = os.pipe()
            os.set_blocking(self.into, False)
            self.fd = signal.set_wakeup_fd(self.into)
            self.former = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}
            # a thread, for the main one answers nothing during a backward pass
            threading.Thread(target=self._answer, daemon=True).start()
        return self

    def ask(self, number: int, frame: Any) -> None:
        self.number = self.number or number

    def _answer(self) -> None:
        first = None
        for (number,) in iter(lambda: os.read(self.out, 1), b""):
            if number not in self.former:
                continue
            if first is None:
                first = time.monotonic()
                say("\nstopping after this step; once more to stop now")
            elif time.monotonic() - first > 1:
                say("stopped; the same command goes on from the last checkpoint")
                os._exit(128 + number)
        os.close(self.out)

    def agreed(self, device: torch.device, last: bool = False) -> int:
        """The signal that some process got, 0 for none, as all processes find it at the same step. Of several it is the
        answer of the call before, so that no device is waited for; at the `last` call that of this one."""
        if rank_and_world()[1] == 1:
            return self.number
        found = torch.tensor(self.number, device=device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        before, self.before = self.before, found
        return int(found if last else before) if last or before is not None else 0

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.former.items():
            signal.signal(number, handler)
        if self.former:
            signal.set_wakeup_fd(self.fd)
            os.close(self.into)  # ends the thread
