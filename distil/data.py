"""The images: every data set becomes one `Images` tuple of uint8 pixels that a training step indexes.

Images are decoded and resized once, into shards below `runs/cache/`, which may be deleted at any time. Sets too large
to keep (LSUN bedroom: 596 GB) are decoded whenever they are indexed. In the network pixels are float32, -1 .. 1.
"""

import contextlib
import io
import math
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from distil import disk, machine, pictures, shards

DIGITS_TRAIN = 1500  # of scikit-learn's 1,797; the others are to test
SPLITS = ("train", "test", "all")
ROOT = "data"  # where official files are looked for, and downloaded to, when no folder is given
CACHE = "runs/cache"  # of decoded images
MAX_CACHE = 100e9  # bytes: a larger set is decoded whenever it is used, not kept. CelebA 2 GB, LSUN church 25 GB
RECIPE = 3  # part of the key of a cache entry: raise it when `decode` or the format changes
RECORD = "latents.json"  # in a folder of latents: how they were made
CELEBA_FACE = (25, 57, 25 + 128, 57 + 128)  # left, top, right, bottom


class Images(NamedTuple):
    """One split of one data set."""

    images: "np.ndarray | shards.Rows"  # (N, C, H, W) uint8; latents of image and mirror image (N, 2, C, H, W) float32
    labels: np.ndarray | None  # (N,) int64 class numbers from 0, or None
    name: str
    record: dict[str, Any] | None = None  # how latents were made, see `latents.encode`; None for pixels
    captions: "tuple[shards.Embeddings, ...]" = ()  # of latents that were made with captions
    fingerprint: str = ""  # changes with the images, their order and their labels

    @property
    def shape(self) -> tuple[int, int, int]:
        return tuple(self.images.shape[-3:])  # (C, H, W)

    @property
    def about(self) -> dict[str, Any]:
        """What a checkpoint says of the data, to find out when it changes."""
        return {"images": len(self.images), "fingerprint": self.fingerprint}

    @property
    def no_condition(self) -> dict[str, Tensor] | None:
        """The embedding of the empty prompt, as `conditions` gives those of captions, for one image; None without."""
        return {kind.name: kind.empty for kind in self.captions} or None

    def conditions(self, index: np.ndarray) -> dict[str, Tensor]:
        """What is known of these images: of their labels {"y": (B,) int64}, of their captions, in bfloat16,
        {"text": (B, L, D)} and for Stable Diffusion 3 also {"pooled": (B, P)}."""
        labels = {} if self.labels is None else {"y": torch.from_numpy(self.labels[index])}
        return labels | {kind.name: kind[index] for kind in self.captions}


class Request(NamedTuple):
    """What `load` was asked for, with the defaults of the data set."""

    name: str
    data: Path | None
    image_size: int | None
    split: str
    seed: int
    channels: int | None
    cache: Path


def load(
    name: str, data: str | os.PathLike | None = None, image_size: int | None = None, split: str = "train",
    seed: int = 0, *, channels: int | None = None, cache: str | os.PathLike = CACHE,
) -> Images:  # fmt: skip
    """A split of a data set of `DATASETS`; None takes its image size in pixels, and its channels: 1 gray, 3 RGB (a
    folder: what its images are).

    data: where the files are; `folder` and latents need it, `digits` has none. The others take the official files,
        packed or unpacked, or any folder of images. None: `ROOT`, to which celeba and cifar10 are downloaded.
    split: `train`, `test` or `all`: the official ones where there are some, of digits by the `seed`. A folder is all.
    ValueError: what does not fit, files that are not what they should be, no images or too many unreadable ones.
    OSError: files are missing, cannot be downloaded, or do not fit on the disk. ImportError: LSUN without lmdb.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}: known are {', '.join(DATASETS)}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: it is one of {', '.join(SPLITS)}")
    read, default_size, default_channels, _ = DATASETS[name]
    size = default_size if image_size is None else image_size
    channels = default_channels if channels is None else channels
    if default_size is not None and (size < 1 or channels not in (1, 3, None)):
        raise ValueError(f"images have 1 channel or 3 at an image size of 1 or more, not {channels} at {size}")
    where = None if data is None else Path(os.path.realpath(data))
    return read(Request(name, where, size, split, seed, channels, Path(cache)))


def _digits(ask: Request) -> Images:
    """Scikit-learn's 1,797 handwritten digits of 8x8 pixels, as they are or enlarged to 16x16."""
    if ask.data is not None:
        raise ValueError(f"digits are embedded and need no data, got {ask.data}; your own images are called 'folder'")
    check_digits(ask.image_size, ask.channels)
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images)[:, None] * (255 / 16)  # (N, 1, 8, 8), the source counts from 0 to 16
    if ask.image_size != 8:
        images = F.interpolate(images, size=ask.image_size, mode="bilinear")  # (N, 1, 16, 16)
    images = images.round().to(torch.uint8).numpy()
    order = np.random.default_rng(ask.seed).permutation(len(images))
    part = {"train": order[:DIGITS_TRAIN], "test": order[DIGITS_TRAIN:], "all": order}[ask.split]
    images, labels = images[part], digits.target[part].astype(np.int64)
    about = machine.digest(np.ascontiguousarray(images), labels)
    return Images(images, labels, ask.name, fingerprint=about)


