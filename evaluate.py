"""The numbers and the pictures: sampling, Frechet distance, precision and recall, sizes, the table, grids, curves.

    python evaluate.py RUN [RUN ...]      one table over finished runs: mean ± std over all students of a method
    python evaluate.py RUN --num 50000 --dataset celeba    FID, KID, precision, recall of its students; the same
                                          command resumes; RUN may also be the folder of a saved network
    python evaluate.py RUN --prompts FILE --out DIR     of students of Stable Diffusion: an image of each prompt, beside
                                          the teacher's from the same noise; with --clip MODEL their CLIP score
    torchrun --nproc-per-node 8 -- evaluate.py RUN ...    shares the sampling; without -- torchrun trips over --num

What every run measures, and on what:

    frechet_pixels     Frechet distance of Gaussians fitted to the pixels in [-1, 1] (of 16x16 block means if larger)
    frechet_digits     the same on 64 features of a small digit classifier that is trained here; None for other data
    precision, recall  k-nearest-neighbour manifolds with k = 5, on the digit features, on other data the pixels
    teacher_mse        mean squared distance to the teacher's final samples from the same noise, in [-1, 1] units
    saturated          share of pixels with |x| > 1.2: how far the sampler left the range of images
    non_finite         number of generated images that hold a NaN or an infinity
    right_class        of networks that are told the class: share of the samples that the digit classifier finds in it

The first four see what a viewer sees, samples clamped to [-1, 1] and rounded to 8 bits; the last three see the raw
output of the sampler. None of these compares with numbers from an Inception network, and a Frechet distance shrinks as
the number of images grows: compare within one table, against its floor (real images against real ones) and its teacher.
Only `--num` looks through Inception, and only then, and from 10,000 samples on, is the word FID without an @ printed.
"""

import argparse
import copy
import hashlib
import json
import math
import os
import pickle
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import data
import foreign
from diffusion import PROCESSES, Guided, Process, process_named
from models import FILES

SCORES = ("frechet_pixels", "frechet_digits", "precision", "recall", "teacher_mse", "saturated", "non_finite")
FLOOR = "real, held out"  # the name of the row that sets real images against real ones
COLORS = {  # one per method, the same in every picture, apart for colour-blind readers too (Okabe and Ito)
    "teacher": "#000000",
    "none": "#8c8c8c",
    "out": "#e69f00",
    "feat": "#cc79a7",
    "out+feat": "#d55e00",
    "lift": "#009e73",
    "place": "#0072b2",
}
NOT_FINITE = (255, 0, 255)  # magenta: the colour of a pixel that is no number
MAY_DIFFER = {"kd", "seeds", "fold_steps", "out", "device", "log", "log_every", "save_every"}  # in one table

# How --num samples where neither the command nor the run says so.
SAMPLER = {
    "sample_steps": None,
    "eta": 0.0,
    "spacing": "leading",
    "clip_x0": False,
    "guidance": 1.0,
    "vae": None,
    "process": "ddpm",
    "teacher": None,
}
MODES = ("clean", "legacy_pytorch", "legacy_tensorflow")  # of Inception features, as clean-fid names them
Extract = Callable[[Tensor], Tensor]  # uint8 images (B, C, H, W) -> features (B, D)

# ---------------------------------------------------------------------------------------------------------------------
# The machine, sizes


