"""The images: every data set becomes one `Images` tuple of uint8 pixels that a training step indexes.

    data = load("digits")                                     # or load("folder", "path/to/images", image_size=64)
    index = batch_indices(len(data.images), 32, step, seed)   # (B,) which images step `step` sees
    x0 = to_float(data.images[index])                         # (B, C, H, W) in [-1, 1]
    x0 = mirror(x0, torch.rand(len(x0)) < 0.5) if data.flip else x0

    for pixels, cond in batches(data, 32, seed, start=step):  # the same images, fetched a few steps ahead
        x0 = to_float(pixels.to(device, non_blocking=True))

    python data.py encode --vae stabilityai/sd-vae-ft-ema --data IMAGES --out LATENTS     # images to latents, once
    python data.py encode --vae PIPELINE --text PIPELINE --data IMAGES --out LATENTS      # and their captions with them

Images are decoded and resized once, into a memory-mapped file below `runs/cache/`; after that an epoch costs no
decoding. What lies there may be deleted at any time. Sets too large to keep (LSUN bedroom: 596 GB) are decoded whenever
they are indexed.
Units: pixels are uint8 0 .. 255 at rest, float32 -1 .. 1 in the network; latents are scaled to about unit variance.
"""

import argparse
import csv
import difflib
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import shutil
import sys
import tarfile
import tempfile
import textwrap
import threading
import zipfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

DIGITS_TRAIN, DIGITS_TEST = 1500, 297  # of scikit-learn's 1,797
SPLITS = ("train", "test", "all")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
ROOT = "data"  # where official files are looked for, and downloaded to, when no folder is given
CACHE = "runs/cache"
MAX_CACHE = 100e9  # bytes: a larger set is decoded whenever it is used, not kept. CelebA 2 GB, LSUN church 25 GB
RECIPE = 1  # part of the cache key: raise it when `_decode` changes
MAX_CORRUPT = 0.01  # share of unreadable images that is tolerated
CELEBA_IMAGE, CELEBA_FACE = (178, 218), (25, 57, 25 + 128, 57 + 128)  # width, height; left, top, right, bottom