def check_digits(size: int, channels: int = 1) -> None:
    """ValueError for digits that there are not."""
    if size not in (8, 16) or channels != 1:
        raise ValueError(f"digits have 1 channel at image size 8 or 16, not {channels} at {size}")


def _folder(ask: Request, wanted: Sequence[str] = ()) -> Images:
    """All images below a folder; other data sets come here when it holds none of the files that they `wanted`."""
    if ask.data is None:
        raise ValueError("the data set 'folder' needs data, the folder that holds the images")
    if ask.split == "test":
        raise ValueError("a folder has no test split: keep held-out images in a folder of their own and load that one")
    names = pictures.image_files(ask.data, wanted)
    gray = pictures.are_gray(ask.data, names)
    if ask.channels == 1 and not gray:
        machine.note(f"{ask.data}: its images have colours, and are read as gray ones")
    ask = ask._replace(channels=ask.channels or (1 if gray else 3))
    if ask.name != "folder":
        missing = f"no {' or '.join(wanted)} in {ask.data}"
        machine.note(f"{ask.name}: {missing}, so its {len(names):,} images are taken as a plain folder")
    files = [ask.data / name for name in names]
    return _decoded(ask, ask.data.name, names, ask.data.joinpath, files, pictures.folder_labels(names))


def _celeba(ask: Request) -> Images:
    """CelebA, the official split, and of it the square around the face that ddim cuts out. torchvision's own CelebA is
    not used: it needs lists of attributes, boxes and persons beside the images."""
    from torchvision.datasets import CelebA, utils

    packed, unpacked, table = "img_align_celeba.zip", "img_align_celeba", "list_eval_partition.txt"
    source = "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"
    folder = _official_folder(ask.data, unpacked)
    own = folder / "celeba"  # as torchvision lays it out
    home = next((place for place in (own, folder) if _first(place, packed, unpacked)), own)
    forms = {packed: (packed, unpacked), table: (table, "list_eval_partition.csv")}  # as published; as others have it
    for file_id, md5, name in CelebA.file_list:
        if ask.data is None and name in forms and not _first(home, *forms[name]):
            fetch = partial(utils.download_file_from_google_drive, file_id, filename=name, md5=md5)
            _download(home / name, fetch, f"{packed} and {table} from {source}")
    faces, partition = (_first(home, *names) for names in forms.values())
    if faces is None:
        return _folder(ask, (packed, f"{unpacked}/"))
    if partition is None:
        raise FileNotFoundError(f"{table} is missing in {home}: fetch it from {source}")
    numbers = {"train": ("0",), "test": ("2",), "all": ("0", "1", "2")}[ask.split]
    rows = [line.replace(",", " ").split() for line in partition.read_text("utf-8").splitlines()]
    names = [row[0] for row in rows if len(row) == 2 and row[1] in numbers]
    if not names:
        raise ValueError(f"{partition} names no image of the {ask.split} split; its lines must read '000001.jpg 0'")
    count = f"{len(names):,} images in the {ask.split} split"
    machine.note(f"celeba: {faces.name} and {partition.name} in {home}, {count}")
    if faces.is_dir():
        faces = _first(faces, unpacked) or faces  # Kaggle's copy unpacks into two folders
        return _decoded(ask, f"celeba-{ask.split}", names, faces.joinpath, sorted(faces.iterdir()))
    try:
        archive = zipfile.ZipFile(faces)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{faces} is damaged, fetch it again: {error}") from error

    return _decoded(
        ask, f"celeba-{ask.split}", names, lambda name: io.BytesIO(archive.read(f"{unpacked}/{name}")), [faces]
    )


