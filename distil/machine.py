"""The machine: processes, devices, seeds, signals, and what is said to the user."""

import contextlib
import hashlib
import importlib
import os
import platform
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

# ---- Processes and devices -------------------------------------------------------------------------------------------


def rank_and_world() -> tuple[int, int]:
    """The number of this process and of all that torchrun started; (0, 1) without it."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def launched() -> tuple[int, int] | None:
    """The same as torchrun says it in the environment; None unless all its words are there, for clusters set some."""
    told = [os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")]
    return (int(told[0]), int(told[1])) if all(told) else None


@contextlib.contextmanager
def processes(device: str, hours: int = 12) -> Iterator[None]:
    """Inside the block the processes that torchrun started know each other; without torchrun nothing happens.

    device: "cpu" for processes that only wait for each other; "auto" or "cuda" lets GPUs exchange gradients.
    hours: how long one process may wait for the others, for instance while rank 0 downloads and decodes.

    SystemExit, after one sentence: with code 2 where this process has no GPU of its own, with code 1 where another one
    has ended before its time.
    """
    if launched() is None or dist.is_initialized():
        yield
        return
    cuda = device in ("auto", "cuda") and torch.cuda.is_available()
    if cuda:
        with refusing("torchrun"):
            torch.cuda.set_device(find_device("cuda"))
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=hours))
    try:
        yield
    except BaseException as error:
        if cuda:
            leave(error)
        lost = isinstance(error, dist.DistError) or "gloo/transport" in str(error)  # how gloo says it
        if not isinstance(error, RuntimeError) or not lost:
            raise
        message = (
            f"process {dist.get_rank()} stops, for another one has ended; the same command goes on from what is saved"
        )
        raise SystemExit(message) from error
    finally:
        dist.destroy_process_group()


def leave(error: BaseException) -> None:
    """Ends this process as Python would for the error, but at once: to end NCCL in order it would wait for the others,
    who wait for it, and torchrun ends them when it is gone."""
    code = error.code if isinstance(error, SystemExit) else 1
    if not isinstance(error, SystemExit):
        traceback.print_exception(error)
    elif isinstance(code, str):
        print(code, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


@contextlib.contextmanager
def rank_0_first() -> Iterator[None]:
    """Rank 0 runs the block before the other processes do."""
    rank, world = rank_and_world()
    if rank > 0:
        dist.barrier()
    yield
    if rank == 0 and world > 1:
        dist.barrier()


def agreed(what: str, value: Any) -> None:
    """OSError unless all processes have found the same value of `what`: training from different ones would be in
    vain. Every process has to call it."""
    world = rank_and_world()[1]
    if world > 1:
        found = [None] * world
        dist.all_gather_object(found, value)
        if odd := [i for i, other in enumerate(found) if other != found[0]]:
            remedy = "runs/ and --data have to be on storage that all machines see, and --precision to be given"
            raise OSError(f"process {odd[0]} finds {what} other than process 0 does: {remedy}")


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
        ValueError: it does not exist on this machine, or is one for all processes of torchrun.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    several, count = int(os.environ.get("WORLD_SIZE", "1")) > 1, torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if cuda else "mps" if mps and not several else "cpu"
    if several and (name == "mps" or ":" in name):
        raise ValueError(f"--device {name} is one device, and torchrun has started several processes: use cuda or cpu")
    number = os.environ.get("LOCAL_RANK", "0")
    found = f"cuda:{number}" if name == "cuda" else name  # set_device wants a number
    have = ["cpu"] + ["mps"] * mps + [f"cuda:{i}" for i in range(count)]
    if name == "cuda" and cuda and found not in have:
        raise ValueError(f"process {number} has no GPU of its own: start {count} on this machine, --nproc-per-node")
    if found not in have:
        raise ValueError(f"--device {name} is not on this machine: choose from auto, {', '.join(have)}")
    return torch.device(found)


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
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


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


def sentence(error: BaseException) -> str:
    """The kind of an error and its message, in one line of at most 200 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


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


class Copy:
    """A whole number () on its way from a device; asking for it waits for that, not for what comes after it."""

    def __init__(self, value: Tensor):
        self.value = value.to("cpu", non_blocking=True)
        self.there = torch.cuda.Event() if value.is_cuda else None
        if self.there:
            self.there.record()

    def number(self) -> int:
        if self.there:
            self.there.synchronize()
        return int(self.value)


class Stop:
    """Inside the block the first Ctrl-C or SIGTERM is answered at once and noted, so that a step is finished and saved
    before the end. The next one ends the process; what comes within a second is the same, for launchers repeat it.

    number: of the signal; 0 without one.
    """

    def __init__(self) -> None:
        self.number, self.said, self.before, self.former = 0, 0, None, {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            self.out, self.into = os.pipe()
            if hasattr(os, "set_blocking"):  # not on Windows before Python 3.12
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
        answer of the call before, for which no device has to finish this step; at the `last` call that of this one."""
        if rank_and_world()[1] == 1:
            self.said = self.number
        else:
            found = torch.full((), self.number, device=device)  # no copy to it
            dist.all_reduce(found, dist.ReduceOp.MAX)
            before, self.before = self.before, Copy(found)
            asked = self.before if last else before
            self.said = 0 if asked is None else asked.number()
        return self.said

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        for number, handler in self.former.items():
            signal.signal(number, handler)
        if self.former:
            signal.set_wakeup_fd(self.fd)
            os.close(self.into)  # ends the thread
        if kind is None and self.number > self.said:  # it came too late to be agreed upon
            signal.raise_signal(self.number)
