"""The machine: processes, devices, seeds, and files that appear whole or not at all."""

import contextlib
import hashlib
import importlib
import json
import os
import platform
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
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


@contextlib.contextmanager
def processes(device: str, hours: int = 12) -> Iterator[None]:
    """Inside the block the processes that torchrun started know each other; without torchrun nothing happens.

    device: "cpu" for processes that only wait for each other; "auto" or "cuda" lets GPUs exchange gradients.
    hours: how long one process may wait for the others, for instance while rank 0 downloads and decodes.
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


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """16 hexadecimal digits that change with any bit of the tensors, wherever they are."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


# ---- Files -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def whole(path: str | os.PathLike) -> Iterator[Path]:
    """Write to the path that this gives: when the block ends well, `path` appears at once, as a whole.

    A kill leaves the former file or the new one, never half of one. The temporary name is one for each process.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, value: Any, indent: int | None = 2) -> None:
    """Writes `value` as JSON to `path`, whole or not at all."""
    with whole(path) as part:
        part.write_text(json.dumps(value, indent=indent) + "\n", "utf-8")


def need_room(folder: str | os.PathLike, size: int, what: str) -> None:
    """OSError, in one sentence, unless the disk of `folder` has room for `size` bytes of `what`.

    A write to a memory map on a full disk would kill the process without a word.
    """
    free = shutil.disk_usage(folder).free
    if size > free:
        raise OSError(f"{what} take {size / 1e9:.1f} GB and {folder} has room for {free / 1e9:.1f} GB: make room there")


@contextlib.contextmanager
def open_log(folder: Path, start: int, kind: str, config: dict[str, Any]) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that appends a record to log.jsonl, and to the library that `kind` names; on rank 0 alone.

    Records from step `start` on are dropped first: a killed run wrote them, and the resumed one will write them again.
    """
    if rank_and_world()[0] > 0:
        yield lambda record: None
        return
    if (folder / "log.jsonl").exists():
        lines = (folder / "log.jsonl").read_text().splitlines()
        lines = [line for line in lines if line.endswith("}")]  # a kill may cut the last one
        with whole(folder / "log.jsonl") as part:
            part.write_text("".join(line + "\n" for line in lines if json.loads(line)["step"] < start))
    with contextlib.ExitStack() as stack:
        file = stack.enter_context((folder / "log.jsonl").open("a", buffering=1))
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
            file.write(json.dumps(record) + "\n")
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


@contextlib.contextmanager
def refusing(program: str) -> Iterator[None]:
    """What a user gave and cannot be used becomes one sentence on stderr and exit code 2, without a traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
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
    """Inside the block Ctrl-C and SIGTERM only set `asked`, so that a step is finished and saved before the end.

    Several processes keep the ordinary behaviour: they would not agree on the step at which to stop.
    """

    def __init__(self) -> None:
        self.asked = False
        self.former: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread() and rank_and_world()[1] == 1:
            self.former = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, *_: Any) -> None:
        self.asked = True

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.former.items():
            signal.signal(number, handler)
