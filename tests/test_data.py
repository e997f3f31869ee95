"""The data: image files of many kinds, the cache of decoded images, the digits, small files in the formats of the
published sets, and the order of batches."""

import errno
import hashlib
import io
import os
import pickle
import shutil
import sys
import tarfile
import time
import urllib.error
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import Trap
from PIL import Image
from torchvision.datasets import CIFAR10, utils

from distil import data, disk, pictures, shards
from distil.batches import batch_indices, fetched
from distil.data import load, to_float, to_uint8
from distil.shards import OnTheFly, Shards

RNG = np.random.default_rng(0)


def picture(height=12, width=16, mode="RGB", color=None):
    pixels = RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)
    if color is not None:
        pixels[:] = color
    return Image.fromarray(pixels).convert(mode)


def encoded(image, kind="JPEG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """One image of each kind, at several depths, with files beside them that are no images."""
    root = tmp_path / "pictures"
    (root / "deep" / "er").mkdir(parents=True)
    picture(color=(255, 0, 0)).save(root / "a_rgb.png")
    picture(mode="L").save(root / "b_gray.png")
    picture(mode="P").save(root / "c_palette.png")
    picture().save(root / "deep" / "d.JPG", "JPEG")
    Image.new("RGBA", (16, 12), (0, 0, 0, 0)).save(root / "deep" / "er" / "e_clear.png")
    Image.fromarray(np.full((12, 16), 32896, np.uint16)).save(root / "f_16bit.png")  # 32896 = 128 * 257
    (root / "notes.txt").write_text("not an image")
    (root / "._a_rgb.png").write_bytes(b"what some systems leave beside a file")
    return root


@pytest.fixture
def read(tmp_path):
    """Loads a folder at 8x8 with a cache of its own."""

    def read(folder, **settings):
        return load("folder", folder, **{"image_size": 8, "cache": tmp_path / "cache", **settings})

    return read


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory, and no way out of it: a download is an error unless a test replaces it."""

    def offline(*args, **kwargs):
        raise urllib.error.URLError("no network\n\nin a test")

    monkeypatch.chdir(tmp_path)
    for name in ("download_url", "download_file_from_google_drive"):
        monkeypatch.setattr(utils, name, offline)
    return tmp_path


@pytest.fixture
def shards_of_2(monkeypatch):
    monkeypatch.setattr(shards, "SHARD", 2)


def no_decoding(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("an image was decoded")

    monkeypatch.setattr(pictures, "decode", fail)


# ---- Digits ----------------------------------------------------------------------------------------------------------


def test_digits_are_the_real_ones_split_by_the_seed():
    from sklearn.datasets import load_digits

    source = load_digits()
    train, test, everything = (load("digits", split=split, seed=3) for split in ("train", "test", "all"))
    assert everything.images.shape == (1797, 1, 8, 8)
    assert (everything.images.dtype, everything.labels.dtype) == (np.uint8, np.int64)
    expected = sorted(zip((source.images * 255 / 16).round().astype(np.uint8).tolist(), source.target, strict=True))
    assert sorted(zip(everything.images[:, 0].tolist(), everything.labels, strict=True)) == expected
    assert (len(train.images), len(test.images)) == (1500, 297)
    for part in ("images", "labels"):
        both = np.concatenate([getattr(train, part), getattr(test, part)])
        np.testing.assert_array_equal(both, getattr(everything, part))
    np.testing.assert_array_equal(load("digits", seed=3).images, train.images)
    assert not np.array_equal(load("digits", seed=4).images, train.images)


def test_digits_at_16():
    small, large = load("digits"), load("digits", image_size=16)
    assert large.images.shape == (1500, 1, 16, 16) and np.array_equal(large.labels, small.labels)
    corners = large.images[:, 0, ::15, ::15]  # without align_corners the corner pixels keep their value
    np.testing.assert_array_equal(corners, small.images[:, 0, ::7, ::7])
    known = load("digits", split="train").images[:, 0].astype(float)  # (1500, 8, 8), of 16 levels, in 8 bits
    near = known[:, :2, :2].reshape(-1, 4) @ [0.5625, 0.1875, 0.1875, 0.0625]  # bilinear
    assert abs(large.images[:, 0, 1, 1] - near).max() <= 1


# ---- Folders ---------------------------------------------------------------------------------------------------------


def test_folder_reads_every_kind_of_image(folder, read):
    found = read(folder)
    images = found.images[:]  # in the order a, b, c, deep/d, deep/er/e, f
    assert found.images.shape == (6, 3, 8, 8) and found.shape == (3, 8, 8) and found.labels is None
    assert images.dtype == found.images.dtype == np.uint8
    np.testing.assert_array_equal(images[0], np.broadcast_to(np.reshape([255, 0, 0], (3, 1, 1)), (3, 8, 8)))
    np.testing.assert_array_equal(images[1, 0], images[1, 2])
    assert (images[4] == 255).all()  # transparent means white
    assert (images[5] == 128).all()  # sixteen bits are scaled, not clipped
    gray = read(folder, channels=1, split="all").images
    assert gray.shape == (6, 1, 8, 8) and (gray[0] == 76).all()  # the luma of pure red


@pytest.mark.parametrize(("names", "channels"), [("bf", 1), ("abf", 3), ("c", 3), ("f", 1)])
def test_a_folder_of_gray_images_stays_gray(folder, read, names, channels):
    """But a palette may hold colours."""
    for file in [file for file in folder.rglob("*.*") if file.name[0] not in names and file.suffix.lower() != ".txt"]:
        file.unlink()
    assert read(folder).shape == (channels, 8, 8)
    assert read(folder, channels=3).shape == (3, 8, 8)


def test_folder_resizes_the_short_side_crops_the_centre_and_turns_photos_upright(tmp_path, read):
    root = tmp_path / "wide"
    root.mkdir()
    pixels = np.zeros((16, 48, 3), np.uint8)
    pixels[:, 16:32] = 200  # the middle third
    Image.fromarray(pixels).save(root / "wide.png")
    Image.fromarray(pixels.transpose(1, 0, 2)).save(root / "tall.png")
    checker = np.indices((64, 64)).sum(0) % 2 * np.uint8(255)
    Image.fromarray(checker.astype(np.uint8)).save(root / "fine.png")
    bright_above = np.repeat(np.array([255, 0], np.uint8), 4)[:, None, None] * np.ones((8, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 3  # stored upside down
    Image.fromarray(bright_above).save(root / "photo.png", exif=exif)
    fine, photo, tall, wide = read(root).images[:]
    assert (wide[:, :, 2:-2] == 200).all()
    assert (tall[:, 2:-2] == 200).all()
    assert np.abs(fine.astype(int) - 127).max() < 12  # antialiased: a fine checkerboard turns gray
    np.testing.assert_array_equal(photo, bright_above[::-1].transpose(2, 0, 1))


def test_sub_folders_are_labels_if_all_images_have_one(tmp_path, read):
    root = tmp_path / "classes"
    for name in ("cat/x/1.png", "ant/1.png", "bee/1.png", "ant/2.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture().save(root / name)
    labels = read(root).labels
    assert labels.dtype == np.int64
    np.testing.assert_array_equal(labels, [0, 0, 1, 2])  # ant, ant, bee, cat
    picture().save(root / "stray.png")
    assert read(root).labels is None


# ---- The cache -------------------------------------------------------------------------------------------------------


def test_decoded_images_are_kept_until_the_folder_changes(folder, read, monkeypatch, tmp_path):
    picture(color=(255, 0, 0)).save(folder / "a.bmp")
    first = read(folder).images[:]
    with monkeypatch.context() as patch:
        no_decoding(patch)
        np.testing.assert_array_equal(read(folder).images[:], first)
        with pytest.raises(ValueError, match="an image was decoded"):  # another size is another entry
            read(folder, image_size=4)
    picture(color=(0, 255, 0)).save(folder / "a.bmp")  # same name, same size, another time
    os.utime(folder / "a.bmp", ns=(1, 1))
    after = read(folder).images[:]
    np.testing.assert_array_equal(after[0, :, 0, 0], [0, 255, 0])
    np.testing.assert_array_equal(after[1:], first[1:])
    (folder / "b_gray.png").unlink()
    assert len(read(folder).images) == 6
    assert {entry.name.rpartition("-")[0] for entry in (tmp_path / "cache").iterdir()} == {"pictures-8x8x3"}


@pytest.mark.usefixtures("shards_of_2")
def test_an_interrupted_cache_is_completed(folder, read, monkeypatch, tmp_path):
    expected = read(folder, cache=tmp_path / "other").images[:]
    calls, decode = [], pictures.decode

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return decode(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pictures, "decode", interrupted)
        read(folder)
    (entry,) = (tmp_path / "cache").iterdir()
    assert [file.name for file in entry.iterdir()] == ["images-00000.npy"]
    before = (entry / "images-00000.npy").stat().st_mtime_ns
    images = read(folder).images
    np.testing.assert_array_equal(images[:], expected)
    assert (entry / "images-00000.npy").stat().st_mtime_ns == before
    np.testing.assert_array_equal(images[np.array([[5, 0], [3, -1]])], expected[np.array([[5, 0], [3, -1]])])
    np.testing.assert_array_equal(images[4], expected[4])
    np.testing.assert_array_equal(images[np.arange(6) % 2 == 1], expected[1::2])
    assert images[:0].shape == (0, 3, 8, 8)
    (entry / "images-00001.npy").write_bytes(b"no array")
    with pytest.raises(ValueError, match=r"images-00001.npy is damaged .*remove it and run"):
        read(folder)


def test_of_several_that_want_the_same_entry_one_decodes(folder, read, monkeypatch, tmp_path):
    decoded, decode = [], pictures.decode

    def slow(*args):
        time.sleep(0.1)
        decoded.append(args)
        return decode(*args)

    monkeypatch.setattr(pictures, "decode", slow)
    with ThreadPoolExecutor() as pool:
        one, other = pool.map(lambda _: read(folder).images[:], range(2))
    np.testing.assert_array_equal(one, other)
    assert len(decoded) == len(one) == 6
    assert [file.name for file in (tmp_path / "cache").rglob("*") if file.is_file()] == ["images-00000.npy"]


def test_a_full_disk_is_noticed_before_decoding(folder, read, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    no_decoding(monkeypatch)
    with pytest.raises(OSError, match=r"pictures.* 0\.0 GB .*make room"):
        read(folder)


def test_a_few_unreadable_images_are_replaced_counted_and_named(tmp_path, read, capsys, monkeypatch):
    root = tmp_path / "many"
    for i in range(240):
        (root / str(i % 2)).mkdir(parents=True, exist_ok=True)
        picture(8, 8, color=(i, i, i)).save(root / str(i % 2) / f"{i:03}.bmp")
    broken = encoded(picture(64, 64))
    (root / "0" / "022.jpg").write_bytes(broken[: len(broken) // 2])
    for _ in range(2):  # it is said again when the cache is used
        images, labels, *_ = read(root)
        message = capsys.readouterr().err.splitlines()[-1]
        assert "1 of 241 images are unreadable, and others take their place: 0/022.jpg" in message
    assert images.shape == (241, 3, 8, 8)
    expected = [*range(0, 23, 2), 24, *range(24, 240, 2), *range(1, 240, 2)]  # 022.jpg lies after 022.bmp
    np.testing.assert_array_equal(images[:][:, 0, 0, 0], expected)
    np.testing.assert_array_equal(images[:][:, 0, 0, 0] % 2, labels)
    # the count goes on after an interruption: a third one would be too many
    (entry,) = (tmp_path / "cache").iterdir()
    (entry / "images-00000.npy").unlink()
    (entry / "unreadable.json").write_text('{"3": "an earlier one", "5": "another"}')
    with pytest.raises(ValueError, match=r"3 of 241 images cannot be read.*an earlier one; another; 0/022.jpg"):
        read(root)
    assert not entry.exists()


@pytest.mark.parametrize("limit", [10, 10**9])
def test_many_unreadable_images_are_an_error(folder, read, tmp_path, monkeypatch, limit):
    monkeypatch.setattr(data, "MAX_CACHE", limit)
    monkeypatch.setattr(shards, "MAX_CORRUPT", 0.2)
    (folder / "deep" / "half.jpeg").write_bytes(encoded(picture(64, 64))[:-900])
    (folder / "text.png").write_text("no image at all")
    with pytest.raises(disk.Damaged, match="2 of 8 images cannot be read, more than 20%; remove or repair") as error:
        _ = read(folder).images[:]
    assert "deep/half.jpeg" in str(error.value) and "text.png" in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("cache/*"))


def test_the_substitute_of_an_unreadable_image_has_its_label(monkeypatch):
    def decode(item):
        if item in "cf":
            raise OSError("broken")
        return np.full((1, 1, 1), ord(item), np.uint8)

    monkeypatch.setattr(shards, "MAX_CORRUPT", 0.4)
    images = OnTheFly("abcdef", np.array([0, 0, 0, 1, 1, 2]), decode, (1, 1, 1))
    assert bytes(images[:5].flatten()) == b"abade"
    assert [images.stand_in(i) for i in range(5)] == [0, 1, 0, 3, 4]
    with pytest.raises(ValueError, match="no image of the label of f"):
        images[5]


@pytest.mark.usefixtures("shards_of_2")
@pytest.mark.parametrize("failure", [OSError(errno.EIO, "the disk"), OSError(errno.ESTALE, "gone"), MemoryError()])
def test_a_disk_that_fails_for_the_moment_is_no_broken_image(failure, folder, read, tmp_path, monkeypatch):
    whole, decode, left = read(folder, cache=tmp_path / "other").images[:], pictures.decode, [4]

    def failing(*args):
        left[0] -= 1
        if left[0] == 0:
            raise failure
        return decode(*args)

    monkeypatch.setattr(pictures, "decode", failing)
    with pytest.raises(OSError, match=r"the disk|gone|the memory does not suffice"):
        read(folder)
    assert len(list(tmp_path.glob("cache/*/images-*.npy"))) == 1 and not list(tmp_path.glob("cache/*/unreadable.json"))
    np.testing.assert_array_equal(read(folder).images[:], whole)


def test_one_image_in_colour_makes_a_folder_one_in_colour_and_odd_files_do_not_matter(tmp_path, read):
    for i in range(150):
        picture(mode="L").save(tmp_path / f"{i:03d}.png")
    Image.new("1", (20_000, 20_000)).save(tmp_path / "151.png")
    assert read(tmp_path).shape == (1, 8, 8)
    picture(color=(255, 0, 0)).save(tmp_path / "100.png")
    found = read(tmp_path)
    assert found.shape == (3, 8, 8) and found.images[100][:, 0, 0].tolist() == [255, 0, 0]


def test_more_shards_than_files_may_be_open(tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(shards, "SHARD", 1)
    rows = np.arange(300, dtype=np.uint8)[:, None]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, limits[1]))
        shards.write_shards(tmp_path, {"x": ((1,), np.uint8)}, 300, lambda i: {"x": rows[i]}, batch=1, what="rows")
        np.testing.assert_array_equal(Shards(tmp_path, "x", rows.shape)[:], rows)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


# ---- What lies in folders --------------------------------------------------------------------------------------------


def test_the_fingerprint_is_that_of_the_images_and_their_labels(tmp_path, read):
    root = tmp_path / "classes"
    for name, color in (("ant/1.png", 10), ("bee/2.png", 20), ("bee/3.png", 30)):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(color=(color,) * 3).save(root / name)
    before = read(root).about
    assert before["images"] == 3 and before["fingerprint"] and load("digits").about["images"] == 1500
    os.utime(root / "ant/1.png", ns=(1, 1))
    assert read(root).about == before  # not of the times
    (root / "bee" / "3.png").rename(root / "ant" / "3.png")
    assert read(root).about != before
    (root / "ant" / "3.png").rename(root / "bee" / "3.png")
    (root / "bee" / "2.png").unlink()
    picture(color=(40,) * 3).save(root / "bee" / "4.png")
    other = read(root).about
    assert other["images"] == 3 and other != before
    assert load("digits").about != load("digits", seed=1).about


def test_links_are_followed_once_and_what_is_no_file_is_left_out(tmp_path, read, capsys):
    root, elsewhere = tmp_path / "in" / "pictures", tmp_path / "elsewhere"
    for place in (root / "a", elsewhere / "b", tmp_path / "third"):
        place.mkdir(parents=True)
        picture().save(place / "1.png")
    for name, target in (("up", ".."), ("self", "."), ("again", "."), ("a2", "a"), ("out", elsewhere)):
        (root / name).symlink_to(target)
    (elsewhere / "back").symlink_to(root)
    (elsewhere / "on").symlink_to(tmp_path / "third")  # would leave the folder twice
    (root / "a" / "gone.png").symlink_to("nowhere.png")
    (root / "a" / "linked.png").symlink_to(elsewhere / "b" / "1.png")
    os.mkfifo(root / "a" / "pipe.png")
    assert pictures.image_files(root) == ["a/1.png", "a/linked.png", "out/b/1.png"]
    assert "8 links in a circle, or no files, are left out" in capsys.readouterr().err
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*loop"):
        load("folder", tmp_path / "loop")


def test_images_that_would_take_the_memory_or_another_program_are_unreadable(tmp_path, monkeypatch):
    postscript = tmp_path / "a.png"
    picture().save(postscript, "EPS")
    with pytest.raises(OSError, match="cannot identify"):
        pictures.decode(postscript, 8, 3)
    Image.new("L", (6550, 1)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match="6550x1 pixels: more than 178,956,970, or 100 times as long"):
        pictures.decode(tmp_path / "b.png", 8, 3)
    Image.fromarray(np.array([[-1, 70], [3, 4]], np.int32)).save(tmp_path / "c.tif")
    with pytest.raises(ValueError, match="more than 16 bits"):
        pictures.decode(tmp_path / "c.tif", 2, 1)
    fine = picture(256, 256)
    (tmp_path / "d.jpg").write_bytes(encoded(fine))
    whole = pictures.decode(tmp_path / "d.jpg", 8, 3)
    monkeypatch.setattr(pictures, "LARGE", 1000)
    assert pictures.open_image(tmp_path / "d.jpg", 8).size == (64, 64)  # a quarter of each side, which is quicker
    assert np.abs(pictures.decode(tmp_path / "d.jpg", 8, 3).astype(int) - whole).max() <= 4


@pytest.mark.usefixtures("shards_of_2")
def test_a_changed_bit_in_the_cache_is_found_when_its_shard_is_read(folder, read, tmp_path):
    read(folder)
    (entry,) = (tmp_path / "cache").iterdir()
    file = entry / "images-00001.npy"
    content = bytearray(file.read_bytes())
    content[200] ^= 1
    file.write_bytes(content)
    images = read(folder).images
    assert images[:2].shape == (2, 3, 8, 8)  # of another shard
    with pytest.raises(ValueError, match=r"images-00001.npy is damaged.*another checksum.*remove it and run"):
        images[2:4]


# ---- Published data sets: small files in their formats ---------------------------------------------------------------

CELEBA_SPLITS = [0, 1, 2, 0, 0, 2]  # of the images 000001.jpg, 000002.jpg, ...


def celeba(home, partition="list_eval_partition.txt", pictures="img_align_celeba"):
    """Six images of CelebA's size, image i gray of 40 i where the face is and noise elsewhere."""
    (home / pictures).mkdir(parents=True)
    for i in range(6):
        image = picture(218, 178)
        image.paste((40 * i,) * 3, (25, 57, 153, 185))
        image.save(home / pictures / f"{i + 1:06}.jpg", quality=100, subsampling=0)
    lines = [f"{i + 1:06}.jpg {number}" for i, number in enumerate(CELEBA_SPLITS)]
    if partition.endswith(".csv"):
        lines = ["image_id,partition"] + [line.replace(" ", ",") for line in lines]
    (home / partition).write_text("\n".join(lines) + "\n")
    return home


def grays(images):
    """The gray of each image, after a look that it has but one: ringing of JPEG at the edges is below 8 of 255."""
    images = images[:].astype(int)
    assert np.ptp(images.reshape(len(images), -1), axis=1).max() < 16
    return [round(float(mean) / 40) for mean in images.mean((1, 2, 3))]


def test_celeba_is_cut_to_the_face_and_split_by_its_partition(here, capsys):
    files = celeba(here / "files")
    for split, members in {"train": [0, 3, 4], "test": [2, 5], "all": [0, 1, 2, 3, 4, 5]}.items():
        images, labels, *_ = load("celeba", files, split=split)
        assert images.shape == (len(members), 3, 64, 64) and grays(images) == members and labels is None
        said = capsys.readouterr().err
        assert f"img_align_celeba and list_eval_partition.txt in {files}, {len(members)} images in the {split}" in said
    picture(218, 178).save(files / "img_align_celeba" / "000004.jpg", quality=100)
    with Image.open(files / "img_align_celeba" / "000004.jpg") as image:
        pixels = np.asarray(image)[57:185, 25:153]  # (128, 128, 3)
    expected = np.asarray(Image.fromarray(pixels).resize((64, 64), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    np.testing.assert_array_equal(load("celeba", files).images[1], expected)  # a changed file is decoded again
    np.testing.assert_array_equal(load("celeba", files, image_size=128).images[1], pixels.transpose(2, 0, 1))


@pytest.mark.parametrize("layout", ["torchvision", "the folder itself", "zip", "torchvision zip", "kaggle"])
def test_celeba_in_the_ways_people_have_it(here, layout):
    home = here / "files" / ("celeba" if "torchvision" in layout else "")
    nested = "img_align_celeba/img_align_celeba" if layout == "kaggle" else "img_align_celeba"
    celeba(home, "list_eval_partition.csv" if layout == "kaggle" else "list_eval_partition.txt", nested)
    if "zip" in layout:
        shutil.make_archive(str(home / "img_align_celeba"), "zip", home, "img_align_celeba")
        shutil.rmtree(home / "img_align_celeba")
    given = home / "img_align_celeba" if layout == "the folder itself" else here / "files"
    assert grays(load("celeba", given).images) == [0, 3, 4]


def test_celeba_that_is_not_whole(here):
    table = celeba(here / "files") / "list_eval_partition.txt"
    table.write_text("000001.jpg\n")
    with pytest.raises(ValueError, match="names no image of the train split"):
        load("celeba", here / "files")
    table.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"list_eval_partition.txt is missing in .*files: fetch it from https://"
    ):
        load("celeba", here / "files")
    table.write_text("000001.jpg 0\n")
    shutil.rmtree(here / "files" / "img_align_celeba")
    (here / "files" / "img_align_celeba.zip").write_bytes(b"half a file")
    with pytest.raises(ValueError, match=r"img_align_celeba.zip is damaged"):
        load("celeba", here / "files")


def test_any_folder_of_images_may_stand_for_a_set(here, capsys):
    root = here / "mine"
    (root / "cats").mkdir(parents=True)
    image = picture(218, 178)
    image.paste((120, 120, 120), (25, 57, 153, 185))
    image.save(root / "cats" / "aligned.png")
    picture(100, 300, color=(200, 200, 200)).save(root / "cats" / "other.png")
    for name, size in {"celeba": 64, "cifar10": 32, "lsun_church": 256}.items():
        found = load(name, root)
        assert found.images.shape == (2, 3, size, size) and found.name == name and found.labels.tolist() == [0, 0]
        assert (found.images[1] == 200).all()
        assert (found.images[0] == 120).all() == (name == "celeba")
        assert f"{name}: no " in (message := capsys.readouterr().err)
        assert "its 2 images are taken as a plain folder" in message
        with pytest.raises(ValueError, match="no test split"):
            load(name, root, split="test")


LSUN = "not downloaded automatically: fetch http://.*/{}_train_lmdb.zip, unzip it in .*data, .* --data"
REFUSED = r"{} cannot be downloaded \(URLError: .*no network in a test.*\). Fetch {} and put it into {}, .* --data"
PAIR = "img_align_celeba.zip and list_eval_partition.txt from https://.*"
FAILING = {
    "celeba": REFUSED.format("img_align_celeba.zip", PAIR, ".*data/celeba"),
    "cifar10": REFUSED.format("cifar-10-python.tar.gz", "it from https://.*tar.gz", ".*data"),
    "lsun_bedroom": LSUN.format("bedroom"),
    "lsun_church": LSUN.format("church_outdoor"),
}


@pytest.mark.parametrize(("name", "message"), FAILING.items())
def test_a_failing_download_says_what_to_put_where(here, name, message):
    for _ in range(2):  # nothing is left behind that a second attempt could take for the data
        with pytest.raises(OSError, match=message) as error:
            load(name)
        assert "\n" not in str(error.value)
    assert [path for path in here.rglob("*") if path.is_file()] == []


def test_celeba_is_downloaded_once_in_the_layout_of_torchvision(here, monkeypatch):
    source = celeba(here / "source")
    shutil.make_archive(str(source / "img_align_celeba"), "zip", source, "img_align_celeba")
    calls = []

    def drive(file_id, root, filename, md5):
        calls.append(filename)
        assert len(md5) == 32
        if len(calls) == 2:
            (Path(root) / filename).write_text("000001.jpg")
            raise RuntimeError("File not found or corrupted.")
        shutil.copy(source / filename, root)

    monkeypatch.setattr(utils, "download_file_from_google_drive", drive)
    with pytest.raises(OSError, match=r"list_eval_partition.txt cannot be downloaded"):
        load("celeba")
    assert grays(load("celeba").images) == [0, 3, 4]
    assert grays(load("celeba", "data", split="test").images) == [2, 5]
    assert calls == ["img_align_celeba.zip", "list_eval_partition.txt", "list_eval_partition.txt"]
    assert len(list((here / "data" / "celeba").iterdir())) == 2


# LSUN


def lmdb_of(folder, values):
    lmdb = pytest.importorskip("lmdb")
    folder.parent.mkdir(exist_ok=True, parents=True)
    with lmdb.open(str(folder), map_size=1 << 24) as database, database.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key, value)


@pytest.fixture
def lsun(here):
    """200 small images in the order of their keys, as WebP and as JPEG; the one numbered 21 is cut short."""
    values = {}
    for i in range(200):
        kind = {"kind": "WEBP", "lossless": True} if i % 2 else {"kind": "JPEG"}
        values[f"{i:05x}".encode()] = encoded(picture(8, 16, color=(i, i, i)), **kind)
    values[b"00015"] = values[b"00015"][:30]
    lmdb_of(here / "files" / "bedroom_train_lmdb", values)
    lmdb_of(here / "files" / "bedroom_val_lmdb", {b"a": encoded(picture(256, 300, color=(7, 7, 7)), "WEBP")})
    return here / "files"


def test_lsun_from_its_lmdb(lsun, capsys):
    images, labels, name, *_ = load("lsun_bedroom", lsun, image_size=8)
    assert images.shape == (200, 3, 8, 8)
    assert images[:][:, 0, 4, 4].tolist() == [22 if i == 21 else i for i in range(200)]
    assert (labels, name) == (None, "lsun_bedroom")
    recognised, *_, replaced = capsys.readouterr().err.splitlines()
    assert "200 images in the lmdb" in recognised
    assert "1 of 200 images are unreadable" in replaced and "00015" in replaced
    assert load("lsun_bedroom", lsun / "bedroom_train_lmdb", image_size=8).images.shape == (200, 3, 8, 8)
    assert load("lsun_bedroom", lsun, split="test").images.shape == (1, 3, 256, 256)
    (lsun / "bedroom_val_lmdb").rename(lsun / "church_outdoor_train_lmdb")
    shutil.copytree(lsun / "church_outdoor_train_lmdb", lsun / "data" / "church_outdoor_train_lmdb")
    os.chdir(lsun)
    assert (load("lsun_church").images[:] == 7).all()
    assert (load("lsun_church", lsun / "data" / "church_outdoor_train_lmdb").images[:] == 7).all()
    assert not list(lsun.glob("_cache*"))


def test_a_set_too_large_to_keep_is_decoded_when_it_is_indexed(lsun, here, monkeypatch, capsys):
    monkeypatch.setattr(data, "MAX_CACHE", 1000)
    found = load("lsun_bedroom", lsun, image_size=8)
    images = found.images
    assert isinstance(images, OnTheFly) and found.labels is None
    assert (len(images), images.shape, images.dtype) == (200, (200, 3, 8, 8), np.uint8)
    assert "decoded whenever they are used" in capsys.readouterr().err
    assert images[np.array([5, 199, 5])][:, 0, 0, 0].tolist() == [5, 199, 5]
    assert images[-2:].shape == (2, 3, 8, 8) and images[:0].shape == (0, 3, 8, 8)
    assert images[np.int64(7)].shape == (3, 8, 8)
    with pytest.raises(IndexError):
        images[200]
    for _ in range(2):
        assert images[[20, 21, 22]][:, 0, 4, 4].tolist() == [20, 22, 22]  # the next one in the place of a broken one
    message = capsys.readouterr().err
    assert message.count("unreadable") == 1 and "00015" in message
    stream = fetched(found, 16, seed=0)
    for step in range(30):
        np.testing.assert_array_equal(next(stream)[0], images[batch_indices(200, 16, step, 0)])
    stream.close()
    assert not (here / "runs").exists()


def test_broken_and_empty_lmdbs(here, monkeypatch):
    lmdb_of(here / "bedroom_train_lmdb", {})
    with pytest.raises(ValueError, match="holds no images"):
        load("lsun_bedroom", here)
    (here / "church_outdoor_train_lmdb").mkdir()
    (here / "church_outdoor_train_lmdb" / "data.mdb").write_bytes(b"x" * 9000)
    with pytest.raises(ValueError, match="church_outdoor_train_lmdb cannot be opened as an lmdb"):
        load("lsun_church", here)
    monkeypatch.setitem(sys.modules, "lmdb", None)
    data._open_lmdb.cache_clear()
    with pytest.raises(ImportError, match="pip install lmdb"):
        load("lsun_bedroom", here)


# CIFAR-10


@pytest.fixture
def cifar(here, monkeypatch):
    """The official files with 4 images a batch; image i of the 24 has the colour (i, 100, 200) and the class i % 10."""
    folder = here / "files" / CIFAR10.base_folder
    folder.mkdir(parents=True)
    contents = {CIFAR10.meta["filename"]: {"label_names": list("abcdefghij")}}
    for number, (name, _) in enumerate(CIFAR10.train_list + CIFAR10.test_list):
        part = range(4 * number, 4 * number + 4)
        rows = [np.repeat(np.array([i, 100, 200], np.uint8), 1024) for i in part]
        contents[name] = {"batch_label": f"batch {number}", "labels": [i % 10 for i in part], "data": np.stack(rows)}
    md5s = {}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        md5s[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    with tarfile.open(folder.parent / CIFAR10.filename, "w:gz") as archive:
        archive.add(folder, CIFAR10.base_folder)
    for part in ("train_list", "test_list"):
        monkeypatch.setattr(CIFAR10, part, [[name, md5s[name]] for name, _ in getattr(CIFAR10, part)])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5s[CIFAR10.meta["filename"]]})
    md5 = hashlib.md5((folder.parent / CIFAR10.filename).read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5)
    return folder


def check_cifar(given=None):
    for split, members in {"train": range(20), "test": range(20, 24), "all": range(24)}.items():
        images, labels, *_ = load("cifar10", given, split=split)
        assert images.shape == (len(members), 3, 32, 32)
        assert (images.dtype, labels.dtype) == (np.uint8, np.int64)
        assert (images == np.stack([np.reshape([i, 100, 200], (3, 1, 1)) for i in members])).all()
        assert labels.tolist() == [i % 10 for i in members]


def test_cifar_from_its_batches_packed_or_not(cifar, capsys):
    check_cifar(cifar.parent)
    check_cifar(cifar)
    assert "cifar10: the official batches in" in capsys.readouterr().err
    shutil.rmtree(cifar)
    check_cifar(cifar.parent)
    assert not cifar.exists()  # nothing is unpacked beside the archive
    with pytest.raises(ValueError, match="3 channels at image size 32, not 3 at 64"):
        load("cifar10", cifar.parent, image_size=64)


def test_cifar_is_downloaded_once(cifar, monkeypatch):
    calls = []

    def download(url, root, filename, md5):
        calls.append((url, md5))
        shutil.copy(cifar.parent / filename, root)

    monkeypatch.setattr(utils, "download_url", download)
    check_cifar()
    assert calls == [(CIFAR10.url, CIFAR10.tgz_md5)]


@pytest.mark.parametrize("name", ["data_batch_2", "test_batch", "batches.meta"])
def test_a_batch_that_is_not_the_published_one_is_never_unpickled(cifar, here, name):
    (cifar / name).write_bytes(pickle.dumps(Trap(here / "sprung")))
    pickle.loads((cifar / name).read_bytes())
    assert (here / "sprung").exists()  # the trap works
    (here / "sprung").unlink()
    for split in ("train", "test", "all"):
        with pytest.raises(ValueError, match="is not whole or not the published one: fetch https"):
            load("cifar10", cifar, split=split)
    assert not (here / "sprung").exists()
    with tarfile.open(cifar.parent / CIFAR10.filename, "w:gz") as archive:
        archive.add(cifar, CIFAR10.base_folder)
    shutil.rmtree(cifar)
    with pytest.raises(ValueError, match="is not whole or not the published one: fetch https"):
        load("cifar10", cifar.parent)
    assert not (here / "sprung").exists()


# ---- Refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("digitz", {}, "unknown data set 'digitz': known are digits, folder"),
        ("digits", {"split": "validation"}, "train, test, all"),
        ("digits", {"seed": -1}, "non-negative"),
        ("digits", {"image_size": 32}, "8 or 16, not 1 at 32"),
        ("digits", {"channels": 3}, "1 channel"),
        ("digits", {"data": "somewhere"}, "need no data"),
        ("folder", {}, "needs data"),
        ("folder", {"data": ".", "split": "test"}, "no test split"),
        ("folder", {"data": ".", "image_size": 0}, "image size"),
        ("folder", {"data": ".", "channels": 4}, "not 4"),
        ("folder", {"data": "nowhere"}, "no folder .*nowhere"),
        ("folder", {"data": "empty"}, r"no images in .*empty.*png"),
        ("folder", {"data": "file.png"}, "file.png is a file: data must name a folder of images"),
        ("celeba", {"data": "empty"}, "looked for img_align_celeba.zip, img_align_celeba/, .png"),
        ("lsun_church", {"split": "all"}, "'train' or 'test'"),
        ("lsun_bedroom", {"data": "empty"}, "looked for bedroom_train_lmdb/ .unzipped., .png"),
        ("cifar10", {"data": "empty"}, "looked for cifar-10-batches-py/, cifar-10-python.tar.gz, .png"),
        ("latents", {}, "latents need --data, the folder that `python -m distil.latents"),
        ("latents", {"data": ".", "split": "test"}, "no test split"),
        ("latents", {"data": "nowhere"}, "there is no folder"),
        ("imagenet", {"data": "empty"}, "holds no latents: neither latents.json nor .*_features and"),
    ],
)
def test_bad_arguments_are_one_clear_sentence_and_write_nothing(name, arguments, message, here):
    (here / "empty" / ".hidden").mkdir(parents=True)
    picture().save(here / "empty" / ".hidden" / "a.png")
    (here / "empty" / "bedroom_train_lmdb.zip").write_bytes(b"")
    picture().save(here / "file.png")
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load(name, **arguments)
    assert "\n" not in str(error.value)
    assert {file.name for file in here.iterdir()} == {"empty", "file.png"}


# ---- Batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("shards_of_2")
def test_prefetched_batches_are_the_batches(folder, read):
    images = read(folder)
    assert isinstance(images.images, Shards) and len(images.images.files) == 3
    stream = fetched(images, 4, seed=3, start=2, rows=slice(1, 3))
    for step in range(2, 12):
        pixels, _ = next(stream)
        assert pixels.dtype == torch.uint8
        expected = images.images[batch_indices(6, 4, step, 3)[1:3]]
        np.testing.assert_array_equal(pixels, expected)
        pixels.zero_()  # a copy, which is the reader's own
    stream.close()


# ---- Pixels ----------------------------------------------------------------------------------------------------------


def test_pixels_go_to_floats_and_back():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    x = to_float(pixels)
    assert x.dtype == torch.float32
    assert (x.min(), x.max()) == (-1, 1)
    np.testing.assert_array_equal(to_uint8(x), pixels)
    np.testing.assert_array_equal(to_float(torch.from_numpy(pixels)), x)
    assert to_uint8(torch.tensor([-7.0, 7.0, 0.001, float("inf")])).tolist() == [0, 255, 128, 255]
    pixels.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        to_float(pixels).add_(1)
    for convert, wrong, message in ((to_float, torch.zeros(2), "uint8"), (to_uint8, torch.tensor([1]), "floats")):
        with pytest.raises(ValueError, match=message):
            convert(wrong)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_squashed_as_pil_does(channels):
    images = RNG.integers(0, 256, (3, channels, 20, 24), np.uint8)
    found = pictures.squash(images, 12)
    assert found.shape == (3, channels, 12, 12)
    one = Image.fromarray(images[1].transpose(1, 2, 0).squeeze()).resize((12, 12), Image.BICUBIC)
    np.testing.assert_array_equal(found[1].transpose(1, 2, 0).squeeze(), one)