class Images(NamedTuple):
    """One split of one data set."""

    # (N, C, H, W) uint8, in memory, memory-mapped read-only or decoded when indexed; latents: (N, 2, C, H, W) float32
    images: "np.ndarray | OnTheFly | Latents"
    labels: np.ndarray | None  # (N,) int64 class numbers from 0, or None
    name: str
    flip: bool  # may a training step mirror these images left to right?

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one sample."""
        return tuple(self.images.shape[-3:])

    @property
    def record(self) -> dict[str, Any] | None:
        """How latents were made, see `encode`; None for pixels."""
        return getattr(self.images, "record", None)

    @property
    def no_condition(self) -> dict[str, Tensor] | None:
        """The embedding of the empty prompt, as `conditions` gives those of captions, for one image; None without."""
        return getattr(self.images, "no_condition", None)

    def conditions(self, index: np.ndarray) -> dict[str, Tensor]:
        """What is known of these images: {"y": (B,) int64} if there are labels, and the embeddings of their captions
        in bfloat16 if there are captions, {"text": (B, L, D)} and for Stable Diffusion 3 also {"pooled": (B, P)}."""
        labels = {} if self.labels is None else {"y": torch.from_numpy(self.labels[index])}
        return labels | (self.images.captions(index) if isinstance(self.images, Latents) else {})


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
        name: `digits` (embedded), `folder` (any folder of images), `celeba`, `lsun_bedroom`, `lsun_church`, `cifar10`,
            `latents` (what `encode` wrote), `imagenet` (the same, of ImageNet).
        data: where the files are; `folder` and latents need it, `digits` has none. The others take a folder with the
            official files, packed or unpacked, or any folder of images, and say on stderr which it was; None means the
            folder `data` below the working directory, to which celeba and cifar10 are downloaded if they are not there.
        image_size: height and width in pixels; None takes the default of the data set.
        split: `train`, `test` or `all`. The official splits where there are some; a folder has no test part.
        seed: of the split of digits; the same seed gives the same split.
        channels: 1 gray or 3 RGB; None takes the default of the data set (digits 1, others 3).
        cache: the folder where decoded images are kept.

    Raises:
        ValueError: an argument that does not fit, files that are not what they should be, or a folder with no images
            or too many unreadable ones.
        OSError: files are missing (FileNotFoundError), cannot be downloaded, or do not fit on the disk when decoded.
        ImportError: LSUN without the library lmdb.
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


def _folder(data, image_size, split, seed, channels, cache, *, name="folder", wanted=(), face=None):
    """All images below a folder, resized and centre-cropped to a square.

    Labels: the sorted names of the sub-folders, numbered from 0, if every image lies in one; else None.
    Other data sets come here with their `name` when the folder holds none of the files that they `wanted`.
    """
    _check_shape(image_size, channels)
    if data is None:
        raise ValueError("the data set 'folder' needs data, the folder that holds the images")
    if split == "test":
        raise ValueError("a folder has no test split: keep held-out images in a folder of their own and load that one")
    folder = Path(data).resolve()
    files = _image_files(folder, wanted)
    if name != "folder":
        _say(f"{name}: no {' or '.join(wanted)} in {folder}, so its {len(files):,} images are taken as a plain folder")
    labels = _labels(files)
    stamps = str(folder), [(file, *_stamp(folder / file)[1:]) for file in files]
    source = Source(folder.name, files, lambda file: folder / file, stamps, labels)
    return _decoded(source, image_size, channels, cache, face)


def _labels(files: list[str]) -> list[int] | None:
    """The numbers of the sub-folders, in the order of their names, in which the files lie; None if not all do."""
    groups = [file.partition("/")[0] for file in files]
    number = {group: i for i, group in enumerate(sorted(set(groups)))}
    return [number[group] for group in groups] if all("/" in file for file in files) else None


def _celeba(data, image_size, split, seed, channels, cache):
    """CelebA as aligned by its authors: the official split, and the square around the face that ddim cuts out.

    162,770 images to train on (partition 0), 19,962 to test (partition 2), 202,599 in all. No labels.
    """
    from torchvision.datasets import CelebA, utils

    _check_shape(image_size, channels)
    zipped, partition = "img_align_celeba.zip", "list_eval_partition.txt"
    forms = {zipped: "img_align_celeba", partition: "list_eval_partition.csv"}  # unpacked; as Kaggle has it
    source = "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"

    def find(folder, name):
        return next((folder / form for form in (name, forms[name]) if (folder / form).exists()), None)

    folder = _official_folder(data, "img_align_celeba")
    home = next((home for home in (folder / "celeba", folder) if find(home, zipped)), None)
    if data is None:
        home = home or folder / "celeba"  # as torchvision lays it out
        for file_id, md5, name in CelebA.file_list:
            if name in forms and not find(home, name):
                fetch = partial(utils.download_file_from_google_drive, file_id, filename=name, md5=md5)
                _download(home / name, fetch, f"{zipped} and {partition} from {source}")
    elif home is None:
        wanted = (zipped, "img_align_celeba/")
        return _folder(data, image_size, split, seed, channels, cache, name="celeba", wanted=wanted, face=CELEBA_FACE)

    pictures, table = find(home, zipped), find(home, partition)
    if table is None:
        raise FileNotFoundError(
            f"{partition} is missing in {home}; it says which images of CelebA are for training: fetch it from "
            f"{source} and put it beside {pictures.name}"
        )
    numbers = {"train": ("0",), "test": ("2",), "all": ("0", "1", "2")}[split]
    rows = [line.replace(",", " ").split() for line in table.read_text("utf-8").splitlines()]
    names = [row[0] for row in rows if len(row) == 2 and row[1] in numbers]
    if not names:
        raise ValueError(f"{table} names no image of the {split} split; its lines must read like '000001.jpg 0'")
    _say(f"celeba: {pictures.name} and {table.name} in {home}, {len(names):,} images in the {split} split")
    if pictures.suffix == ".zip":
        archive, stamps = _open_zip(pictures), _stamp(pictures)
        read = lambda name: io.BytesIO(archive.read(f"img_align_celeba/{name}"))  # noqa: E731
    else:
        nested = pictures / "img_align_celeba"  # as Kaggle's copy unpacks
        pictures = nested if nested.is_dir() else pictures
        stamps = str(pictures), sorted((file.name, *_stamp(file)[1:]) for file in os.scandir(pictures))
        read = lambda name: pictures / name  # noqa: E731
    return _decoded(Source(f"celeba-{split}", names, read, stamps, None), image_size, channels, cache, CELEBA_FACE)


def _lsun(name, category, data, image_size, split, seed, channels, cache):
    """One category of LSUN from its lmdb, in the order of the keys. The test split is LSUN's val, of 300 images.

    torchvision's own LSUN is not used: it writes its list of keys into the working directory as a pickle, and trusts
    any pickle of that name that it finds there.
    """
    _check_shape(image_size, channels)
    parts = {"train": f"{category}_train_lmdb", "test": f"{category}_val_lmdb"}
    if split not in parts:
        raise ValueError("LSUN keeps its splits in separate files: load 'train' or 'test', not 'all'")
    folder = _official_folder(data, *parts.values())
    file = folder / parts[split] / "data.mdb"
    if file.exists():
        database = _open_lmdb(file.parent.resolve())
        with database.begin() as transaction:
            keys = list(transaction.cursor().iternext(values=False))
        _say(f"{name}: {len(keys):,} images in the lmdb {file.parent}")

        def read(key):
            with database.begin() as transaction:
                return io.BytesIO(transaction.get(key))

        return _decoded(Source(f"{name}-{split}", keys, read, _stamp(file), None), image_size, channels, cache)
    if data is None:
        raise FileNotFoundError(
            f"LSUN is not downloaded automatically: fetch http://dl.yf.io/lsun/scenes/{parts[split]}.zip, unzip it in "
            f"{folder}, or name the folder that holds {parts[split]}, or a folder of images, with --data"
        )
    wanted = (f"{parts[split]}/ (unzipped)",)
    return _folder(data, image_size, split, seed, channels, cache, name=name, wanted=wanted)


def _cifar10(data, image_size, split, seed, channels, cache):
    """CIFAR-10 from its official batches: 50,000 images to train on, 10,000 to test, ten classes as labels."""
    from torchvision.datasets import CIFAR10, utils

    folder = _official_folder(data, CIFAR10.base_folder)
    place = next((p for p in (folder / CIFAR10.base_folder, folder / CIFAR10.filename) if p.exists()), None)
    if place is None and data is not None:
        wanted = (f"{CIFAR10.base_folder}/", CIFAR10.filename)
        return _folder(data, image_size, split, seed, channels, cache, name="cifar10", wanted=wanted)
    if (image_size, channels) != (32, 3):
        raise ValueError(f"CIFAR-10 has 3 channels at image size 32, not {channels} at {image_size}")
    if place is None:
        place = folder / CIFAR10.filename
        fetch = partial(utils.download_url, CIFAR10.url, filename=CIFAR10.filename, md5=CIFAR10.tgz_md5)
        _download(place, fetch, f"it from {CIFAR10.url}")
    _say(f"cifar10: the official batches in {place}")
    parts = {"train": CIFAR10.train_list, "test": CIFAR10.test_list, "all": CIFAR10.train_list + CIFAR10.test_list}
    md5s = dict(parts[split])  # file -> md5
    if place.is_dir():
        raw = {name: (place / name).read_bytes() for name in md5s if (place / name).exists()}
    else:
        if not utils.check_integrity(place, CIFAR10.tgz_md5):
            raise ValueError(f"{place} is not the published file or is damaged: fetch {CIFAR10.url} again")
        with tarfile.open(place) as archive:  # one pass over all files, for going back means unpacking again
            raw = {os.path.basename(file.name): archive.extractfile(file).read() for file in archive if file.isfile()}
    contents = []
    for name, md5 in md5s.items():  # a batch is a pickle, which can run anything: only the published ones are opened
        if hashlib.md5(raw.get(name, b""), usedforsecurity=False).hexdigest() != md5:
            wrong = "is not the published file" if name in raw else "is missing"
            raise ValueError(f"{name} {wrong} in {place}, so the data is not read: fetch {CIFAR10.url} again")
        contents.append(pickle.loads(raw[name], encoding="latin1"))
    images = np.concatenate([batch["data"] for batch in contents]).reshape(-1, 3, 32, 32)  # (N, C, H, W)
    return images, np.concatenate([batch["labels"] for batch in contents]).astype(np.int64)


def _latents(data, image_size, split, seed, channels, cache):
    """Latents of images of `image_size`, from `encode` or in TinyFusion's layout; there is one split."""
    if data is None:
        raise ValueError(
            "latents need --data, the folder that `python data.py encode --vae VAE --data IMAGES --out FOLDER` wrote"
        )
    if split == "test":
        raise ValueError("a folder of latents has no test split: encode held-out images into a folder of their own")
    folder = Path(data).resolve()
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; data must name a folder of latents")
    if (folder / RECORD).exists():
        latents = Shards(folder)
        if image_size is not None and latents.record["image_size"] != image_size:
            raise ValueError(
                f"{folder} holds latents of images of {latents.record['image_size']} pixels, not of {image_size}: "
                f"use --image-size {latents.record['image_size']}"
            )
        return latents, latents.labels
    features, labels = sorted(folder.glob("*_features")), sorted(folder.glob("*_labels"))
    if not features or not labels:
        raise ValueError(f"{folder} holds no latents: neither {RECORD} nor the folders *_features and *_labels")
    latents = OnePerFile(features[0])
    return latents, latents.read_labels(labels[0], cache)