def rank_and_world() -> tuple[int, int]:
    """The number of this process and of all that torchrun started; (0, 1) without it."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


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
    kind, _, index = name.partition(":")
    there = {"cpu": not index, "mps": mps and not index, "cuda": cuda and int(index or 0) < torch.cuda.device_count()}
    if not there.get(kind, False):
        have = ["cpu"] + ["mps"] * mps + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        raise ValueError(f"--device {name} is not on this machine: choose from auto, {', '.join(have)}")
    return torch.device(name)


def parameters(net: nn.Module) -> int:
    """Number of parameters, trainable or not."""
    return sum(p.numel() for p in net.parameters())


def machine() -> dict[str, str | int]:
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


def macs(net: nn.Module, shape: tuple[int, ...] | None = None) -> int:
    """Multiply-adds of one forward pass of one sample of `shape` (C, H, W), by default `net.shape`.

    Counted by torch-pruning, as in the paper: convolutions, linear layers and norms; the products inside attention for
    transformers only (there the paper's counter knows them). Runs on the meta device, where tensors have a shape but no
    numbers: it costs next to nothing.
    """
    from torch_pruning.utils import count_ops_and_params

    x, t = torch.empty(1, *(net.shape if shape is None else shape), device="meta"), torch.empty(1, device="meta")
    cond = {"y": torch.tensor(0)} if "y" in net.conditions else net.no_condition() or {}  # of one sample
    cond = {key: torch.empty(1, *value.shape, dtype=value.dtype, device="meta") for key, value in cond.items()}
    counted = int(count_ops_and_params(copy.deepcopy(net).to("meta"), (x, t, cond))[0])
    return counted + (net.attention_macs() if hasattr(net, "attention_macs") else 0)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def process_of(net: nn.Module, name: str = "ddpm", spacing: str = "leading", clip_x0: bool = False) -> Process:
    """The process `name` of diffusion.PROCESSES as this network knows it: folded if it is a student of few steps."""
    process, steps = process_named(name, spacing, clip_x0), net.config.get("fold_steps")
    return process if steps is None else process.fold(steps)


def start_noise(n: int, shape: tuple[int, ...], seed: int, first: int = 0) -> Tensor:
    """Standard normal noise (n, *shape), float32 on the CPU, for the images numbered first .. first + n - 1.

    The noise of image i is a function of (seed, i) alone, whatever the batch size or the number of machines.
    """
    noise = np.empty((n, *shape), np.float32)
    for i in range(n):
        np.random.default_rng((seed, first + i)).standard_normal(dtype=np.float32, out=noise[i])
    return torch.from_numpy(noise)


def sample_batches(
    net: nn.Module,
    process,
    rows: Sequence[int],
    *,
    seed: int,
    steps: int | Sequence[int],
    eta: float = 0.0,
    cond: dict[str, Tensor] | Callable[[list[int]], dict[str, Tensor]] | None = None,
    guidance: float = 1.0,
    vae=None,
    batch: int | None = None,
    device: torch.device | str | None = None,
    bf16: bool = False,
    progress: bool = True,
    label: str = "",
) -> Iterator[tuple[list[int], Tensor]]:
    """The images numbered `rows`, a batch at a time: (their numbers, samples (b, C, H, W) float32 where the net is).

    cond: the conditions of all images, not only of `rows`, or a function from numbers of images to theirs.
    guidance: scale of classifier-free guidance, 1 for none. vae: a `foreign.Vae` that makes images of latents.

    Image i is a function of (seed, i), its start noise and with eta > 0 the noise on its way too; `batch` changes it by
    no more than the rounding of the network's arithmetic. None: 256, and on CUDA twice as many each time, up to 2048,
    past which nothing gets faster. A batch that does not fit in the memory of the GPU is halved, once and for all.
    The network is moved to `device` (default: stays where it is) and samples in eval mode; afterwards each of its
    modules has the mode that it had. bf16: under autocast.
    """
    net.to(device)
    kind = next(net.parameters()).device.type
    size, most = batch or 256, batch or (2048 if kind == "cuda" else 256)
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    guided = guidance != 1 and net.conditions
    called = Guided(net, guidance, net.no_condition(), net.guided_channels) if guided else net
    bar = tqdm(total=len(rows), desc=label or "sampling", unit="img", disable=not progress, leave=False)
    done = 0
    try:
        while done < len(rows):
            part, x = list(rows[done : done + size]), None
            noise = torch.cat([start_noise(1, net.shape, seed, i) for i in part])  # (b, C, H, W)
            theirs = cond(part) if callable(cond) else {key: value[part] for key, value in (cond or {}).items()}
            theirs = {key: value.to(next(net.parameters()).device) for key, value in theirs.items()}
            # on the CPU, so that a seed means the same on every device
            on_the_way = [torch.Generator().manual_seed(_mix(seed, i)) for i in part] if eta else None
            try:
                with torch.autocast(kind, torch.bfloat16, enabled=bf16):
                    x = process.sample(called, noise.shape, steps, theirs, eta=eta, noise=noise, generator=on_the_way)
                x = x if vae is None else vae.decode(x)
            except torch.OutOfMemoryError:
                if len(part) == 1:
                    raise
            if x is None:  # here, for the except clause still holds the tensors of the batch that failed
                torch.cuda.empty_cache()
                size = most = len(part) // 2
                continue
            yield part, x
            done += len(part)
            bar.update(len(part))
            size = min(2 * size, most)
    finally:
        bar.close()
        for module, training in modes:
            module.training = training


def _mix(*numbers: int) -> int:
    """One seed from several numbers; near ones give unrelated streams."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def sample(net: nn.Module, process, n: int, **options) -> Tensor:
    """n final samples (n, C, H, W), float32 on the CPU, in [-1, 1] units but NOT clamped.

    options: those of `sample_batches`, seed and steps among them. Networks sampled with one seed can be compared image
    by image, for they start from the same noise.
    """
    return torch.cat([x.cpu() for _, x in sample_batches(net, process, range(n), **options)])


def decoded(vae, latents: data.Images, n: int) -> np.ndarray:
    """The images (n, 3, H, W) uint8 behind n latents (not mirrored), evenly spaced over all of them."""
    rows = np.linspace(0, len(latents.images) - 1, min(n, len(latents.images))).round().astype(int)
    parts = np.array_split(rows, -(-len(rows) // 64))
    parts = [vae.decode(torch.from_numpy(latents.images[part][:, 0])) for part in parts]
    return data.to_uint8(torch.cat(parts)).numpy()


def interpolate(shape: tuple[int, int, int], seed: int, n: int = 16) -> Tensor:
    """Start noise (2 n, *shape) on two ways of n points each: from that of image 0 to 1, and from that of 2 to 3.

    Spherical, so that what lies between is as long as noise is.
    """
    a, b = start_noise(4, shape, seed).reshape(2, 2, 1, -1).unbind(1)  # the ends, (2, 1, C H W) each
    w = torch.linspace(0, 1, n)[:, None]  # (n, 1)
    angle = torch.acos(F.cosine_similarity(a, b, dim=-1))[..., None]  # (2, 1, 1)
    noise = (((1 - w) * angle).sin() * a + (w * angle).sin() * b) / angle.sin()  # (2, n, C H W)
    return noise.reshape(2 * n, *shape)


def open_samples(
    folder: str | os.PathLike, net: nn.Module, n: int, shape: tuple[int, int, int], **settings
) -> tuple[np.ndarray, np.ndarray]:
    """Room for n samples of `net` in `folder`, new or as an earlier call left it: memory-mapped (images, done).

    samples.npy (n, C, H, W) uint8; done.npy (n,) uint8, 0 for an image that is still to come, 1 for one that is there,
    2 for one that was not finite; samples.json: the settings, what else the images depend on, as JSON takes it.
    Several processes (torch.distributed) all have to call this.

    Raises:
        ValueError: the folder holds samples of other settings or weights.
        OSError: they do not fit on the disk.
    """
    folder, (rank, world), weights = Path(folder), rank_and_world(), hashlib.sha256()
    for tensor in net.state_dict().values():
        weights.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    about = {"n": n, "shape": list(shape), **settings, "weights": weights.hexdigest()[:16]}
    record, files = folder / "samples.json", (folder / "samples.npy", folder / "done.npy")
    if rank == 0 and not record.exists():
        folder.mkdir(parents=True, exist_ok=True)
        size, free = n * math.prod(shape), shutil.disk_usage(folder).free
        if size > free:  # a write to a memory map on a full disk would kill the process without a word
            raise OSError(f"{n} samples take {size / 1e9:.1f} GB, {folder} has {free / 1e9:.1f} GB left")
        for path, extent in zip(files, ((n, *shape), (n,)), strict=True):
            np.lib.format.open_memmap(path, "w+", np.uint8, extent)
        record.with_suffix(".part").write_text(json.dumps(about) + "\n")
        os.replace(record.with_suffix(".part"), record)  # last: without it the files are not looked at
    if world > 1:
        dist.barrier()
    former = json.loads(record.read_text())
    changes = ", ".join(
        f"{key} was {former.get(key)}, is {about[key]}" for key in about if former.get(key) != about[key]
    )
    if changes:
        raise ValueError(f"{folder} holds other samples ({changes}): give the former settings or another --out")
    images, done = (np.load(path, mmap_mode="r+") for path in files)
    return images, done


def fill(images: np.ndarray, done: np.ndarray, net: nn.Module, process, **options) -> None:
    """Samples the images (n, C, H, W) that `open_samples` says are not done, as they are looked at: 8 bits, clamped.

    Pixels that are no number become gray. Of several processes, number r of world fills the rows r, r + world, ...;
    the call ends when all of them are done. options: of `sample_batches`.
    """
    rank, world = rank_and_world()
    todo = [i for i in range(rank, len(done), world) if not done[i]]
    for rows, x in sample_batches(net, process, todo, **options):
        images[rows] = data.to_uint8(x.nan_to_num()).cpu().numpy()
        images.flush()  # the image first, then the word that it is there
        done[rows] = np.where(x.flatten(1).isfinite().all(1).cpu().numpy(), 1, 2)
        done.flush()
    if world > 1:
        dist.barrier()


# ---------------------------------------------------------------------------------------------------------------------
# Extractors: uint8 images (N, C, H, W), a tensor or an array, -> features (N, D) float32. Inception takes batches only.


def _pieces(images: Tensor | np.ndarray) -> Iterator[Tensor]:
    """The images by the thousand, as tensors: as floats, 50,000 photographs at once would need many GB."""
    for first in range(0, len(images), 1000):
        yield torch.tensor(np.asarray(images[first : first + 1000]))


def pixels(images: Tensor | np.ndarray) -> Tensor:
    """The pixels in [-1, 1]; of images larger than 16x16 the block means, so that D stays below their number."""
    size = [min(side, 16) for side in images.shape[2:]]
    return torch.cat([F.adaptive_avg_pool2d(piece / 127.5 - 1, size).flatten(1) for piece in _pieces(images)])


class DigitClassifier(nn.Module):
    """A small convolutional network on gray images (N, 1, H, W), H = W >= 8, with 64 features before its ten scores."""

    accuracy = math.nan  # share of the held-out digits that it names correctly

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveMaxPool2d(8),  # (N, 16, 8, 8)
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),         # (N, 32, 4, 4)
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Flatten(),            # (N, 1024)
            nn.Linear(1024, 64), nn.ReLU(),                                      # (N, 64)
        )  # fmt: skip
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.trunk(data.to_float(images)))  # (N, 10)

    @torch.no_grad()
    def features(self, images: Tensor | np.ndarray) -> Tensor:
        return torch.cat([self.trunk(data.to_float(piece)) for piece in _pieces(images)])  # (N, 64)

    @torch.no_grad()
    def predict(self, images: Tensor | np.ndarray) -> Tensor:
        """The most likely digit of each image, (N,) int64."""
        return self.head(self.features(images)).argmax(1)


