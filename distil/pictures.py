"""From image files to pixels: which files below a folder are images, and one of them as uint8. No file is trusted."""

import contextlib
import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distil import machine

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")

CELEBA_IMAGE = (178, 218)  # width, height
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # whatever the name says; Pillow would open far more
MAX_PIXELS, MAX_ASPECT = 178_956_970, 100  # of an image; above LARGE pixels a JPEG is decoded in less detail
LARGE = 25_000_000


def image_files(folder: Path, wanted: Sequence[str] = ()) -> list[str]:
    """The images below `folder`, hidden ones left out: sorted relative names with forward slashes.
    FileNotFoundError: no such folder. ValueError: no images; the message says what else was `wanted`."""
    if not folder.is_dir():
        wrong = f"{folder} is a file:" if folder.is_file() else f"there is no folder {folder};"
        raise FileNotFoundError(f"{wrong} data must name a folder of images, an archive's unpacked")

    def stop(error: OSError) -> None:  # os.walk would leave out a folder that it may not read
        raise error

    files, left, base, linked = [], [], Path(os.path.realpath(folder)), []
    for root, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        for name in [name for name in folders if name.startswith(".")]:
            folders.remove(name)
        for name in [name for name in folders if os.path.islink(os.path.join(root, name))]:
            target = Path(os.path.realpath(os.path.join(root, name)))
            known = [base, *linked]  # out of the folder once, and never to where one has been or comes from
            near = any(target.is_relative_to(place) or place.is_relative_to(target) for place in known)
            if near or not Path(os.path.realpath(root)).is_relative_to(base):
                folders.remove(name)
                left.append(os.path.join(root, name))
            else:
                linked.append(target)
        images = [Path(root, name) for name in names if name.lower().endswith(SUFFIXES) and name[0] != "."]
        left += [str(image) for image in images if not image.is_file()]
        files += [image.relative_to(folder).as_posix() for image in images if image.is_file()]
    if left:
        machine.note(f"{folder}: {len(left)} links in a circle, or no files, are left out, such as {left[0]}")
    if not files:
        raise ValueError(f"no images in {folder} or below it; looked for {', '.join([*wanted, *SUFFIXES])}")
    return sorted(files)


def are_gray(folder: Path, names: list[str]) -> bool:
    """Whether all images that can be read are gray. A few that are evenly spaced are asked first: mostly they tell."""
    from PIL import Image

    few, known = names[:: math.ceil(len(names) / 64)], False
    for name in (*few, *names):
        # decoders raise almost anything; what is wrong with a file is said when it is decoded
        with contextlib.suppress(Exception), Image.open(folder / name, formats=FORMATS) as image:
            if image.mode in ("P", "PA"):  # a palette may hold grays alone
                pixels = np.asarray(image.convert("RGB"))  # (H, W, 3)
                gray = (pixels == pixels[..., :1]).all()
            else:
                gray = image.mode in ("1", "L", "LA") or image.mode[0] in "IF"
            if not gray:
                return False
            known = True
    return known


def check_apart(what: str, folder: Path | str, images: str | None) -> None:
    """ValueError where a folder to write into, called `what`, lies among images that are read, in a folder or None."""
    if images is not None and Path(folder).resolve().is_relative_to(Path(images).resolve()):
        mistaken = "its pictures would be taken for images of yours"
        raise ValueError(f"{what} {folder} lies in --data {images}, {mistaken}: keep them apart")


def folder_labels(files: list[str]) -> list[int] | None:
    """The numbers of the sub-folders, in the order of their names, in which the files lie; None if not all do."""
    groups = [file.partition("/")[0] for file in files]
    number = {group: i for i, group in enumerate(sorted(set(groups)))}
    return [number[group] for group in groups] if all("/" in file for file in files) else None


def open_image(file: Path | io.BytesIO, image_size: int) -> Any:
    """An image, still to be decoded, that is to become `image_size` pixels wide; ValueError for one that is too large,
    or so narrow that its other side would become too large."""
    from PIL import Image

    opened = Image.open(file, formats=FORMATS)
    width, height = opened.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_ASPECT * min(width, height):
        opened.close()
        raise ValueError(f"{width}x{height} pixels: more than {MAX_PIXELS:,}, or {MAX_ASPECT} times as long as wide")
    if width * height > LARGE:
        opened.draft(None, (8 * image_size, 8 * image_size))
    return opened


def upright(image: Any) -> Any:
    """An image as people see it: turned by its EXIF tag, of 8 bits, transparency over white. ValueError where nothing
    says what its numbers mean."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # 16-bit gray: convert() would clip it to white
        pixels = np.asarray(image)
        if image.mode == "F" or pixels.max() > 65535 or pixels.min() < 0:
            raise ValueError("pixels of more than 16 bits have no known range")
        image = Image.fromarray((pixels / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image


def decode(file: Path | io.BytesIO, image_size: int, channels: int, face: tuple | None = None) -> np.ndarray:
    """One image as (C, image_size, image_size) uint8: upright by its EXIF tag, transparency over white, if of CelebA's
    size cut to the box `face`, resized by its short side (bilinear, antialiased: LSUN's recipe), centre-cropped."""
    from torchvision.transforms import functional as TF

    with open_image(file, image_size) as opened:
        image = upright(opened).convert("L" if channels == 1 else "RGB")
        if face and image.size == CELEBA_IMAGE:
            image = image.crop(face)
        image = TF.center_crop(TF.resize(image, image_size, TF.InterpolationMode.BILINEAR), image_size)
        pixels = np.asarray(image).reshape(image_size, image_size, channels)  # (H, W, C)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))  # (C, H, W)


def squash(images: np.ndarray, size: int) -> np.ndarray:
    """Images (B, C, H, W) uint8, whole, as PIL brings them to `size` pixels a side (bicubic): (B, C, size, size)."""
    from PIL import Image

    pixels = [x[0] if len(x) == 1 else x.transpose(1, 2, 0) for x in images]  # (H, W) or (H, W, 3) each
    small = [np.atleast_3d(Image.fromarray(x).resize((size, size))) for x in pixels]
    return np.stack(small).transpose(0, 3, 1, 2)  # (B, C, size, size)