class Dataset(NamedTuple):
    load: Callable
    image_size: int | None  # default; None: what the files say
    channels: int | None
    flip: bool


DATASETS = {
    "digits": Dataset(_digits, image_size=8, channels=1, flip=False),  # a mirrored digit is not a digit
    "folder": Dataset(_folder, image_size=64, channels=3, flip=True),
    "celeba": Dataset(_celeba, image_size=64, channels=3, flip=True),
    "lsun_bedroom": Dataset(partial(_lsun, "lsun_bedroom", "bedroom"), image_size=256, channels=3, flip=True),
    "lsun_church": Dataset(partial(_lsun, "lsun_church", "church_outdoor"), image_size=256, channels=3, flip=True),
    "cifar10": Dataset(_cifar10, image_size=32, channels=3, flip=True),
    "latents": Dataset(_latents, image_size=None, channels=None, flip=True),
    "imagenet": Dataset(_latents, image_size=256, channels=None, flip=True),
}


def _say(text: str):
    tqdm.write(text, sys.stderr)  # tqdm's, so that progress bars stay whole


def _check_shape(image_size: int, channels: int):
    if image_size < 1:
        raise ValueError(f"the image size must be at least 1 pixel, got {image_size}")
    if channels not in (1, 3):
        raise ValueError(f"images have 1 channel (gray) or 3 (RGB), not {channels}")


# ---------------------------------------------------------------------------------------------------------------------
# Files of images


class Source(NamedTuple):
    """Encoded images, wherever they lie."""

    name: str
    items: Sequence  # what `read` takes, one per image, in order
    read: Callable  # item -> path or binary file
    stamps: Any  # its repr changes when the files change
    labels: list[int] | None


def _stamp(file: Path | os.DirEntry) -> tuple[str, int, int]:
    stat = file.stat()
    return os.fspath(file), stat.st_size, stat.st_mtime_ns


def _official_folder(data: str | os.PathLike | None, *names: str) -> Path:
    """Where to look for official files: `data`, or around it if it is itself one of the folders `names`."""
    if data is None:
        return Path(ROOT).resolve()
    folder = Path(data).resolve()
    return folder.parent if folder.name in names else folder