def _lsun(category: str, ask: Request) -> Images:
    """A category of LSUN from its lmdb, in the order of the keys; its val, 300 images, is the test split. torchvision's
    own LSUN is not used: it trusts any pickle of keys that it finds in the working directory."""
    if ask.split == "all":
        raise ValueError("LSUN keeps its splits in separate files: load 'train' or 'test', not 'all'")
    parts = {"train": f"{category}_train_lmdb", "test": f"{category}_val_lmdb"}
    folder, part = _official_folder(ask.data, *parts.values()), parts[ask.split]
    file = folder / part / "data.mdb"
    if not file.exists() and ask.data is not None:
        return _folder(ask, (f"{part}/ (unzipped)",))
    if not file.exists():
        remedy = f"fetch http://dl.yf.io/lsun/scenes/{part}.zip, unzip it in {folder}, or say where with --data"
        raise FileNotFoundError(f"LSUN is not downloaded automatically: {remedy}")
    database = _open_lmdb(file.parent)
    with database.begin() as transaction:
        keys = list(transaction.cursor().iternext(values=False))
    machine.note(f"{ask.name}: {len(keys):,} images in the lmdb {file.parent}")

    def read(key: bytes) -> io.BytesIO:
        with database.begin() as transaction:
            return io.BytesIO(transaction.get(key))

    return _decoded(ask, f"{ask.name}-{ask.split}", keys, read, [file])


def _cifar10(ask: Request) -> Images:
    """CIFAR-10 from its official batches, ten classes as labels. The batches are pickles, which can run anything:
    torchvision opens none but those with the published checksum."""
    from torchvision.datasets import CIFAR10, utils

    folder = _official_folder(ask.data, CIFAR10.base_folder)
    place = _first(folder, CIFAR10.base_folder, CIFAR10.filename)
    if place is None and ask.data is not None:
        return _folder(ask, (f"{CIFAR10.base_folder}/", CIFAR10.filename))
    if (ask.image_size, ask.channels) != (32, 3):
        raise ValueError(f"CIFAR-10 has 3 channels at image size 32, not {ask.channels} at {ask.image_size}")
    if place is None:
        place = folder / CIFAR10.filename
        fetch = partial(utils.download_url, CIFAR10.url, filename=CIFAR10.filename, md5=CIFAR10.tgz_md5)
        _download(place, fetch, f"it from {CIFAR10.url}")
    machine.note(f"cifar10: the official batches in {place}")
    trains = {"train": [True], "test": [False], "all": [True, False]}[ask.split]
    with tempfile.TemporaryDirectory() as unpacked:
        try:  # checksums are looked at before anything is opened
            if place.is_file():
                if not utils.check_integrity(place, CIFAR10.tgz_md5):
                    raise RuntimeError("another checksum")
                utils.extract_archive(place, unpacked)
                folder = unpacked
            parts = [CIFAR10(folder, train) for train in trains]
        except RuntimeError as error:
            raise ValueError(f"{place} is not whole or not the published one: fetch {CIFAR10.url} again") from error
    images = np.concatenate([part.data for part in parts]).transpose(0, 3, 1, 2)  # (N, H, W, C) -> (N, C, H, W)
    labels = np.concatenate([part.targets for part in parts]).astype(np.int64)
    images = np.ascontiguousarray(images)
    return Images(images, labels, ask.name, fingerprint=machine.digest(images, labels))


def _latents(ask: Request) -> Images:
    """Latents of images of `image_size`, from `latents.encode` or in TinyFusion's layout; there is one split."""
    folder = ask.data
    if folder is None:
        raise ValueError("latents need --data, the folder that `python -m distil.latents` wrote: try it with --help")
    if ask.split == "test":
        raise ValueError("a folder of latents has no test split: encode held-out images into a folder of their own")
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}: python -m distil.latents makes folders of latents")
    if not (folder / RECORD).exists():
        return _one_per_file(ask)
    try:
        record = disk.read_json(folder / RECORD, "encode again, into an empty folder")
        if min(record["count"], record["shard"], record["classes"] + 1, *record["size"]) < 1:
            raise ValueError("a number is too small")
        latents = shards.Shards(folder, "latents", (record["count"], 2, *record["size"]), record["shard"])
        labels = np.array(shards.open_array(folder / "labels.npy", (record["count"],))) if record["classes"] else None
        if labels is not None and not 0 <= labels.min() <= labels.max() < record["classes"]:
            raise disk.Damaged(f"{folder / 'labels.npy'} holds labels outside of 0 to {record['classes'] - 1}")
        captions = tuple(shards.Embeddings(folder, name, record) for name in record.get("captions", {}))
        size = record["image_size"]
    except OSError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder / RECORD} is damaged ({error!r}): encode again, into an empty folder") from error
    if ask.image_size not in (None, size):
        raise ValueError(f"{folder} has images of {size} pixels, not of {ask.image_size}: use --image-size {size}")
    about = machine.digest(latents.seals(), *(kind.bits.seals() for kind in captions), labels_of(labels))
    return Images(latents, labels, ask.name, record, captions, about)