def digit_classifier(image_size: int = 8, cache: str | os.PathLike = data.CACHE, steps: int = 400) -> DigitClassifier:
    """The ruler of `frechet_digits`: trained once on the digits' train split (seconds), afterwards read from `cache`.

    Its seeds are fixed, whatever the seed of a run: a ruler must not change with what it measures. Its accuracy on the
    test split is measured after training and kept in the file. A damaged file is made anew.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file, save_file

    # v1: count up when the network or its training changes
    path = Path(cache) / f"digit-classifier-{image_size}-{steps}-v1.safetensors"
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they were
        torch.manual_seed(0)
        net = DigitClassifier()
        try:
            with safe_open(path, "pt") as file:
                net.accuracy = float(file.metadata()["accuracy"])
            net.load_state_dict(load_file(path))
            return net.eval()
        except (OSError, SafetensorError, RuntimeError, TypeError, KeyError):
            pass  # there is none, or not a whole one

        train, test = (data.load("digits", image_size=image_size, split=split, seed=0) for split in ("train", "test"))
        images, labels = torch.tensor(train.images), torch.tensor(train.labels)
        optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
        rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
        for _ in tqdm(range(steps), desc="digit classifier", leave=False):
            pick = torch.randint(len(images), (64,))
            shift = torch.randint(-1, 2, (2,)).tolist()  # up to a pixel each way, for there are few images
            loss = F.cross_entropy(net(images[pick].roll(shift, (2, 3))), labels[pick])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
    net.eval()
    net.accuracy = np.mean(net.predict(test.images).numpy() == test.labels).item()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")  # renamed when whole: a kill leaves no half file
    save_file(net.state_dict(), part, metadata={"accuracy": repr(net.accuracy)})
    os.replace(part, path)
    return net


class Inception:
    """The features of FID: images (B, C, H, W) uint8, gray or colour -> (B, 2048) float32, resized as clean-fid does.

    mode: `clean` (antialiased), `legacy_pytorch` (that of pytorch-fid: the paper's) or `legacy_tensorflow`.
    network: (B, 3, 299, 299) floats 0 .. 255 on `device` -> features; None: clean-fid's, with the published weights.
    """

    def __init__(self, mode: str = "clean", device: torch.device | str = "cpu", network: Extract | None = None):
        from cleanfid.resize import build_resizer

        self.name, self.device, self.network = f"inception-{mode}", torch.device(device), network
        self.pool, self.resizer = ThreadPoolExecutor(), build_resizer(mode)
        if network is None:
            self.network = self._published(mode)

    def _published(self, mode: str) -> Extract:
        from cleanfid.features import build_feature_extractor

        path = inception_weights(mode)
        try:
            return build_feature_extractor(mode, self.device, use_dataparallel=False)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{path} cannot be loaded ({reason}): if it is damaged, put a good copy there") from error

    def resize(self, images: Tensor) -> Tensor:
        """(B, C, H, W) uint8 -> (B, 3, 299, 299) float32, 0 .. 255; in legacy_tensorflow the network resizes."""
        colour = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()  # (B, H, W, 3)
        resized = np.stack(list(self.pool.map(self.resizer, colour)))
        return torch.from_numpy(resized).permute(0, 3, 1, 2).float()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        return self.network(self.resize(images).to(self.device)).float().cpu()


def inception_weights(mode: str) -> Path:
    """The file of weights that clean-fid reads in this mode, downloaded (about 95 MB) if it is not there.

    Raises:
        FileNotFoundError: it cannot be downloaded; the sentence says which file belongs where.
    """
    from cleanfid.downloads_helper import inception_url
    from cleanfid.inception_pytorch import FID_WEIGHTS_URL

    if mode == "legacy_pytorch":
        url, folder = FID_WEIGHTS_URL, Path(torch.hub.get_dir()) / "checkpoints"
    else:  # clean-fid has this folder in its code
        url, folder = inception_url, Path("." if platform.system() == "Windows" else "/tmp")
    path = folder / url.rpartition("/")[2]
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, path)  # renamed when whole
        except OSError as error:
            raise FileNotFoundError(
                f"--mode {mode} needs the Inception weights {path}, and the download failed ({error}): "
                f"get {url} and put it there"
            ) from error
    return path


def extractor_name(extract: Extract) -> str:
    """Its attribute `name`, or what the function is called: one name, one extractor, or the cache mixes them up."""
    return getattr(extract, "name", None) or extract.__name__


def features(extract: Extract, images: np.ndarray, rows: Sequence[int] | None = None, label: str = "") -> Tensor:
    """extract(...) of images (N, C, H, W) uint8, or of the `rows` of them, a hundred at a time: (N, D) on the CPU."""
    rows = np.arange(len(images)) if rows is None else np.asarray(rows)
    found = []
    with tqdm(total=len(rows), desc=label or "features", unit="img", leave=False) as bar:
        for first in range(0, len(rows), 100):
            found.append(extract(torch.from_numpy(images[rows[first : first + 100]])).cpu())
            bar.update(len(found[-1]))
    return torch.cat(found)


def reference(
    real: data.Images,
    extract: Extract,
    *,
    count: int = 50_000,
    split: str = "train",
    cache: str | os.PathLike = data.CACHE,
) -> Tensor:
    """Features (N, D) float32 of N = min(count, all) images evenly spaced over `real`, computed once, kept in `cache`.

    The file is named after data set, size, split, N and extractor (its `name`, or that of the function), and after a
    hash of 64 of the images: another folder, crop or order is another file.
    """
    rows = np.linspace(0, len(real.images) - 1, min(count, len(real.images))).round().astype(int)
    key = hashlib.sha256(real.images[rows[:: math.ceil(len(rows) / 64)]].tobytes()).hexdigest()[:8]
    size = "x".join(map(str, real.images.shape[1:]))
    path = Path(cache) / f"features-{real.name}-{size}-{split}-{len(rows)}-{extractor_name(extract)}-{key}.npy"
    if not path.exists():
        found = features(extract, real.images, rows, f"features of {real.name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        with part.open("wb") as file:  # renamed when whole: a kill leaves no half file
            np.save(file, found.float().numpy())
        os.replace(part, path)
    return torch.from_numpy(np.load(path))


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def frechet(real: Tensor, fake: Tensor) -> float:
    """Frechet distance of the Gaussians fitted to features (N, D) and (M, D), N and M >= 2 (Heusel et al. 2017).

    |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^1/2 in float64. The last trace is the sum of the square roots of the
    eigenvalues of S1^1/2 S2 S1^1/2, which is symmetric and has none below 0: singular covariances (pixels that never
    change) do no harm. Features that are not finite are infinitely far away.
    """
    if real.shape[1:] != fake.shape[1:] or real.ndim != 2 or min(len(real), len(fake)) < 2:
        raise ValueError(f"frechet needs (N, D) and (M, D), N, M >= 2, not {tuple(real.shape)} and {tuple(fake.shape)}")
    if not (real.isfinite().all() and fake.isfinite().all()):
        return math.inf
    (m1, s1), (m2, s2) = ((x.mean(0), torch.atleast_2d(x.T.cov())) for x in (real.double(), fake.double()))  # (D, D)
    values, vectors = torch.linalg.eigh(s1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    overlap = torch.linalg.eigvalsh(root @ s2 @ root).clamp(min=0).sqrt().sum()
    return max(0.0, ((m1 - m2).square().sum() + s1.trace() + s2.trace() - 2 * overlap).item())


def precision_recall(real: Tensor, fake: Tensor, k: int = 5, chunk: int = 512) -> tuple[float, float]:
    """Precision and recall of features (N, D) and (M, D), N and M > k (Kynkäänniemi et al. 2019, as prdc has them).

    Each point has a ball that ends at its k-th neighbour in its own set, itself not counted. Precision: the share of
    fakes strictly inside the ball of a real. Recall: the share of reals strictly inside the ball of a fake.
    `chunk` rows of distances are held at a time: 50,000 x 50,000 in 2,048 dimensions fits in 4 GB.
    """
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"precision and recall with k={k} need more than {k} images, not {len(real)} and {len(fake)}")
    centre = real.mean(0, dtype=torch.float64)
    real, fake = real - centre, fake - centre  # float64; near 0, |a|^2 - 2ab + |b|^2 keeps its digits

    def distances(a: Tensor, b: Tensor) -> Iterator[Tensor]:  # squared, (chunk, len(b)) at a time
        norms = torch.linalg.vector_norm(b, dim=1).square()  # b.square() would be another copy of b
        for rows in a.split(chunk):
            yield torch.addmm(norms, rows, b.T, alpha=-2).add_(rows.square().sum(1, keepdim=True))

    def radii(x: Tensor) -> Tensor:  # the nearest of k + 1 is the point itself
        return torch.cat([d.topk(k + 1, largest=False).values.amax(1) for d in distances(x, x)])

    real_radii, fake_radii = radii(real), radii(fake)
    real_inside, fake_inside = [], torch.zeros(len(fake), dtype=torch.bool, device=fake.device)
    for d, radius in zip(distances(real, fake), real_radii.split(chunk), strict=True):
        real_inside.append((d < fake_radii).any(1))
        fake_inside |= (d < radius[:, None]).any(0)
    return fake_inside.double().mean().item(), torch.cat(real_inside).double().mean().item()


def kernel_distance(real: Tensor, fake: Tensor, subsets: int = 100, size: int = 1000) -> float:
    """KID of features (N, D) and (M, D) as clean-fid has it (Bińkowski et al. 2018): polynomial kernel, mean over
    random subsets. Always the same subsets; numpy's global random numbers stay as they were."""
    from cleanfid.fid import kernel_distance as clean_fid

    state = np.random.get_state()
    np.random.seed(0)
    try:
        return clean_fid(real.numpy(), fake.numpy(), subsets, size)
    finally:
        np.random.set_state(state)


def feature_scores(real: Tensor, fake: Tensor, device: torch.device | str = "cpu") -> dict[str, float]:
    """frechet, kid, precision, recall (k = 5) of features (N, D) and (M, D), float32 on the CPU, N and M > 5.

    On Inception features the first is FID. device: of the neighbour search; 50,000 images take minutes on a CPU.
    """
    precision, recall = precision_recall(real.to(device), fake.to(device))
    scores = {"frechet": frechet(real, fake), "kid": kernel_distance(real, fake)}
    return {**scores, "precision": precision, "recall": recall}


def score(
    samples: Tensor,
    teacher_samples: Tensor | None,
    real: Tensor | np.ndarray,
    classifier: DigitClassifier | None = None,
    labels: Tensor | None = None,
) -> dict[str, float | int | None]:
    """The `SCORES` of samples (n, C, H, W) in [-1, 1] units, not clamped, against real images (N, C, H, W) uint8.

    With the `labels` (n,) that the samples were made for, `right_class` too: the share that the classifier recognises.

    `teacher_samples` come from the same noise; None leaves teacher_mse None (real images in the place of samples).
    A sampler that diverged is reported, not hidden: with any non-finite image the Frechet distances and teacher_mse are
    infinite; such an image lies in no ball, which lowers precision, and its non-finite pixels count as saturated.
    """
    finite = samples.flatten(1).isfinite().all(1)  # (n,)
    images = data.to_uint8(samples[finite])  # (m, C, H, W)
    digits = classifier and classifier.features

    def distance(extract) -> float:
        return frechet(extract(real), extract(images)) if finite.all() else math.inf

    precision, recall = 0.0, 0.0
    if len(images) > 5:
        extract = digits or pixels
        precision, recall = precision_recall(extract(real), extract(images), k=5)
    mse = None if teacher_samples is None else (samples.double() - teacher_samples).square().mean().item()
    right = {}
    if classifier and labels is not None:
        right = {"right_class": (classifier.predict(images) == labels[finite]).double().sum().item() / len(samples)}
    return right | {
        "frechet_pixels": distance(pixels),
        "frechet_digits": distance(digits) if digits else None,
        "precision": precision * len(images) / len(samples),
        "recall": recall,
        "teacher_mse": math.inf if mse is not None and math.isnan(mse) else mse,
        "saturated": 1 - (samples.abs() <= 1.2).double().mean().item(),  # put this way round, NaN counts
        "non_finite": len(samples) - len(images),
    }


def protocol(
    n_real: int,
    n_fake: int,
    n_floor: int,
    *,
    sampler: str,
    steps: int,
    eta: float,
    ema: float,
    seed: int,
    told: str = "",
    classifier: DigitClassifier | None = None,
) -> str:
    """One line that says how the numbers of a table came about.

    n_real, n_fake, n_floor: images of the train split, of each network, of the held-out split (0: there is none).
    ema: rate of the weight average that was sampled. seed: of the starting noise. told: what the
    networks were told of the images, and how strongly.
    """
    features, on = "", "the same pixels"
    if classifier:
        on = f"64 features of a digit classifier ({classifier.accuracy:.1%} of held-out digits right)"
        features = "Frechet digits, "
    return (
        f"Frechet px: pixels in [-1, 1]; {features}precision, recall (k=5): {on}; these on samples clamped to [-1, 1] "
        f"and rounded to 8 bits, MSE and saturated (|x| > 1.2) on raw samples; {n_real} real, {n_fake} generated"
        f"{f', {n_floor} held out' if n_floor else ''}; {sampler}, {steps} steps, eta {eta:g}"
        f"{told and f', {told}'}; EMA {ema:g}; seed {seed}"
    )


# ---------------------------------------------------------------------------------------------------------------------
# The table


def rows(metrics: dict) -> list[dict]:
    """What `table` takes, from one metrics.json: its floor (if there is one), its teacher, its students.

    Of a fold also the teacher in as many steps; the steps are in the names, so that a table may hold several folds.
    A run that was not evaluated has sizes and seconds only.

    Raises:
        KeyError, TypeError, ValueError: a number is missing or is none.
    """
    found = [{**metrics["floor"], "method": FLOOR}] if metrics.get("floor") else []
    found += [{**metrics["teacher"], "method": "teacher"}, *({**row} for row in metrics.get("same_steps", []))]
    folded = metrics.get("settings", {}).get("fold_steps")
    label = "" if folded is None else f", {metrics['settings']['sample_steps']} steps"
    found += [{**student, "method": student["method"] + label} for student in metrics["students"]]
    for row in found:
        measured = not row.keys().isdisjoint(SCORES)
        row |= {key: None if not measured or row[key] is None else float(row[key]) for key in SCORES}
        row.setdefault("right_class", None)
        if row["method"] != FLOOR:
            row["parameters"] = int(row["parameters"])
    return found


def table(rows: list[dict]) -> str:
    """Aligned text that is valid Markdown too: one line per method and size, floor and teacher on top.

    A row has a method and the SCORES; parameters, seconds and seed where it is a student. Several rows of one method
    give mean ± sample standard deviation. A column that is empty in all lines is left out; images that are not finite
    are counted beside the name of the method.
    """
    groups: dict[tuple, list[dict]] = {}
    for row in sorted(rows, key=lambda row: (row["method"] != FLOOR, row["method"] != "teacher")):
        group = groups.setdefault((row["method"], row.get("parameters")), [])
        if "seed" in row or all(any(row[key] != other[key] for key in SCORES) for other in group):
            group.append(row)  # runs that share a teacher each bring its row along: once is enough
    full = next((size for method, size in groups if method == "teacher"), None)

    lines = [["method", "Frechet px", "Frechet digits", "precision", "recall", "MSE to teacher", "saturated"]]
    lines[0] += ["right class", "params", "% of teacher", "seconds"]
    for (method, size), group in groups.items():
        lost = int(sum(row["non_finite"] or 0 for row in group))
        notes = [f"n={len(group)}"] * (len(group) > 1) + [f"{lost} not finite"] * (lost > 0)
        line = [f"{method} ({', '.join(notes)})" if notes else method]
        line += [_mean_std([row[key] for row in group]) for key in SCORES[:-1]]
        line.append(_mean_std([row.get("right_class") for row in group]))
        line += [f"{size:,}", f"{100 * size / full:.2f}" if full else "-"] if size else ["-", "-"]
        lines.append([*line, _mean_std([row.get("seconds") for row in group])])
    return _aligned(lines)


def _aligned(lines: list[list[str]]) -> str:
    """Cells as a Markdown table, its head first; a column that is "-" in all lines is left out."""
    columns = [column for column in zip(*lines, strict=True) if set(column[1:]) != {"-"}]
    widths = [max(map(len, column)) for column in columns]
    text = []
    for first, *others in zip(*columns, strict=True):
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        text.append(f"| {' | '.join(cells)} |")
    text.insert(1, f"|:{'-' * widths[0]}-|{'|'.join('-' * (width + 1) + ':' for width in widths[1:])}|")
    return "\n".join(text)


def fid_table(rows: list[dict], extract: Extract) -> str:
    """A line per network of name, n, frechet, kid, precision, recall, non_finite, parameters, macs, as in `table`.

    The columns are called FID, FID@n below 10,000 samples, and KID if the features are Inception's; else Frechet, MMD.
    """
    names, n = ("Frechet", "MMD"), rows[0]["n"]
    if isinstance(extract, Inception):
        names = ("FID" if n >= 10_000 else f"FID@{n}", "KID")
    lines = [["network", *names, "precision", "recall", "not finite", "params", "MACs"]]
    for row in rows:
        line = [row["name"], f"{row['frechet']:.2f}", f"{row['kid']:.5f}", f"{row['precision']:.3f}"]
        line += [f"{row['recall']:.3f}", str(row["non_finite"] or "-")]
        lines.append([*line, f"{row['parameters']:,}", f"{row['macs'] / 1e9:.3f} G"])
    return _aligned(lines)


def _mean_std(values: list[float | None]) -> str:
    """Three significant digits; "-" when nothing was measured, "inf" when a sampler diverged."""
    values = [value for value in values if value is not None]
    if not values or not all(map(math.isfinite, values)):
        return "inf" if values else "-"
    mean = statistics.fmean(values)
    places = min(4, max(0, 2 - math.floor(math.log10(abs(mean))))) if mean else 0
    return f"{mean:.{places}f}" + (f" ± {statistics.stdev(values):.{places}f}" if len(set(values)) > 1 else "")


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def grid(path: str | os.PathLike, rows: dict[str, Tensor], columns: int = 16, lines: int = 2) -> None:
    """Draws samples (n, C, H, W) in [-1, 1] units, C = 1 or 3: a labelled band per method, the teacher's on top.

    All methods start from the same noise, so one place in a band is one noise. A band shows the first columns * lines
    images. Pixels stay crisp; the colour NOT_FINITE marks those that are no numbers.
    """
    from PIL import Image, ImageDraw, ImageFont

    bands = sorted(rows.items(), key=lambda band: band[0] != "teacher")
    channels, height, width = bands[0][1].shape[1:]
    if channels not in (1, 3):
        raise ValueError(f"a picture needs images of 1 or 3 channels, not {channels}")
    zoom, space, margin = max(1, math.ceil(40 / height)), 3, 16
    font = ImageFont.load_default(18)
    left = margin + 24 + math.ceil(max(font.getlength(name) for name, _ in bands))
    shown = max(min(len(samples), columns * lines) for _, samples in bands)
    step_y, step_x = height * zoom + space, width * zoom + space
    band_height = math.ceil(shown / columns) * step_y + 4 * space
    size = (left + min(shown, columns) * step_x - space + margin, 2 * margin + len(bands) * band_height - 5 * space)
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for b, (name, samples) in enumerate(bands):
        x, top = samples[: columns * lines].float().cpu(), margin + b * band_height
        rgb = data.to_uint8(x.nan_to_num()).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).clone()  # (n, H, W, 3)
        rgb[~x.isfinite().all(1)] = torch.tensor(NOT_FINITE, dtype=torch.uint8)
        bottom = top + band_height - 5 * space - 1
        # gray behind the images: collapsed samples are often all white or all black
        draw.rectangle((left - space, top - space, size[0] - margin + space - 1, bottom + space), fill="#a0a0a0")
        for i, tile in enumerate(rgb.numpy()):
            image = Image.fromarray(tile).resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
            picture.paste(image, (left + i % columns * step_x, top + i // columns * step_y))
        draw.rectangle((left - 12, top, left - 8, bottom), fill=COLORS.get(name, "black"))
        draw.text((left - 18, (top + bottom) / 2), name, fill="black", font=font, anchor="rm")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


PANELS = {  # what a log line calls it: (title, name of the y axis, logarithmic?)
    "coarse": ("coarse term", "mean |b0| + |b1 - 1|", True),
    "fine": ("fine term", "mean squared residual", True),
    "w": ("weight of the fine term", "w", False),
    "mse": ("distance to the teacher's output", "mean squared error", True),
    "b0": ("intercept", "|mean b0|", True),
    "b1": ("slope", "mean b1", False),
    "grad_norm": ("gradient before clipping", "norm", True),
}


def curves(path: str | os.PathLike, log: str | os.PathLike | list[dict]) -> None:
    """Draws how training went, from a log.jsonl or its records: a panel per quantity, a thin line per student.

    A record has step, student ("place-0"), method, and those of `PANELS` that the method has. Of a long log, stretches
    of equal length are averaged: about 100 points to a line.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    if not isinstance(log, list):  # a kill may leave half a last line
        log = [json.loads(line) for line in Path(log).read_text().splitlines() if line.endswith("}")]
    students: dict[str, dict[int, dict]] = {}
    for record in log:
        if "student" in record:
            students.setdefault(record["student"], {})[record["step"]] = record  # a step that was repeated counts once

    figure = Figure(figsize=(15, 6.5), layout="constrained")
    *axes, last = figure.subplots(2, 4, sharex=True).flat
    handles = {}
    for axis, (key, (title, name, logarithmic)) in zip(axes, PANELS.items(), strict=True):
        for records in students.values():
            method = next(iter(records.values()))["method"]
            points = [(step, record[key]) for step, record in sorted(records.items()) if record.get(key) is not None]
            if key == "b0":
                points = [(step, abs(value)) for step, value in points]
            if points:
                stretch = math.ceil(len(points) / 100)
                usable = len(points) // stretch * stretch
                x, y = np.array(points[:usable], dtype=float).reshape(-1, stretch, 2).mean(1).T
                (handles[method],) = axis.plot(x, y, color=COLORS[method], linewidth=1)
        if key == "b1":
            axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
        if key == "w":
            axis.set_ylim(-0.03, 1.03)
        if logarithmic and axis.lines:
            axis.set_yscale("log", nonpositive="mask")
            axis.yaxis.set_minor_locator(LogLocator(subs=(3,)))
            for which in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
                which("{x:g}")
        axis.set_title(title, loc="left")
        axis.set(xlabel="step", ylabel=name)
        axis.tick_params(labelbottom=True)
        axis.grid(alpha=0.3, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    last.axis("off")
    methods = sorted(handles, key=list(COLORS).index)
    last.legend([handles[m] for m in methods], methods, loc="center", title="a line is one student", frameon=False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


# ---------------------------------------------------------------------------------------------------------------------
# The run card


def card(folder: str | os.PathLike, metrics: dict) -> None:
    """Writes folder/README.md about a run, or about a student in its own folder: what was done, on what, what came out.

    With the front matter of the Hugging Face hub: a saved student and its card can be uploaded as they are. Pictures
    are shown where they lie in `folder`. metrics: those of metrics.json.
    """
    folder, settings = Path(folder), metrics["settings"]
    size, arch = settings["image_size"], settings.get("arch", "unet")
    dataset, methods = f"{settings['dataset']} {size}x{size}" if size else settings["dataset"], settings["kd"]
    cut = f"{settings['prune']:.0%} of the {'channels' if arch == 'unet' else 'blocks'} pruned"
    if settings.get("keep"):
        cut = f"blocks {', '.join(map(str, settings['keep']))} kept"
    elif arch == "sd":
        cut = f"student {settings['student']}"
    folded, net = settings.get("fold_steps"), "net(x_t, t) -> noise"
    task = "text-to-image" if arch in foreign.EXPORT else "unconditional-image-generation"
    front = ["license: mit", f"pipeline_tag: {task}", "tags:"]
    front += [f"- {tag}" for tag in ("diffusion", "ddpm", "knowledge-distillation", "pruning", "pytorch")]
    about, world, commit = f"`{shlex.join(['python', *sys.argv])}`", rank_and_world()[1], _commit()
    about = [about + f" on {world} processes" * (world > 1), *[f"commit `{commit}`"] * bool(commit)]
    about.append(", ".join(f"{name} {value}" for name, value in metrics["machine"].items()))
    net += "" if folded is None else f", 0 <= t < {folded}: the timesteps of diffusion.DDPM().fold({folded})"
    parts = [
        "\n".join(["---", *front, "---"]),
        f"# {dataset}, {cut}, distilled with {', '.join(methods)}" + ("" if folded is None else f" to {folded} steps"),
        "Diffusion students distilled with the losses of LIFT and PLACE (arXiv 2605.19729).",
        "\n".join(f"- {line}" for line in about),
        table(rows(metrics)),
        metrics["protocol"],
        *(
            f"![{name}]({name})"
            for name in ("samples.png", "interpolations.png", "curves.png")
            if (folder / name).exists()
        ),
    ]
    if all((folder / name).exists() for name in FILES):
        parts.append(f"```python\nimport models\n\nnet = models.load({folder.name!r})  # {net}\n```")
    elif (folder / "config.json").exists() and arch in foreign.EXPORT:
        parts.append(foreign.EXPORT[arch].format(student=folder.name, teacher=settings["teacher"]))
    parts += ["## Settings", f"```json\n{json.dumps(settings, indent=2)}\n```"]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", "utf-8")


def _commit() -> str | None:
    """The commit of this code, with "-dirty" if files were changed since; None where git does not know one."""
    here = Path(__file__).resolve().parent
    if not (here / ".git").exists() or not shutil.which("git"):
        return None
    git = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    return subprocess.run(git, check=False, capture_output=True, text=True).stdout.strip() or None


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def main(arguments: list[str] | None = None, extract: Extract | None = None) -> int:
    """The exit code: 0, or 2 and one sentence on stderr. extract: features in the place of Inception's."""
    text = "One table over finished runs; with --num, FID and its relatives of their students."
    parser = argparse.ArgumentParser("evaluate.py", description=text)
    add = parser.add_argument
    add("runs", metavar="RUN", nargs="+", type=Path, help="folder of a run; with --num also a network's")
    add("--num", type=int, help="sample so many images of each network and compare their features")
    add("--dataset", choices=tuple(data.DATASETS), help="the real images, needed with --num")
    add("--data", type=Path, help="where their files are")
    add("--real", type=int, default=50_000, help="how many of them at most, evenly spaced [%(default)s]")
    add("--mode", choices=MODES, default=MODES[0], help=f"as in clean-fid [%(default)s]; the paper: {MODES[1]}")
    add("--prompts", type=Path, help="file with a prompt a line, for networks that read text")
    add("--teacher", help="diffusers pipeline whose text encoders and VAE they take, and which they stand beside "
        "[the run's teacher]")  # fmt: skip
    add("--no-t5", action="store_true", help="without the largest text encoder of Stable Diffusion 3")
    add("--clip", help="CLIP model for the CLIP score with --prompts, such as openai/clip-vit-large-patch14")
    add("--seed", type=int, default=0, help="of the starting noise [%(default)s]")
    add("--sample-steps", type=int, help="DDIM steps [as the run's, else 100, or all of a student of few steps]")
    add("--eta", type=float, help="DDIM eta, 0 deterministic .. 1 ancestral [as the run's, else 0]")
    add("--spacing", choices=("leading", "linspace"), help="of the timesteps [as the run's, else leading]")
    add("--clip-x0", action="store_true", default=None, help="clamp the predicted image at every step [as the run did]")
    add("--guidance", type=float, help="scale of classifier-free guidance, 1: none [as the run's, else 1]")
    add("--process", choices=tuple(PROCESSES), help="what the networks predict [as the run's, else ddpm]")
    add("--vae", help="of networks on latents: folder or hub id [as the run's]")
    add("--batch", type=int, help="images at a time [what fits on a GPU, 256 on a CPU]")
    add("--compile", action="store_true", help="torch.compile the networks: slow to start, faster to sample")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps [%(default)s]")
    add("--out", type=Path, default=Path("runs/evaluation"), help="for samples and scores [%(default)s]")
    options = parser.parse_args(arguments)
    if options.num is None and options.prompts is None:
        return join(options.runs)
    if "RANK" in os.environ and not dist.is_initialized():  # started by torchrun
        # gloo, for nothing but waiting: for the slowest process, and for rank 0 to prepare the real images
        dist.init_process_group("gloo", timeout=timedelta(days=7))
        try:
            return measure(options, extract)
        finally:
            dist.destroy_process_group()
    return measure(options, extract)


def networks(path: Path) -> dict[str, Path]:
    """The saved networks of a run (its student or students) or the one in this folder, as {name: folder}."""
    name, students = path.resolve().name, sorted(file.parent for file in path.glob("student/**/config.json"))
    return {f"{name}-{folder.name}" if len(students) > 1 else name: folder for folder in students or [path]}


def sampler_of(runs: list[Path]) -> dict:
    """How the runs among these folders sampled, from their config.json.

    Raises:
        ValueError: they differ, so one table over them would compare samplers.
    """
    found = {}
    for run in runs:
        path = run / "config.json"
        settings = json.loads(path.read_text("utf-8")) if path.exists() else {}
        for name in SAMPLER:
            if "kd" in settings and found.setdefault(name, settings.get(name)) != settings.get(name):
                raise ValueError(f"the runs were sampled with different {name}: give --{name.replace('_', '-')}")
    return {name: value for name, value in found.items() if value is not None}


def measure(options: argparse.Namespace, extract: Extract | None) -> int:
    """Samples the networks, on all processes; compares them with the real images and prints the table, on rank 0."""
    rank = rank_and_world()[0]
    try:  # all that can be wrong, before hours of sampling
        for name, low in (("num", 6), ("real", 6), ("batch", 1), ("seed", 0)):
            if (value := getattr(options, name)) is not None and value < low:
                raise ValueError(f"--{name} {value} cannot be used, it must be at least {low}")
        device, known = find_device(options.device), sampler_of(options.runs)
        for name, fallback in SAMPLER.items():
            if getattr(options, name) is None:
                setattr(options, name, known.get(name, fallback))
        if not 0 <= options.eta <= 1:
            raise ValueError(f"--eta {options.eta} cannot be used, it must be at least 0 and at most 1")
        if options.dataset is None and options.num is not None:
            raise ValueError(f"--num needs --dataset, the real images: choose from {', '.join(data.DATASETS)}")
        nets, shape = {}, None
        for name, folder in (pair for path in options.runs for pair in networks(path).items()):
            net = foreign.load(folder)
            shape = shape or net.shape
            if name in nets or shape != net.shape:
                raise ValueError(
                    f"{folder} has the name or another image shape of one before: give it a call of its own"
                )
            process = process_of(net, options.process, options.spacing, options.clip_x0)
            if any(process.steps != process_of(other).steps for other in nets.values()):
                raise ValueError(f"{folder} has another number of timesteps than one before: give it a call of its own")
            nets[name] = net
        if options.sample_steps is None:
            options.sample_steps = min(100, process.steps)
        process.timesteps(options.sample_steps)  # refuses numbers out of range
        prompts = text = None
        if any("text" in net.conditions for net in nets.values()):
            prompts, text = prompted(options, device)
            nets = {"teacher": foreign.load(options.teacher), **nets}
            null = {key: value[0] for key, value in text.encode([""]).items()}
            for net in nets.values():
                net.fit(shape, null, 0.0)
        elif options.prompts is not None:
            raise ValueError("--prompts is for networks that read text, and these do not")
        clip = None if options.clip is None else foreign.ClipScore(options.clip, device)
        count = options.num or len(prompts)
        vae = None if options.vae is None else foreign.Vae(options.vae, device)
        if vae is not None:
            if shape[0] != vae.channels:
                raise ValueError(f"--vae {options.vae} has {vae.channels} channels, the networks have {shape[0]}")
            shape = (3, shape[1] * vae.factor, shape[2] * vae.factor)  # of the images
        elif shape[0] not in (1, 3):
            raise ValueError(f"these networks make latents of {shape[0]} channels: name the VAE with --vae")
        if rank == 0 and options.num is not None:
            extract = extract or Inception(options.mode, device)
            real = data.load(options.dataset, options.data, image_size=shape[1], channels=shape[0])
        settings = {"seed": options.seed, "steps": options.sample_steps, "eta": options.eta}
        settings |= {"guidance": options.guidance, "bf16": device.type == "cuda" and torch.cuda.is_bf16_supported()}
        about = {
            **settings,
            "spacing": options.spacing,
            "clip_x0": options.clip_x0,
            **({} if vae is None else vae.record),
        }
        if text is not None:
            about |= {"process": options.process, "prompts": prompts[:count], **text.record}
        room = {name: open_samples(options.out / name, nets[name], count, shape, **about) for name in nets}
    except (ValueError, OSError, ImportError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    for name, net in nets.items():
        if options.compile:
            net.compile()
        run = {"batch": options.batch, "device": device, "progress": rank == 0, "label": f"sampling {name}", "vae": vae}
        if "y" in net.conditions:  # all classes equally often
            run["cond"] = {"y": torch.arange(options.num) % net.config["num_classes"]}
        elif text is not None:
            run["cond"] = lambda rows: text.encode([prompts[i % len(prompts)] for i in rows])
        fill(*room[name], net, process, **settings, **run)
        net.cpu()
    if rank > 0:
        return 0
    if prompts is not None:
        show(options.out, {name: images for name, (images, _) in room.items()}, prompts, clip)
        if options.num is None:
            return 0
    real_features, found = reference(real, extract, count=options.real), []
    protocol = (
        f"features {extractor_name(extract)}, precision and recall k=5; {len(real_features)} of {len(real.images)} "
        f"images of {real.name} (train), {options.num} generated, stored in 8 bits; {process.sampler}, "
        f"{options.sample_steps} steps ({options.spacing}), eta {options.eta:g}, guidance {options.guidance:g}; "
        f"{'bf16' if settings['bf16'] else 'float32'}; seed {options.seed}"
    )
    search = device if device.type == "cuda" else "cpu"  # in float64, which mps lacks
    for name, net in nets.items():
        images, done = room[name]
        fake = features(extract, images, label=f"features of {name}")
        row = {"name": name, "n": options.num, **feature_scores(real_features, fake, search)}
        row |= {"non_finite": int((done == 2).sum()), "parameters": parameters(net), "macs": macs(net)}
        record = json.dumps({**row, "protocol": protocol, "machine": machine()}, indent=1)
        (options.out / name / "scores.json").write_text(record + "\n")
        found.append(row)
    print(f"{fid_table(found, extract)}\n\n{protocol}")
    return 0


def prompted(options: argparse.Namespace, device: torch.device) -> tuple[list[str], "foreign.TextEncoder"]:
    """The prompts and what encodes them; fills in the pipeline's VAE. ValueError, with what would work, without."""
    if options.prompts is None:
        raise ValueError("these networks read text: give --prompts FILE, with a prompt a line")
    if options.teacher is None:
        raise ValueError("these networks need --teacher, the pipeline whose text encoders and VAE they take")
    prompts = [line for line in options.prompts.read_text("utf-8").splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{options.prompts} holds no prompt")
    options.vae = options.vae or options.teacher
    return prompts, foreign.TextEncoder(options.teacher, device, t5=not options.no_t5)


def show(out: Path, rooms: dict[str, np.ndarray], prompts: list[str], clip: Callable | None) -> None:
    """Writes the images of the prompts as files, and some of them side by side; prints the CLIP scores if asked to.

    rooms: of each network the images (n, C, H, W) uint8, whose prompts are these, again and again.
    """
    from PIL import Image

    for name, images in rooms.items():
        for i, image in enumerate(images[: len(prompts)]):
            Image.fromarray(image.transpose(1, 2, 0)).save(out / name / f"{i:05d}.png")
    grid(out / "samples.png", {name: data.to_float(images[:8]) for name, images in rooms.items()}, columns=8, lines=1)
    print(f"{len(prompts)} prompts, an image each: {', '.join(str(out / name) for name in rooms)}, samples.png")
    for name, images in rooms.items() if clip else ():
        print(f"CLIP score {clip(images, [prompts[i % len(prompts)] for i in range(len(images))]):.4f}  {name}")


def join(runs: list[Path]) -> int:
    """Prints one table over finished runs."""
    found, protocols, settings = [], Counter(), {}
    for run in runs:
        path = run / "metrics.json"
        try:
            metrics = json.loads(path.read_text("utf-8"))
            found += rows(metrics)
            protocols[metrics["protocol"]] += 1
            for name, value in metrics.get("settings", {}).items():
                settings.setdefault(name, set()).add(json.dumps(value))
        except OSError as error:
            print(f"evaluate.py: {path}: {error.strerror}; name the folder of a finished run", file=sys.stderr)
            return 2
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            print(f"evaluate.py: {path} is not what train.py writes: {type(error).__name__} {error}", file=sys.stderr)
            return 2
    print(table(found), end="\n\n")
    for line in protocols:
        print(f"WARNING, not the same for all runs: {line}" if len(protocols) > 1 else line)
    for name, values in settings.items():
        if len(values) > 1 and name not in MAY_DIFFER:
            print(f"WARNING: ± mixes runs that differ in {name}: {', '.join(sorted(values))}")
    students = Counter((row["method"], row["parameters"], row["seed"]) for row in found if "seed" in row)
    for (method, _, seed), times in students.items():
        if times > 1:
            print(f"WARNING: {method} with seed {seed} is in {times} runs and counts {times} times")
    return 0


if __name__ == "__main__":
    sys.exit(main())