def _download(file: Path, fetch: Callable, needed: str):
    """`fetch(root=folder)` must put file.name into that folder and check it; only then does `file` appear.

    Raises:
        OSError: it failed; the message says what is `needed` from where, and where it goes.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=".downloading-") as folder:
            fetch(root=folder)
            (Path(folder) / file.name).replace(file)
    except Exception as error:  # network libraries raise almost anything, and a user can do the same about all of it
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200)
        raise OSError(
            f"{file.name} cannot be downloaded ({reason}). Fetch {needed} and put it into {file.parent}, or into any "
            "folder and name that with --data"
        ) from error


def _open_zip(file: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(file)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{file} is damaged, fetch it again: {error}") from error


@lru_cache  # a process may open an lmdb only once
def _open_lmdb(folder: Path):
    try:
        import lmdb
    except ImportError as error:
        raise ImportError("LSUN needs the library lmdb: pip install lmdb") from error
    try:  # no lock file, so that the folder may be read-only; no readahead, for the order of reading is random
        return lmdb.open(str(folder), readonly=True, lock=False, readahead=False)
    except lmdb.Error as error:
        raise ValueError(f"{folder} cannot be opened as an lmdb: {error}") from error


def _image_files(folder: Path, wanted: Sequence[str] = ()) -> list[str]:
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
        raise ValueError(f"no images in {folder} or below it; looked for {', '.join([*wanted, *SUFFIXES])}")
    return sorted(files)


def _decode(file: Path | io.BytesIO, image_size: int, channels: int, face: tuple | None = None) -> np.ndarray:
    """One image as (C, image_size, image_size) uint8.

    Upright by its EXIF tag, transparency over white, short side resized to `image_size` (bilinear, antialiased: the
    published LSUN recipe), centre-cropped. An image of CelebA's size is first cut to `face`, a box in pixels.
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
        if face and image.size == CELEBA_IMAGE:
            image = image.crop(face)
        image = TF.center_crop(TF.resize(image, image_size, TF.InterpolationMode.BILINEAR), image_size)
        pixels = np.asarray(image).reshape(image_size, image_size, channels)  # (H, W, C)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))  # (C, H, W)


def _decoded(source: Source, image_size: int, channels: int, cache: Path, face: tuple | None = None):
    """The pixels and labels of a source: from the cache, or decoded whenever they are indexed if they are too many."""
    if not source.items:
        raise ValueError(f"{source.name} holds no images")
    shape = (channels, image_size, image_size)
    decode = lambda item: _decode(source.read(item), image_size, channels, face)  # noqa: E731
    size = len(source.items) * math.prod(shape)
    if size > MAX_CACHE:
        _say(f"{source.name}: decoded it would take {size / 1e9:.0f} GB, so images are decoded whenever they are used")
        labels = source.labels and np.asarray(source.labels, dtype=np.int64)
        return OnTheFly(source.items, labels, decode, shape), labels
    key = repr((RECIPE, face, source.stamps, source.items))
    digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    entry = cache / f"{source.name}-{image_size}x{image_size}x{channels}-{digest}"
    return decode_once(entry, source.items, source.labels, decode, shape)


class OnTheFly:
    """Images (N, C, H, W) uint8 that a pool of threads decodes whenever they are indexed, as one indexes an array.

    In the place of one that `decode(item)` cannot decode comes the next of the same label, and it is named on stderr.
    """

    def __init__(self, items: Sequence, labels: np.ndarray | None, decode: Callable, shape: tuple[int, int, int]):
        self.items, self.labels, self.decode, self.shape = items, labels, decode, (len(items), *shape)
        self.dtype = np.dtype(np.uint8)
        self.rows, self.unreadable = np.arange(len(items)), {}
        self.pool, self.lock = ThreadPoolExecutor(), threading.Lock()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: Any) -> np.ndarray:
        """Images (B, C, H, W) of a slice, an integer or a boolean array; one image (C, H, W) of an integer.

        Raises:
            ValueError: more than 1 % of all images turned out to be unreadable.
        """
        rows = self.rows[index]
        if rows.ndim == 0:
            return self._image(int(rows))
        images = np.empty((len(rows), *self.shape[1:]), np.uint8)
        for i, image in enumerate(self.pool.map(self._image, rows.tolist())):
            images[i] = image
        return images

    def stand_in(self, i: int) -> int:
        """The number of the image that has been found in the place of i, usually i itself."""
        like = lambda j: self.labels is None or self.labels[j] == self.labels[i]  # noqa: E731
        return next(j for j in (*range(i, len(self)), *range(i)) if j not in self.unreadable and like(j))

    def _image(self, i: int) -> np.ndarray:
        for j in itertools.chain(range(i, len(self)), range(i)):
            if j in self.unreadable or (self.labels is not None and self.labels[j] != self.labels[i]):
                continue
            try:
                return self.decode(self.items[j])
            except Exception as error:  # as in _build
                with self.lock:
                    self.unreadable[j] = f"{self.items[j]}: {error!r}"
                    if len(self.unreadable) > MAX_CORRUPT * len(self):
                        raise _too_many(list(self.unreadable.values()), len(self)) from error
                _say(f"{self.unreadable[j]}: unreadable, the next image takes its place")
        raise ValueError(f"no image of the label of {self.items[i]} can be read")