def _one_per_file(ask: Request) -> Images:
    """TinyFusion's layout: n.npy, float32 (2, C, H, W), for image n in one folder, and its label as n.npy in another,
    in the order of the names. Nothing says which VAE made them. The labels are read once, then cached."""
    features, labels = (min(ask.data.glob(f"*_{kind}"), default=None) for kind in ("features", "labels"))
    names = sorted(file.name for file in features.glob("*.npy")) if features and labels else []
    if not names:
        raise ValueError(f"{ask.data} holds no latents: neither {RECORD} nor *.npy in folders *_features and *_labels")
    missing = sorted(set(names) - set(os.listdir(labels)))
    if missing:
        raise FileNotFoundError(f"{labels / missing[0]} is missing, the label of {missing[0]} of the latents")
    times = [path.stat().st_mtime_ns for path in (features / names[-1], labels, labels / names[-1])]
    file = _entry(ask, "labels", (labels, len(names), times)) / "labels.npy"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        starts = range(0, len(names), shards.SHARD)  # all at once would take gigabytes

        def read(name: str) -> int:  # a map that is kept would keep its file open
            return shards.open_array(labels / name, None, check=False).item()

        with ThreadPoolExecutor() as pool:
            found = [one for i in starts for one in pool.map(read, names[i : i + shards.SHARD])]
        shards.save_array(file, np.array(found, np.int64))
    numbers = np.array(shards.open_array(file, (len(names),)))
    shape = shards.open_array(features / names[0], None, check=False).shape[-4:]
    if len(shape) != 4 or shape[0] != 2:
        wrong = f"{features / names[0]} has the shape {shape}, not (2, C, H, W), an image and its mirror image"
        raise ValueError(f"{wrong}: make the latents again, with python -m distil.latents or as TinyFusion does")
    latents = shards.OnTheFly(names, numbers, lambda name: np.load(features / name).reshape(shape), shape, "float32")
    record = {"vae": None, "count": len(names), "size": list(shape[1:])}
    about = machine.digest(repr(names).encode("utf-8", "surrogateescape"), labels_of(numbers))
    return Images(latents, numbers, ask.name, record, fingerprint=about)


def labels_of(labels: np.ndarray | None) -> bytes:
    return b"" if labels is None else labels.tobytes()


GIVEN = "its folder is given with --data"
BY_HAND = f"read from {ROOT}/, which has to hold it: files that are fetched by hand"
FETCHED = f"read from {ROOT}/, to which it is downloaded first"

# name: (what loads it, default image size, default channels, where it comes from); None: what the files say
DATASETS = {
    "digits": (_digits, 8, 1, "they come with scikit-learn"),
    "folder": (_folder, 64, None, GIVEN),
    "celeba": (_celeba, 64, 3, f"{FETCHED}, if Google lets it: else you are told what to fetch by hand"),
    "lsun_bedroom": (partial(_lsun, "bedroom"), 256, 3, BY_HAND),
    "lsun_church": (partial(_lsun, "church_outdoor"), 256, 3, BY_HAND),
    "cifar10": (_cifar10, 32, 3, FETCHED),
    "latents": (_latents, None, None, GIVEN),
    "imagenet": (_latents, 256, None, GIVEN),
}


def _first(folder: Path, *names: str) -> Path | None:
    return next((folder / name for name in names if (folder / name).exists()), None)


def _official_folder(data: Path | None, *names: str) -> Path:
    """Where to look for official files: `data`, or around it if it is itself one of the folders `names`."""
    if data is None:
        return Path(ROOT).resolve()
    return data.parent if data.name in names else data


