"""Images, and where wanted their captions, to latents: once, for all training in latent space.

    python -m distil.latents --vae stabilityai/sd-vae-ft-ema --data IMAGES --out LATENTS
    python -m distil.latents --vae PIPELINE --text PIPELINE --data IMAGES --out LATENTS      # and their captions

`data.load("latents", LATENTS)` reads what this writes.
"""

import contextlib
import csv
import io
import json
import math
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from distil import command, data, disk, machine, pictures, shards

METADATA = ("metadata.jsonl", "metadata.csv")


class Captioned(NamedTuple):
    """Images with a caption each."""

    files: list[str]  # their names
    captions: list[str]
    open: Callable[[str], Any]  # from a name to what PIL.Image.open takes


def captioned(source: Path) -> Captioned:
    """The images of a folder with metadata.csv or metadata.jsonl (file_name, text), or of WebDataset tars, one or a
    folder of them: NAME.jpg beside NAME.txt, or a NAME.json with "caption" or "text".

    FileNotFoundError: there is no `source`. ValueError: it has no captions, or names images that are not there.
    """
    if not source.exists():
        raise FileNotFoundError(f"there is no {source}; --data must name a folder of images, or a tar")
    tars = sorted(source.glob("*.tar")) if source.is_dir() else [source]
    tables = [source / name for name in METADATA if (source / name).is_file()]
    if tables:
        with _readable(tables[0]):
            found = _metadata(tables[0])
    elif any(map(tarfile.is_tarfile, tars)):
        found = _webdataset(tars)
    else:
        raise ValueError(f"{source} has no captions: it needs {' or '.join(METADATA)} (file_name, text), or tars")
    if not found.files:
        raise ValueError(f"{source} holds no image with a caption")
    for file, text in zip(found.files, found.captions, strict=True):
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError(f"the caption of {file} in {source} holds half a character, {text!r}: mend it")
    return found


@contextlib.contextmanager
def _readable(file: Path) -> Iterator[None]:
    """ValueError that names the file where the block cannot read the captions in it."""
    try:
        yield
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, csv.Error, tarfile.TarError, EOFError) as error:
        raise ValueError(f"the captions in {file} cannot be read: {error}") from error


def _metadata(table: Path) -> Captioned:
    """The images in a table; ValueError where a column or an image is missing."""
    with table.open(encoding="utf-8-sig", newline="") as file:  # Excel begins a table with a mark
        of_lines = (json.loads(line) for line in file if line.strip())
        rows = list(of_lines if table.suffix == ".jsonl" else csv.DictReader(file))
    for row in rows:
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("file_name", "text")):
            raise ValueError(f"every row of {table} needs file_name and text, but one is {str(row)[:200]}")
    files = [row["file_name"] for row in rows]
    outside = [name for name in files if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name]
    if outside:
        raise ValueError(f"{table} names files outside of its folder, such as {outside[0]!r}: it may not")
    missing = [name for name in files if not (table.parent / name).is_file()]
    if missing:
        raise ValueError(f"{table} names {len(missing)} images that are not there, such as {missing[0]}")
    return Captioned(files, [row["text"] for row in rows], table.parent.joinpath)


def _webdataset(tars: Sequence[Path]) -> Captioned:
    """The images in tars that have a caption there. An image is called TAR/FOLDER/KEY."""
    places, captions = {}, {}  # an image is read from its place in the tar, so that threads need not share a tar
    for tar in tars:
        # a compressed one has no places to read an image from
        with _readable(tar), tarfile.open(tar, "r:") as archive:
            for member in filter(tarfile.TarInfo.isreg, archive):
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                key = f"{tar.name}/{folder}/{stem}"
                if f".{suffix.lower()}" in pictures.SUFFIXES:
                    places[key] = tar, member.offset_data, member.size
                elif suffix == "txt":  # it goes before what a NAME.json says
                    captions[key] = archive.extractfile(member).read().decode("utf-8-sig").strip()
                elif suffix == "json" and key not in captions:
                    about = json.loads(archive.extractfile(member).read())
                    text = about.get("caption", about.get("text")) if isinstance(about, dict) else None
                    if isinstance(text, str):
                        captions[key] = text.strip()
            if archive.offset >= tar.stat().st_size:  # cut off between two members it looks whole
                raise tarfile.ReadError("it ends without the mark of its end, so it is cut off: fetch it again")

    def read(key: str) -> io.BytesIO:
        tar, offset, size = places[key]
        with tar.open("rb") as file:
            file.seek(offset)
            return io.BytesIO(file.read(size))

    files = [key for key in places if key in captions]
    return Captioned(files, [captions[key] for key in files], read)


