"""The images: every data set becomes one `Images` tuple of uint8 pixels that a training step indexes.

    data = load("digits")                                     # or load("folder", "path/to/images", image_size=64)
    index = batch_indices(len(data.images), 32, step, seed)   # (B,) which images step `step` sees
    x0 = to_float(data.images[index])                         # (B, C, H, W) in [-1, 1]
    x0 = random_flip(x0, generator) if data.flip else x0

Folders are decoded and resized once, into a memory-mapped file below `runs/cache/`; after that an epoch costs no
decoding. What lies there may be deleted at any time.
Units: pixels are uint8 0 .. 255 at rest, float32 -1 .. 1 in the network.
"""

import difflib
import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

DIGITS_TRAIN, DIGITS_TEST = 1500, 297  # of scikit-learn's 1,797
SPLITS = ("train", "test", "all")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
CACHE = "runs/cache"
RECIPE = 1  # part of the cache key: raise it when `_decode` changes
MAX_CORRUPT = 0.01  # share of unreadable images that is tolerated


class Images(NamedTuple):
    """One split of one data set."""

    images: np.ndarray  # (N, C, H, W) uint8, in memory or memory-mapped read-only
    labels: np.ndarray | None  # (N,) int64 class numbers from 0, or None
    name: str
    flip: bool  # may a training step mirror these images left to right?


def load(
    name: str,
    data: str | os.PathLike | None = None,
    image_size: int | None = None,
    split: str = "train",
    seed: int = 0,
    *,
    channels: int | None = None,
    cache: str | os.PathLike = CACHE,
) -> Images:
    """Loads a split of a data set by name; `DATASETS` lists them.

    Args:
        name: `digits` (embedded) or `folder` (any folder of images).
        data: where the files are; `folder` needs it, `digits` has none.
        image_size: height and width in pixels; None takes the default of the data set (digits 8, folder 64).
        split: `train`, `test` or `all`. A folder has no test part.
        seed: of the split of digits; the same seed gives the same split.
        channels: 1 gray or 3 RGB; None takes the default of the data set (digits 1, folder 3).
        cache: the folder where decoded images are kept.

    Raises:
        ValueError: an argument that does not fit, or a folder with no images or too many unreadable ones.
        FileNotFoundError: `data` does not exist.
    """
    if name not in DATASETS:
        close = difflib.get_close_matches(name, DATASETS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"unknown data set {name!r}: {hint}known are {', '.join(DATASETS)}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: it is one of {', '.join(SPLITS)}")
    if seed < 0:
        raise ValueError(f"the seed must be 0 or more, got {seed}")
    dataset = DATASETS[name]
    size = dataset.image_size if image_size is None else image_size
    channels = dataset.channels if channels is None else channels
    images, labels = dataset.load(data, size, split, seed, channels, Path(cache))
    return Images(images, labels, name, dataset.flip)


# ---------------------------------------------------------------------------------------------------------------------
# The data sets: a loader takes (data, image_size, split, seed, channels, cache), checks them, returns (images, labels)


def _digits(data, image_size, split, seed, channels, cache):
    """Scikit-learn's 1,797 handwritten digits of 8x8 pixels, as they are or enlarged to 16x16."""
    if data is not None:
        raise ValueError(f"digits are embedded and need no data, got {data}; for your own images use the name 'folder'")
    if image_size not in (8, 16):
        raise ValueError(f"digits come at image size 8 or 16, not {image_size}")
    if channels != 1:
        raise ValueError(f"digits have 1 channel, not {channels}")
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images)[:, None] * (255 / 16)  # (N, 1, 8, 8), the source counts from 0 to 16
    if image_size != 8:
        images = F.interpolate(images, size=image_size, mode="bilinear", align_corners=False)  # (N, 1, 16, 16)
    images = images.round().to(torch.uint8).numpy()
    order = np.random.default_rng(seed).permutation(DIGITS_TRAIN + DIGITS_TEST)
    part = {"train": order[:DIGITS_TRAIN], "test": order[DIGITS_TRAIN:], "all": order}[split]
    return images[part], digits.target[part].astype(np.int64)