def decode_once(
    entry: Path, items: Sequence, labels: Sequence[int] | None, decode: Callable, shape: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray | None]:
    """Images (N, C, H, W) uint8, memory-mapped, and labels (N,) from the cache folder `entry`, made first if missing.

    `decode(item)` gives one image of `shape` (C, H, W). Items that it cannot decode are left out with their label,
    counted, and named in `skipped.txt`. The entry is built under a temporary name and renamed when it is whole, so a
    kill leaves no half entry, and several processes may build the same one.

    Raises:
        ValueError: more than 1 % of the items cannot be decoded.
        OSError: the disk has no room for all images.
    """
    if not entry.exists():
        entry.parent.mkdir(parents=True, exist_ok=True)
        size, free = len(items) * math.prod(shape), shutil.disk_usage(entry.parent).free
        if size > free:
            raise OSError(
                f"decoded images of {entry.name} take {size / 1e9:.1f} GB and {entry.parent} has room for "
                f"{free / 1e9:.1f} GB: make room, or make that folder a link to a larger disk"
            )
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
        _say(f"{len(names)} of {len(items)} images are unreadable and left out: {names[0]} ... see {skipped}")
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
        raise _too_many(lines, len(items)) from failed[0][1]
    if failed:
        (entry / "skipped.txt").write_text("\n".join(lines) + "\n", "utf-8", "surrogateescape")
    if labels is not None:
        np.save(entry / "labels.npy", np.asarray(labels, dtype=np.int64)[kept])


def _too_many(lines: list[str], n: int) -> ValueError:
    return ValueError(
        f"{len(lines)} of {n} images cannot be read, more than {MAX_CORRUPT:.0%}; remove or repair them. "
        f"The first are {'; '.join(lines[:3])}"
    )


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