def _download(file: Path, fetch: Callable, needed: str) -> None:
    """Makes `file` by `fetch(root=folder)`, which checks it. OSError, with what is `needed` from where, if it fails."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=".downloading-") as folder:
            fetch(root=folder)
            (Path(folder) / file.name).replace(file)
    except Exception as error:  # network libraries raise almost anything, and a user can do the same about all of it
        remedy = f"Fetch {needed} and put it into {file.parent}, or into any folder and name that with --data"
        raise OSError(f"{file.name} cannot be downloaded ({machine.sentence(error)}). {remedy}") from error


@lru_cache  # a process may open an lmdb only once
def _open_lmdb(folder: Path) -> Any:
    lmdb = machine.library("lmdb", "LSUN", "lmdb")
    try:  # no lock file, so that the folder may be read-only; no readahead, for the order of reading is random
        return lmdb.open(str(folder), readonly=True, lock=False, readahead=False)
    except lmdb.Error as error:
        raise ValueError(f"{folder} cannot be opened as an lmdb: {error}") from error


def _entry(ask: Request, name: str, key: tuple) -> Path:
    """The folder of the cache for what `key` determines."""
    return ask.cache / f"{name}-{machine.digest(repr(key).encode('utf-8', 'surrogateescape'))}"


def _decoded(
    ask: Request, name: str, items: Sequence, read: Callable, files: list[Path], labels: list[int] | None = None
) -> Images:
    """The Images of `items`, of which `read` gives paths or binary files: decoded into the cache, or, where they are
    too many, whenever they are indexed. When one of the `files` changes, all is decoded again."""
    if not items:
        raise ValueError(f"{name} holds no images")
    labels = None if labels is None else np.asarray(labels, np.int64)
    shape = (ask.channels, ask.image_size, ask.image_size)
    size = len(items) * math.prod(shape)  # bytes
    face = CELEBA_FACE if ask.name == "celeba" else None

    def decode_item(item: Any) -> np.ndarray:
        return pictures.decode(read(item), ask.image_size, ask.channels, face)

    if size > MAX_CACHE:
        machine.note(f"{name}: it would take {size / 1e9:.0f} GB, so images are decoded whenever they are used")
        names = repr(items).encode("utf-8", "surrogateescape")
        about = machine.digest(names, labels_of(labels))
        return Images(shards.OnTheFly(items, labels, decode_item, shape), labels, ask.name, fingerprint=about)
    stamps = [(stat.st_size, stat.st_mtime_ns) for stat in map(os.stat, files)]
    key = (RECIPE, shards.SHARD, face, [str(file) for file in files], stamps, items)
    entry = _entry(ask, f"{name}-{ask.image_size}x{ask.image_size}x{ask.channels}", key)
    pixels = shards.OnTheFly(items, labels, decode_item, shape, log=entry / "unreadable.json")
    arrays, what = {"images": (shape, np.uint8)}, f"decoded images of {entry.name}"
    files = [shards.shard_file(entry, "images", i) for i in range(math.ceil(len(items) / shards.SHARD))]
    try:  # of several runs one decodes, and the others find what it wrote
        with contextlib.nullcontext() if all(file.exists() for file in files) else disk.held(entry):
            shards.write_shards(entry, arrays, len(items), lambda rows: {"images": pixels[rows]}, batch=256, what=what)
    except ValueError:  # too many are unreadable
        shutil.rmtree(entry, ignore_errors=True)
        raise
    if pixels.unreadable:
        count = f"{len(pixels.unreadable)} of {len(items)} images are unreadable, and others take their place"
        machine.note(f"{count}: {next(iter(pixels.unreadable.values()))} ... see {pixels.log}")
    images = shards.Shards(entry, "images", (len(items), *shape))
    about = machine.digest(images.seals(), labels_of(labels))
    return Images(images, labels, ask.name, fingerprint=about)


def to_float(images: np.ndarray | Tensor) -> Tensor:
    """uint8 pixels 0 .. 255 to float32 -1 .. 1 on the same device: move them first, as bytes. ValueError: not uint8."""
    images = images if isinstance(images, Tensor) else torch.tensor(images)
    if images.dtype != torch.uint8:
        raise ValueError(f"to_float needs uint8 pixels, got {images.dtype}")
    return images.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """Floats, clamped to -1 .. 1, to the nearest uint8 pixel 0 .. 255. ValueError: x that is not floating point."""
    if not x.is_floating_point():
        raise ValueError(f"to_uint8 needs floats in [-1, 1], got {x.dtype}")
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