def _folder(data, image_size, split, seed, channels, cache):
    """All images below a folder, resized and centre-cropped to a square.

    Labels: the sorted names of the sub-folders, numbered from 0, if every image lies in one; else None.
    """
    if data is None:
        raise ValueError("the data set 'folder' needs data, the folder that holds the images")
    if split == "test":
        raise ValueError("a folder has no test split: keep held-out images in a folder of their own and load that one")
    if image_size < 1:
        raise ValueError(f"the image size must be at least 1 pixel, got {image_size}")
    if channels not in (1, 3):
        raise ValueError(f"images have 1 channel (gray) or 3 (RGB), not {channels}")
    folder = Path(data).resolve()
    files = _image_files(folder)
    groups = [file.partition("/")[0] for file in files] if all("/" in file for file in files) else None
    number = {group: i for i, group in enumerate(sorted(set(groups or [])))}

    stats = [(file, (folder / file).stat()) for file in files]
    key = repr((RECIPE, str(folder), [(file, s.st_size, s.st_mtime_ns) for file, s in stats]))
    digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return decode_once(
        cache / f"{folder.name}-{image_size}x{image_size}x{channels}-{digest}",
        files,
        groups and [number[group] for group in groups],
        lambda file: _decode(folder / file, image_size, channels),
        (channels, image_size, image_size),
    )


class Dataset(NamedTuple):
    load: Callable
    image_size: int  # default
    channels: int  # default
    flip: bool


DATASETS = {
    "digits": Dataset(_digits, image_size=8, channels=1, flip=False),  # a mirrored digit is not a digit
    "folder": Dataset(_folder, image_size=64, channels=3, flip=True),
}


# ---------------------------------------------------------------------------------------------------------------------
# Files of images


def _image_files(folder: Path) -> list[str]:
    """The images below `folder`: sorted relative names with forward slashes. Hidden files and folders are left out."""
    if not folder.exists():
        raise FileNotFoundError(f"there is no folder {folder}; data must name a folder of images")
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; data must name a folder of images")

    def stop(error: OSError):  # os.walk would leave out a folder that it may not read
        raise error

    files = []
    for root, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        images = [n for n in names if n.lower().endswith(SUFFIXES) and not n.startswith(".")]
        files += [(Path(root) / name).relative_to(folder).as_posix() for name in images]
    if not files:
        raise ValueError(f"no images in {folder} or below it; looked for {', '.join(SUFFIXES)}")
    return sorted(files)


def _decode(file: Path, image_size: int, channels: int) -> np.ndarray:
    """One image as (C, image_size, image_size) uint8.

    Upright by its EXIF tag, transparency over white, short side resized to `image_size` (bilinear, antialiased: the
    published LSUN recipe), centre-cropped.
    """
    from PIL import Image, ImageOps
    from torchvision.transforms import functional as TF

    with Image.open(file) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode[0] in "IF":  # 16-bit gray: convert() would clip it to white
            pixels = np.asarray(image)
            if image.mode == "F" or pixels.max() > 65535:
                raise ValueError("pixels of more than 16 bits have no known range")
            image = Image.fromarray((pixels / 257).round().astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("L" if channels == 1 else "RGB")
        image = TF.center_crop(TF.resize(image, image_size, TF.InterpolationMode.BILINEAR), image_size)
        pixels = np.asarray(image).reshape(image_size, image_size, channels)  # (H, W, C)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))  # (C, H, W)


def decode_once(
    entry: Path, items: Sequence, labels: Sequence[int] | None, decode: Callable, shape: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray | None]:
    """Images (N, C, H, W) uint8, memory-mapped, and labels (N,) from the cache folder `entry`, made first if missing.

    `decode(item)` gives one image of `shape` (C, H, W). Items that it cannot decode are left out with their label,
    counted, and named in `skipped.txt`. The entry is built under a temporary name and renamed when it is whole, so a
    kill leaves no half entry, and several processes may build the same one.

    Raises:
        ValueError: more than 1 % of the items cannot be decoded.
    """
    if not entry.exists():
        entry.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=entry.parent, prefix=".building-") as building:
            whole = Path(building) / "entry"
            whole.mkdir()
            _build(whole, entry.name, items, labels, decode, shape)
            try:
                whole.rename(entry)
            except OSError:
                if not entry.exists():  # it does if another process was faster: then use that one
                    raise
    skipped = entry / "skipped.txt"
    if skipped.exists():
        names = skipped.read_text("utf-8", "surrogateescape").splitlines()
        tqdm.write(
            f"{len(names)} of {len(items)} images are unreadable and left out: {names[0]} ... see {skipped}", sys.stderr
        )
    images = np.load(entry / "images.npy", mmap_mode="r")
    return images, np.load(entry / "labels.npy") if labels is not None else None