def encode(
    vae: Any, images: Path, out: Path, *, text: Any = None, image_size: int = 256, batch: int = 32, seed: int = 0
) -> dict[str, Any]:
    """Writes the latents of all images below a folder, and of their mirror images, into shards that `data.load` reads.

    latents-00000.npy, ... hold shards.SHARD images each, (n, 2, C, H, W) float16; labels.npy the numbers of the
    sub-folders; latents.json the record, which is returned. A latent is a sample of the posterior, a function of (seed,
    number of the image) alone. The same call goes on where it was; torchrun's processes share the shards.

    vae: a `text_to_image.Vae`. image_size: of the square that is cut out as ADM does.
    text: a `text_to_image.TextEncoder`; then `images` is what `captioned` reads, and text-00000.npy (n, L, D), ... and
        for Stable Diffusion 3 pooled-00000.npy (n, P), ... hold the embeddings of captions, text-empty.npy and
        pooled-empty.npy that of the empty prompt: bits of bfloat16 as uint16, without what is always zero.

    ValueError: no images, too many unreadable ones, or `out` holds other latents. OSError: no room on the disk.
    """
    rank, world = machine.launched() or (0, 1)
    found = Captioned(pictures.image_files(images), [], images.joinpath) if text is None else captioned(images)
    labels = pictures.folder_labels(found.files) if text is None else None
    record = _record(vae, text, found, labels, image_size, seed)
    size, kinds = record["size"], record.get("captions", {})
    _begin(out, record, labels, text, rank)

    shape = (3, image_size, image_size)
    pixels = shards.OnTheFly(found.files, labels, lambda file: _adm(found.open(file), image_size), shape)

    def make(rows: np.ndarray) -> dict[str, np.ndarray]:
        x = torch.from_numpy(pixels[rows])  # (B, 3, H, W)
        both = torch.stack([x, x.flip(-1)], dim=1).flatten(0, 1)  # (2B, 3, H, W)
        noise = [np.random.default_rng((seed, row)).standard_normal((2, *size), np.float32) for row in rows]
        latents = vae.encode(both, torch.from_numpy(np.concatenate(noise)))  # (2B, C, h, w)
        made = {"latents": latents.unflatten(0, (-1, 2)).numpy()}  # (B, 2, C, h, w)
        if text is not None:
            embeddings = text.encode([found.captions[pixels.stand_in(row)] for row in rows])
            made |= {name: _bits(embeddings[name], about["stored"]) for name, about in kinds.items()}
        return made

    arrays = {"latents": ((2, *size), np.float16)}  # the first: its file says that all of this shard is there
    arrays |= {name: (tuple(about["stored"]), np.uint16) for name, about in kinds.items()}
    shards.write_shards(out, arrays, len(found.files), make, batch=batch, what="latents", rank=rank, world=world)
    return record