def batches(
    images: Images,
    batch: int,
    seed: int,
    start: int = 0,
    *,
    rows: slice = slice(None),
    workers: int = 2,
    pin: bool | None = None,
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """The images of steps start, start + 1, ... without end, fetched by threads a few steps ahead.

    Args:
        batch: images per step, over all ranks.
        rows: the part of a batch that this rank sees.
        workers: threads that fetch, and half the number of batches that wait in memory.
        pin: in page-locked memory, so that `.to(device, non_blocking=True)` overlaps; None: if there is a GPU.

    Yields:
        images.images[batch_indices(len(images.images), batch, step, seed)[rows]], a tensor (B, C, H, W) uint8 or
        (B, 2, C, H, W) float32, and their `images.conditions`.

    Raises:
        what indexing the images raises, at the step that it concerns. Closing the generator stops the threads.
    """
    pin = torch.cuda.is_available() if pin is None else pin

    def fetch(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        index = batch_indices(len(images.images), batch, step, seed)[rows]
        pixels = torch.from_numpy(images.images[index])
        cond = images.conditions(index)
        return (
            (pixels.pin_memory(), {key: value.pin_memory() for key, value in cond.items()}) if pin else (pixels, cond)
        )

    pool = ThreadPoolExecutor(workers)
    try:
        waiting = deque(pool.submit(fetch, step) for step in range(start, start + 2 * workers))
        for step in itertools.count(start + 2 * workers):
            yield waiting.popleft().result()
            waiting.append(pool.submit(fetch, step))
    finally:
        pool.shutdown(cancel_futures=True)


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


def mirror(x: Tensor, which: Tensor) -> Tensor:
    """Samples of x (B, C, H, W) mirrored left to right where `which` (B,) is true, the others as they are."""
    return torch.where(which[:, None, None, None], x.flip(-1), x)


# ---------------------------------------------------------------------------------------------------------------------
# Latents

RECORD = "latents.json"  # in a folder of latents: how they were made
SHARD = 8192  # images in a file of latents


class Latents:
    """Latents (N, 2, C, H, W), of an image and of its mirror image, indexed as an array: (B, 2, C, H, W) float32."""

    record: dict[str, Any]  # as in RECORD
    shape: tuple[int, ...]
    dtype = np.dtype(np.float32)
    no_condition: dict[str, Tensor] | None = None

    def captions(self, index: np.ndarray) -> dict[str, Tensor]:
        """The embeddings of the captions of these images, see `Images.conditions`; {} without captions."""
        return {}

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        rows = np.arange(len(self))[index]
        latents = np.empty((rows.size, *self.shape[1:]), np.float32)
        self._read(rows.reshape(-1), latents)
        return latents.reshape(*rows.shape, *self.shape[1:])


class Shards(Latents):
    """What `encode` wrote into `folder`.

    Raises:
        ValueError, FileNotFoundError: the record or a shard is damaged, or one is missing.
    """

    def __init__(self, folder: Path):
        try:
            self.record = json.loads((folder / RECORD).read_text("utf-8"))
            n, size = self.record["count"], self.record["size"]
            self.shape = (n, 2, *size)
            self.shards = []
            for i in range(math.ceil(n / self.record["shard"])):
                shard = np.load(_shard(folder, i), mmap_mode="r")
                if shard.shape != (min(self.record["shard"], n - i * self.record["shard"]), 2, *size):
                    raise ValueError(f"{_shard(folder, i).name} is of shape {shard.shape}")
                self.shards.append(shard)
            self.labels = np.load(folder / "labels.npy") if self.record["classes"] else None
            self.texts = {name: [] for name in self.record.get("captions", {})}  # of each kind of embedding the shards
            for name, shards in self.texts.items():
                stored = tuple(self.record["captions"][name]["stored"])
                for i, latents in enumerate([*self.shards, None]):
                    file = _text_shard(folder, name, None if latents is None else i)
                    shards.append(np.load(file, mmap_mode="r"))
                    if shards[-1].shape != (1 if latents is None else len(latents), *stored):
                        raise ValueError(f"{file.name} is of shape {shards[-1].shape}")
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{error.filename} is missing: run the command that encoded into {folder} again, that completes it"
            ) from error
        except (ValueError, KeyError, TypeError, EOFError) as error:
            raise ValueError(f"{folder} holds damaged latents ({error}): remove that file and encode again") from error

    def _read(self, rows: np.ndarray, latents: np.ndarray) -> None:
        shards, inside = rows // self.record["shard"], rows % self.record["shard"]
        for i in np.unique(shards):
            latents[shards == i] = self.shards[i][inside[shards == i]]

    @property
    def no_condition(self) -> dict[str, Tensor] | None:
        empty = {name: shards[-1] for name, shards in self.texts.items()}
        return {name: self._embeddings(name, shard)[0] for name, shard in empty.items()} or None

    def captions(self, index: np.ndarray) -> dict[str, Tensor]:
        rows, found = np.arange(len(self))[index], {}
        shards, inside = rows // self.record["shard"], rows % self.record["shard"]
        for name, files in self.texts.items():
            bits = np.empty((len(rows), *files[-1].shape[1:]), np.uint16)
            for i in np.unique(shards):
                bits[shards == i] = files[i][inside[shards == i]]
            found[name] = self._embeddings(name, bits)
        return found

    def _embeddings(self, name: str, bits: np.ndarray) -> Tensor:
        """(B, *stored) bits of bfloat16, which numpy lacks -> (B, *shape) bfloat16; what is not stored is zero."""
        values = torch.from_numpy(bits.astype(np.int32)).to(torch.int16).view(torch.bfloat16)
        shape = self.record["captions"][name]["shape"]
        pad = [
            n for whole, own in zip(reversed(shape), reversed(values.shape[1:]), strict=True) for n in (0, whole - own)
        ]
        return F.pad(values, pad)


class OnePerFile(Latents):
    """TinyFusion's layout: a folder with n.npy, float32 (2, C, H, W), for image n; nothing says which VAE made them."""

    def __init__(self, folder: Path):
        self.files = sorted(folder.glob("*.npy"), key=lambda file: file.name)
        if not self.files:
            raise ValueError(f"{folder} holds no .npy files")
        self.shape = (len(self.files), *np.load(self.files[0], mmap_mode="r").shape[-4:])
        self.record = {"vae": None, "count": len(self.files), "size": list(self.shape[2:])}

    def _read(self, rows: np.ndarray, latents: np.ndarray) -> None:
        for i, row in enumerate(rows):
            latents[i] = np.load(self.files[row]).reshape(self.shape[1:])

    def read_labels(self, folder: Path, cache: Path) -> np.ndarray:
        """The numbers in the files of `folder` that are called as the latents, (N,) int64; read once, then cached."""
        key = hashlib.sha256(repr((folder.resolve(), len(self), self.files[-1].stat().st_mtime_ns)).encode())
        path = cache / f"labels-{key.hexdigest()[:16]}.npy"
        if not path.exists():
            if missing := [file.name for file in self.files if not (folder / file.name).exists()]:
                raise FileNotFoundError(f"{folder / missing[0]} is missing, the label of {missing[0]} of the latents")
            names = tqdm([file.name for file in self.files], desc="labels", unit="file", disable=len(self) < 1000)
            with ThreadPoolExecutor() as pool:
                labels = list(pool.map(lambda name: int(np.load(folder / name).reshape(())), names))
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(f".{os.getpid()}.npy")
            np.save(part, np.asarray(labels, np.int64))
            os.replace(part, path)
        return np.load(path)


def _shard(folder: Path, i: int) -> Path:
    return folder / f"latents-{i:05d}.npy"


def _text_shard(folder: Path, name: str, i: int | None) -> Path:
    return folder / f"{name}-{'empty' if i is None else f'{i:05d}'}.npy"


class Captioned(NamedTuple):
    """Images with a caption each."""

    files: list[str]  # their names
    captions: list[str]
    open: Callable[[str], Any]  # from a name to what PIL.Image.open takes


def captioned(source: Path) -> Captioned:
    """The images of a folder and their captions in metadata.csv or metadata.jsonl (file_name, text); or those of
    WebDataset tars, one file or a folder of them: NAME.jpg beside NAME.txt, or a NAME.json with "caption" or "text".

    Raises:
        FileNotFoundError: there is no `source`. ValueError: it has no captions, or names images that are not there.
    """
    if not source.exists():
        raise FileNotFoundError(f"there is no {source}; --data must name a folder of images, or a tar")
    tars = sorted(source.glob("*.tar")) if source.is_dir() else [source]
    tables = [source / name for name in ("metadata.jsonl", "metadata.csv") if (source / name).is_file()]
    if tables:
        with tables[0].open(encoding="utf-8", newline="") as file:
            rows = list(map(json.loads, file)) if tables[0].suffix == ".jsonl" else list(csv.DictReader(file))
        if lacking := [
            row for row in rows if not isinstance(row.get("file_name"), str) or not isinstance(row.get("text"), str)
        ]:
            raise ValueError(f"every row of {tables[0]} needs file_name and text, but one is {str(lacking[0])[:200]}")
        files = [row["file_name"] for row in rows]
        if missing := [name for name in files if not (source / name).is_file()]:
            raise ValueError(f"{tables[0]} names {len(missing)} images that are not there, such as {missing[0]}")
        found = Captioned(files, [row["text"] for row in rows], lambda name: source / name)
    elif tars and all(map(tarfile.is_tarfile, tars)):
        found = _webdataset(tars)
    else:
        raise ValueError(
            f"{source} has no captions: it needs metadata.csv or metadata.jsonl (file_name, text), or tars"
        )
    if not found.files:
        raise ValueError(f"{source} holds no image with a caption")
    return found


def _webdataset(tars: list[Path]) -> Captioned:
    places, captions = {}, {}  # an image is read from its place in the tar, so that threads need not share a tar
    for tar in tars:
        with tarfile.open(tar) as archive:
            for member in archive:
                key, _, suffix = member.name.rpartition("/")[2].partition(".")
                key = f"{tar.name}/{member.name.rpartition('/')[0]}/{key}"
                if f".{suffix.lower()}" in SUFFIXES:
                    places[key] = tar, member.offset_data, member.size
                elif suffix in ("txt", "json"):
                    text = archive.extractfile(member).read().decode("utf-8")
                    about = json.loads(text) if suffix == "json" else {}
                    text = text if suffix == "txt" else about.get("caption", about.get("text"))
                    if text is not None and (suffix == "txt" or key not in captions):
                        captions[key] = text.strip()

    def read(key: str) -> io.BytesIO:
        tar, offset, size = places[key]
        with tar.open("rb") as file:
            file.seek(offset)
            return io.BytesIO(file.read(size))

    files = [key for key in places if key in captions]
    return Captioned(files, [captions[key] for key in files], read)


def encode(
    vae: Any,
    images: Path,
    out: Path,
    *,
    text: Any = None,
    image_size: int = 256,
    batch: int = 32,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
) -> dict[str, Any]:
    """Writes the latents of all images below a folder, and of their mirror images, into shards that `load` reads.

    latents-00000.npy, ... hold SHARD images each, (n, 2, C, H, W) float16; labels.npy the numbers of the sub-folders;
    latents.json the record: VAE and its fingerprint, scaling and shift, how images were cut, seed, count. A latent is
    a sample of the VAE's posterior, a function of (seed, number of the image) alone. Shards appear when they are whole,
    so the same call goes on where it was; of several processes number `rank` of `world` makes every world-th one.

    Args:
        vae: a `foreign.Vae`, on its device.
        text: a `foreign.TextEncoder`; then `images` is what `captioned` reads, and beside every shard of latents lie
            the embeddings of its captions, text-00000.npy (n, L, D) and for Stable Diffusion 3 pooled-00000.npy (n, P),
            the bits of bfloat16 as uint16, without the tokens and channels that are always zero. text-empty.npy and
            pooled-empty.npy are those of the empty prompt.
        image_size: of the square that is cut out as ADM does (guided diffusion, `center_crop`).

    Returns: the record.

    Raises:
        ValueError: no images, too many unreadable ones, or `out` holds latents that were made otherwise.
        OSError: no room on the disk.
    """
    found = Captioned(_image_files(images), [], lambda file: images / file) if text is None else captioned(images)
    files, labels = found.files, _labels(found.files) if text is None else None
    if image_size % vae.factor:
        raise ValueError(f"--image-size {image_size} is no multiple of {vae.factor}, by which the VAE shrinks images")
    record = {
        **vae.record,
        "size": [vae.channels, image_size // vae.factor, image_size // vae.factor],
        "image_size": image_size,
        "preprocessing": "ADM centre crop; [image, mirror image], posterior samples",
        "seed": seed,
        "images": _digest([*files, *found.captions]),
        "classes": len(set(labels)) if labels else 0,
        "count": len(files),
        "shard": SHARD,
        "dtype": "float16",
    }
    if text is not None:
        stored = {name: list(shape) for name, shape in {**text.shapes, "text": text.stored}.items()}
        record["captions"] = {name: {"shape": [*text.shapes[name]], "stored": stored[name]} for name in text.shapes}
        record |= text.record
    out.mkdir(parents=True, exist_ok=True)
    if (out / RECORD).exists():
        former = json.loads((out / RECORD).read_text("utf-8"))
        differ = [f"{key} was {former.get(key)}, is {record[key]}" for key in record if former.get(key) != record[key]]
        if differ:
            raise ValueError(f"{out} holds latents that were made otherwise ({', '.join(differ)}): give another --out")
    elif rank == 0:
        embeddings = sum(math.prod(about["stored"]) for about in record.get("captions", {}).values())
        size = len(files) * (4 * math.prod(record["size"]) + 2 * embeddings)
        free = shutil.disk_usage(out).free
        if size > free:
            raise OSError(f"the latents take {size / 1e9:.1f} GB and {out} has room for {free / 1e9:.1f} GB")
        if labels:
            np.save(out / "labels.npy", np.asarray(labels, np.int64))
        for name, value in ({} if text is None else text.encode([""])).items():
            np.save(_text_shard(out, name, None), _bits(value, record["captions"][name]["stored"]))
        (out / f"{RECORD}.part").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
        os.replace(out / f"{RECORD}.part", out / RECORD)
    decode = lambda file: _adm(found.open(file), image_size)  # noqa: E731
    pixels = OnTheFly(files, labels and np.asarray(labels), decode, (3, image_size, image_size))
    starts = range(0, len(files), SHARD)
    todo = [i for i in range(rank, len(starts), world) if not _shard(out, i).exists()]
    total = sum(min(SHARD, len(files) - starts[i]) for i in todo)
    with tqdm(total=total, desc="encoding", unit="img", disable=rank > 0) as bar:
        for i in todo:
            rows = np.arange(starts[i], min(starts[i] + SHARD, len(files)))
            part = out / f"{_shard(out, i).name}.part{rank}"
            shard = np.lib.format.open_memmap(part, "w+", np.float16, (len(rows), 2, *record["size"]))
            texts = {
                name: np.lib.format.open_memmap(
                    out / f"{name}.part{rank}", "w+", np.uint16, (len(rows), *about["stored"])
                )
                for name, about in record.get("captions", {}).items()
            }
            for first in range(0, len(rows), batch):
                some = rows[first : first + batch]
                x = torch.from_numpy(pixels[some])  # (B, 3, H, W)
                both = torch.stack([x, x.flip(-1)], dim=1).flatten(0, 1)  # (2B, 3, H, W)
                noise = [
                    np.random.default_rng((seed, row)).standard_normal((2, *record["size"]), np.float32) for row in some
                ]
                latents = vae.encode(both, torch.from_numpy(np.concatenate(noise)))  # (2B, C, h, w)
                shard[first : first + len(some)] = latents.unflatten(0, (-1, 2)).numpy()
                captions = [found.captions[pixels.stand_in(row)] for row in some] if texts else []
                for name, value in text.encode(captions).items() if texts else ():
                    texts[name][first : first + len(some)] = _bits(value, record["captions"][name]["stored"])
                bar.update(len(some))
            for name, embeddings in texts.items():  # before the latents, whose file says that all is there
                embeddings.flush()
                os.replace(out / f"{name}.part{rank}", _text_shard(out, name, i))
            shard.flush()
            os.replace(part, _shard(out, i))
    return record


def _digest(names: list[str]) -> str:
    return hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _bits(values: Tensor, stored: Sequence[int]) -> np.ndarray:
    """The corner (B, *stored) of floats (B, ...), rounded to bfloat16, as its bits."""
    corner = values[(slice(None), *map(slice, stored))].to(torch.bfloat16).contiguous()
    return corner.view(torch.int16).numpy().view(np.uint16)


def _adm(file: Path | io.BytesIO, image_size: int) -> np.ndarray:
    """One image as (3, image_size, image_size) uint8: the square that ADM cuts out of it (guided diffusion, MIT)."""
    from PIL import Image

    with Image.open(file) as opened:
        image = opened.convert("RGB")
    while min(image.size) >= 2 * image_size:  # halve with a box filter first: the bicubic one then meets no aliasing
        image = image.resize(tuple(side // 2 for side in image.size), Image.Resampling.BOX)
    scale = image_size / min(image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), Image.Resampling.BICUBIC)
    left, top = ((side - image_size) // 2 for side in image.size)
    pixels = np.asarray(image)[top : top + image_size, left : left + image_size]  # (H, W, 3)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))  # (3, H, W)


def main(arguments: list[str] | None = None) -> int:
    """The command line of `encode`. Returns the exit code: 0, or 2 and one sentence on stderr."""
    import foreign

    parser = argparse.ArgumentParser("data.py", description="Images to latents, for training in latent space.")
    command = parser.add_subparsers(required=True, metavar="encode").add_parser("encode", description=encode.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = command.add_argument
    add("--vae", required=True, help="folder or Hugging Face id of an AutoencoderKL, such as stabilityai/sd-vae-ft-ema")
    add("--text", help="folder or id of a Stable Diffusion pipeline, to store the embeddings of captions too")
    add("--no-t5", action="store_true", help="without the largest text encoder of Stable Diffusion 3: 9 times smaller")
    add("--data", required=True, type=Path, help="folder of images; sub-folders are classes. With --text: one with "
        "metadata.csv or metadata.jsonl (file_name, text), or WebDataset tars")  # fmt: skip
    add("--out", required=True, type=Path, help="folder for the latents")
    add("--image-size", type=int, default=256, help="pixels [%(default)s]")
    add("--batch", type=int, default=32, help="images at a time [%(default)s]")
    add("--seed", type=int, default=0, help="of the samples of the posterior [%(default)s]")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="[%(default)s]")
    options = parser.parse_args(arguments)
    # torchrun's processes share nothing but the folder
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = f"cuda:{os.environ['LOCAL_RANK']}" if options.device == "cuda" and world > 1 else options.device
    try:
        for name in ("image_size", "batch"):
            if getattr(options, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)} must be at least 1")
        vae = foreign.Vae(options.vae, device)
        text = None if options.text is None else foreign.TextEncoder(options.text, device, t5=not options.no_t5)
        sizes = {"image_size": options.image_size, "batch": options.batch, "seed": options.seed}
        record = encode(vae, options.data, options.out, text=text, **sizes, rank=rank, world=world)
    except (ValueError, OSError, ImportError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        return 2
    if rank == 0:
        known = f"{record['classes']} classes" if text is None else "captions"
        print(f"{record['count']:,} images, latents {tuple(record['size'])}, {known}: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