def _build(entry: Path, name: str, items: Sequence, labels: Sequence[int] | None, decode: Callable, shape: tuple):
    """Decodes all items into `entry`: images.npy, labels.npy if there are labels, skipped.txt if any failed."""

    def attempt(item):
        try:
            return decode(item)
        except Exception as error:  # decoders raise almost anything on broken bytes; every one is counted and named
            return error

    kept, failed = [], []
    with (
        open(entry / "images.npy", "wb") as file,
        ThreadPoolExecutor() as pool,
        tqdm(total=len(items), desc=f"decoding {name}", unit="img") as bar,
    ):
        _npy_header(file, (len(items), *shape))
        for start in range(0, len(items), 256):  # in chunks, so that decoded images do not pile up in memory
            for i, image in enumerate(pool.map(attempt, items[start : start + 256]), start):
                if isinstance(image, Exception):
                    failed.append((items[i], image))
                else:
                    file.write(image.tobytes())
                    kept.append(i)
                bar.update()
        file.seek(0)
        _npy_header(file, (len(kept), *shape))
    lines = [f"{item}: {error!r}" for item, error in failed]
    if len(failed) > MAX_CORRUPT * len(items):
        raise ValueError(
            f"{len(failed)} of {len(items)} images cannot be read, more than {MAX_CORRUPT:.0%}; remove or repair them. "
            f"The first are {'; '.join(lines[:3])}"
        ) from failed[0][1]
    if failed:
        (entry / "skipped.txt").write_text("\n".join(lines) + "\n", "utf-8", "surrogateescape")
    if labels is not None:
        np.save(entry / "labels.npy", np.asarray(labels, dtype=np.int64)[kept])


def _npy_header(file, shape: tuple[int, ...]):
    """Writes the header of a uint8 .npy file: always 128 bytes here, so the true count can replace the first guess."""
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    assert file.tell() == 128, f".npy header of {file.tell()} bytes"


# ---------------------------------------------------------------------------------------------------------------------
# From images to batches


def batch_indices(n: int, batch: int, step: int, seed: int) -> np.ndarray:
    """Which of `n` images training step `step` sees: (batch,) int64, a pure function of the four numbers.

    Epochs are independent permutations, one per (seed, epoch), laid end to end and cut into batches: a batch may
    straddle epochs and may exceed n. Nothing has to be stored to resume, and a rank takes its slice of the result.

    Raises:
        ValueError: n or batch below 1, step or seed below 0.
    """
    if n < 1 or batch < 1 or step < 0 or seed < 0:
        raise ValueError(f"batch_indices needs n, batch >= 1 and step, seed >= 0, got {n=}, {batch=}, {step=}, {seed=}")
    first, stop = step * batch, (step + 1) * batch
    epochs = range(first // n, (stop - 1) // n + 1)
    return np.concatenate(
        [_permutation(n, seed, epoch)[max(first - epoch * n, 0) : stop - epoch * n] for epoch in epochs]
    )


@lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(n)


def to_float(images: np.ndarray | Tensor) -> Tensor:
    """uint8 pixels 0 .. 255 to float32 -1 .. 1, same shape. A tensor stays on its device: move it first, as bytes.

    Raises:
        ValueError: images that are not uint8.
    """
    images = images if isinstance(images, Tensor) else torch.tensor(images)
    if images.dtype != torch.uint8:
        raise ValueError(f"to_float needs uint8 pixels, got {images.dtype}")
    return images.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """The inverse of `to_float`: floats, clamped to -1 .. 1, to the nearest uint8 pixel 0 .. 255, same shape.

    Raises:
        ValueError: x that is not floating point.
    """
    if not x.is_floating_point():
        raise ValueError(f"to_uint8 needs floats in [-1, 1], got {x.dtype}")
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def random_flip(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Mirrors each sample of x (B, C, H, W) left to right with probability 1/2, as the generator decides."""
    where = x.device if generator is None else generator.device
    mirrored = torch.rand(len(x), generator=generator, device=where) < 0.5  # (B,)
    return torch.where(mirrored.to(x.device)[:, None, None, None], x.flip(-1), x)