def _record(vae: Any, text: Any, found: Captioned, labels: list[int] | None, image_size: int, seed: int) -> dict:
    """What latents.json says. ValueError: an image size that the VAE cannot take."""
    if image_size % vae.factor:
        raise ValueError(f"--image-size {image_size} is no multiple of {vae.factor}, by which the VAE shrinks images")
    names = "\n".join([*found.files, *found.captions]).encode("utf-8", "surrogateescape")
    record = {
        **vae.record,
        "size": [vae.channels, image_size // vae.factor, image_size // vae.factor],
        "image_size": image_size,
        "preprocessing": "ADM centre crop; [image, mirror image], posterior samples",
        "seed": seed,
        "images": machine.digest(names),
        "classes": len(set(labels)) if labels else 0,
        "count": len(found.files),
        "shard": shards.SHARD,
        "dtype": "float16",
    }
    if text is not None:
        stored = {**text.shapes, "text": text.stored}
        kinds = {name: {"shape": list(text.shapes[name]), "stored": list(stored[name])} for name in stored}
        record |= {"captions": kinds, **text.record}
    return record


def _begin(out: Path, record: dict[str, Any], labels: list[int] | None, text: Any, rank: int) -> None:
    """Rank 0 writes all but the shards, the record last; ValueError if there are shards of another record already."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / data.RECORD
    if path.exists() and any(out.glob("latents-*.npy")):
        former = disk.read_json(path, "encode again, into an empty folder")
        differ = [f"{key} was {former.get(key)}, is {record[key]}" for key in record if former.get(key) != record[key]]
        if differ:
            raise ValueError(f"{out} holds latents that were made otherwise ({', '.join(differ)}): give another --out")
    elif rank == 0:
        if (first := shards.shard_file(out, "latents", 0)).exists():
            raise ValueError(f"{first} is there without {path.name}, which says how it was made: empty that folder")
        kinds = record.get("captions", {})
        embeddings = sum(math.prod(about["stored"]) for about in kinds.values())
        disk.need_room(out, record["count"] * (4 * math.prod(record["size"]) + 2 * embeddings), "latents")
        arrays = {} if labels is None else {"labels": np.asarray(labels, np.int64)}
        empty = text.encode([""]) if kinds else {}
        arrays |= {f"{name}-empty": _bits(empty[name], about["stored"]) for name, about in kinds.items()}
        for name, values in arrays.items():
            shards.save_array(out / f"{name}.npy", values)
        disk.write_json(path, record, indent=1)


def _bits(values: Tensor, stored: Sequence[int]) -> np.ndarray:
    """The corner (B, *stored) of floats (B, ...), rounded to bfloat16, as its bits."""
    corner = values[(slice(None), *map(slice, stored))].to(torch.bfloat16).contiguous()
    return corner.view(torch.int16).numpy().view(np.uint16)


def _adm(file: Path | io.BytesIO, image_size: int) -> np.ndarray:
    """One image as (3, image_size, image_size) uint8: the square that ADM cuts out of it (guided diffusion, MIT)."""
    from PIL import Image

    with pictures.open_image(file, image_size) as opened:
        image = pictures.upright(opened).convert("RGB")
    while min(image.size) >= 2 * image_size:  # halve with a box filter first: the bicubic one then meets no aliasing
        image = image.resize(tuple(side // 2 for side in image.size), Image.Resampling.BOX)
    scale = image_size / min(image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), Image.Resampling.BICUBIC)
    left, top = ((side - image_size) // 2 for side in image.size)
    pixels = np.asarray(image)[top : top + image_size, left : left + image_size]  # (H, W, 3)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))  # (3, H, W)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of `encode`. Returns 0, or ends with exit code 2 and one sentence on stderr."""
    from distil import text_to_image

    parser = command.Parser("distil.latents", description="Images to latents, for training in latent space.")
    add = parser.add_argument
    add("--vae", required=True, help="folder or Hugging Face id of an AutoencoderKL, such as stabilityai/sd-vae-ft-ema")
    add("--text", help="folder or id of a Stable Diffusion pipeline, to store the embeddings of captions too")
    add("--no-t5", action="store_true", help="without Stable Diffusion 3's largest text encoder: text 9 times smaller")
    tables = "with --text: one with metadata.csv or metadata.jsonl (file_name, text), or WebDataset tars"
    add("--data", required=True, type=Path, help=f"folder of images; sub-folders are classes; {tables}")
    add("--out", required=True, help="folder for the latents")
    add("--image-size", type=int, default=256, help="pixels [%(default)s]")
    add("--batch", type=int, default=32, help="images at a time [%(default)s]")
    add("--seed", type=int, default=0, help="of the samples of the posterior [%(default)s]")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="[%(default)s]")
    options = parser.parse_args(arguments)
    sizes = {"image_size": options.image_size, "batch": options.batch, "seed": options.seed}
    with machine.refusing("distil.latents"):
        command.check("--out", options.out, {"folder": True})
        for name, value in sizes.items():
            command.check(command.flag(name), value, command.SEED if name == "seed" else {"low": 1, "high": 4096})
        device = machine.find_device(options.device)
        vae = text_to_image.Vae(options.vae, device)
        text = text_to_image.TextEncoder(options.text, device, not options.no_t5) if options.text else None
        record = encode(vae, options.data, Path(options.out), text=text, **sizes)
    if (machine.launched() or (0, 1))[0] == 0:
        known = "captions" if options.text else f"{record['classes']} classes"
        print(f"{record['count']:,} images, latents {tuple(record['size'])}, {known}: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
