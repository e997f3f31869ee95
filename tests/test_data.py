"""The data: real image files of many kinds, the cache of decoded images, the digits, and the order of batches."""

import io
import os
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import data
from data import DATASETS, batch_indices, load, random_flip, to_float, to_uint8

RNG = np.random.default_rng(0)


def picture(height=12, width=16, mode="RGB", color=None):
    pixels = RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)
    if color is not None:
        pixels[:] = color
    return Image.fromarray(pixels).convert(mode)


def truncated_jpeg(file):
    whole = io.BytesIO()
    picture(64, 64).save(whole, "JPEG")
    file.write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])


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


def no_decoding(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("an image was decoded")

    monkeypatch.setattr(Image, "open", fail)


# Digits


def test_digits_are_the_real_ones():
    from sklearn.datasets import load_digits

    source = load_digits()
    digits = load("digits", split="all")
    assert digits.images.shape == (1797, 1, 8, 8)
    assert digits.images.dtype == np.uint8
    assert digits.labels.dtype == np.int64
    assert not digits.flip
    expected = sorted(zip((source.images * 255 / 16).round().astype(np.uint8).tolist(), source.target, strict=True))
    assert sorted(zip(digits.images[:, 0].tolist(), digits.labels, strict=True)) == expected


def test_digits_split_is_disjoint_covering_and_of_the_seed():
    train, test, everything = (load("digits", split=split, seed=3) for split in ("train", "test", "all"))
    assert len(train.images) == len(train.labels) == 1500
    assert len(test.images) == len(test.labels) == 297
    for part in ("images", "labels"):
        both = np.concatenate([getattr(train, part), getattr(test, part)])
        np.testing.assert_array_equal(both, getattr(everything, part))
    np.testing.assert_array_equal(load("digits", seed=3).images, train.images)
    assert not np.array_equal(load("digits", seed=4).images, train.images)
    assert set(test.labels) == set(range(10))


def test_digits_at_16():
    small, large = load("digits"), load("digits", image_size=16)
    assert large.images.shape == (1500, 1, 16, 16)
    np.testing.assert_array_equal(large.labels, small.labels)
    corners = large.images[:, 0, ::15, ::15]  # without align_corners the corner pixels keep their value
    np.testing.assert_array_equal(corners, small.images[:, 0, ::7, ::7])
    assert abs(large.images.mean() - small.images.mean()) < 0.5


# Folders


def test_folder_reads_every_kind_of_image(folder, read):
    images = read(folder).images  # in the order a, b, c, deep/d, deep/er/e, f
    assert images.shape == (6, 3, 8, 8)
    assert images.dtype == np.uint8
    assert isinstance(images, np.memmap)
    np.testing.assert_array_equal(images[0], np.broadcast_to(np.reshape([255, 0, 0], (3, 1, 1)), (3, 8, 8)))
    np.testing.assert_array_equal(images[1, 0], images[1, 2])
    assert (images[4] == 255).all()  # transparent means white
    assert (images[5] == 128).all()  # sixteen bits are scaled, not clipped
    assert read(folder, split="all").flip


def test_folder_in_gray(folder, read):
    images = read(folder, channels=1).images
    assert images.shape == (6, 1, 8, 8)
    assert (images[0] == 76).all()  # the luma of pure red


def test_folder_resizes_the_short_side_and_crops_the_centre(tmp_path, read):
    root = tmp_path / "wide"
    root.mkdir()
    pixels = np.zeros((16, 48, 3), np.uint8)
    pixels[:, 16:32] = 200  # the middle third
    Image.fromarray(pixels).save(root / "wide.png")
    Image.fromarray(pixels.transpose(1, 0, 2)).save(root / "tall.png")
    checker = np.indices((64, 64)).sum(0) % 2 * np.uint8(255)
    Image.fromarray(checker.astype(np.uint8)).save(root / "fine.png")
    fine, tall, wide = read(root).images
    assert (wide[:, :, 2:-2] == 200).all()
    assert (tall[:, 2:-2] == 200).all()
    assert np.abs(fine.astype(int) - 127).max() < 12  # antialiased: a fine checkerboard turns gray


def test_folder_turns_photos_upright(tmp_path, read):
    root = tmp_path / "photos"
    root.mkdir()
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4] = 255  # bright above
    exif = Image.Exif()
    exif[0x0112] = 3  # stored upside down
    Image.fromarray(pixels).save(root / "photo.png", exif=exif)
    np.testing.assert_array_equal(read(root).images[0], pixels[::-1].transpose(2, 0, 1))


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


def test_second_load_decodes_nothing(folder, read, monkeypatch):
    first = read(folder)
    no_decoding(monkeypatch)
    second = read(folder)
    np.testing.assert_array_equal(first.images, second.images)
    with pytest.raises(ValueError, match="an image was decoded"):  # another size is another entry
        read(folder, image_size=4)


def test_changed_folder_is_decoded_again(folder, read):
    picture(color=(255, 0, 0)).save(folder / "a.bmp")
    before = read(folder).images
    picture(color=(0, 255, 0)).save(folder / "a.bmp")  # same name, same size, another time
    os.utime(folder / "a.bmp", ns=(1, 1))
    after = read(folder).images
    np.testing.assert_array_equal(after[0, :, 0, 0], [0, 255, 0])
    np.testing.assert_array_equal(after[1:], before[1:])
    (folder / "b_gray.png").unlink()
    assert len(read(folder).images) == 6


def test_an_interruption_leaves_no_half_entry(folder, read, monkeypatch, tmp_path):
    calls, decode = [], data._decode

    def interrupted(*args):
        calls.append(args)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return decode(*args)

    monkeypatch.setattr(data, "_decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        read(folder)
    assert list((tmp_path / "cache").iterdir()) == []
    monkeypatch.setattr(data, "_decode", decode)
    assert len(read(folder).images) == 6


def test_two_processes_may_build_the_same_entry(folder, read, monkeypatch, tmp_path):
    build = data._build

    def slow(*args):
        monkeypatch.setattr(data, "_build", build)
        read(folder)  # the other process, done before this one
        build(*args)

    monkeypatch.setattr(data, "_build", slow)
    assert len(read(folder).images) == 6
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_few_corrupt_images_are_left_out_and_named(tmp_path, read, capsys):
    root = tmp_path / "many"
    for i in range(120):
        (root / str(i % 2)).mkdir(parents=True, exist_ok=True)
        picture(8, 8, color=(i, i, i)).save(root / str(i % 2) / f"{i:03}.bmp")
    truncated_jpeg(root / "0" / "021.jpg")
    for _ in range(2):  # it is said again when the cache is used
        images, labels, *_ = read(root)
        message = capsys.readouterr().err.splitlines()[-1]
        assert "1 of 121 images" in message
        assert "0/021.jpg" in message
    assert images.shape == (120, 3, 8, 8)
    assert sorted(images[:, 0, 0, 0]) == list(range(120))
    np.testing.assert_array_equal(images[:, 0, 0, 0] % 2, labels)


def test_many_corrupt_images_are_an_error(folder, read, tmp_path):
    truncated_jpeg(folder / "deep" / "half.jpeg")
    (folder / "text.png").write_text("no image at all")
    with pytest.raises(ValueError, match="2 of 8 images cannot be read") as error:
        read(folder)
    assert "deep/half.jpeg" in str(error.value)
    assert "text.png" in str(error.value)
    assert "\n" not in str(error.value)
    assert list((tmp_path / "cache").iterdir()) == []


# Bad arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "digitz"}, "did you mean 'digits'.*digits, folder"),
        ({"name": "?"}, "unknown data set '\\?': known are digits, folder"),
        ({"name": "digits", "split": "validation"}, "train, test, all"),
        ({"name": "digits", "seed": -1}, "seed"),
        ({"name": "digits", "image_size": 32}, "8 or 16, not 32"),
        ({"name": "digits", "channels": 3}, "1 channel"),
        ({"name": "digits", "data": "somewhere"}, "need no data"),
        ({"name": "folder"}, "needs data"),
        ({"name": "folder", "data": ".", "split": "test"}, "no test split"),
        ({"name": "folder", "data": ".", "image_size": 0}, "image size"),
        ({"name": "folder", "data": ".", "channels": 4}, "not 4"),
    ],
)
def test_bad_arguments_are_one_clear_sentence_and_write_nothing(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        load(**arguments, cache=tmp_path / "cache")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "cache").exists()


def test_folders_without_images(tmp_path, read):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read(tmp_path / "nowhere")
    (tmp_path / "empty" / ".hidden").mkdir(parents=True)
    picture().save(tmp_path / "empty" / ".hidden" / "a.png")
    with pytest.raises(ValueError, match=r"no images in .*empty.*png"):
        read(tmp_path / "empty")
    picture().save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="is a file"):
        read(tmp_path / "a.png")
    assert not (tmp_path / "cache").exists()


def test_every_data_set_can_be_listed():
    assert list(DATASETS) == ["digits", "folder"]
    assert all(dataset.image_size and dataset.channels for dataset in DATASETS.values())


# Batches


@settings(deadline=None)
@given(n=st.integers(1, 50), batch=st.integers(1, 120), seed=st.integers(0, 2**31), epochs=st.integers(1, 4))
def test_batches_laid_end_to_end_are_whole_epochs(n, batch, seed, epochs):
    steps = -(-n * epochs // batch)
    batches = [batch_indices(n, batch, step, seed) for step in range(steps)]
    assert all(index.shape == (batch,) and index.dtype == np.int64 for index in batches)
    order = np.concatenate(batches)[: n * epochs].reshape(epochs, n)
    np.testing.assert_array_equal(np.sort(order, axis=1), np.tile(np.arange(n), (epochs, 1)))


@settings(deadline=None)
@given(n=st.integers(1, 50), batch=st.integers(1, 120), step=st.integers(0, 10**6), seed=st.integers(0, 2**31))
def test_a_batch_is_a_pure_function_of_its_arguments(n, batch, step, seed):
    first = batch_indices(n, batch, step, seed)
    kept = first.copy()
    first[:] = -1  # nor may a caller change what the next one gets
    data._permutation.cache_clear()
    np.testing.assert_array_equal(batch_indices(n, batch, step, seed), kept)
    halves = [batch_indices(n, batch, 2 * step + i, seed) for i in (0, 1)]
    np.testing.assert_array_equal(batch_indices(n, 2 * batch, step, seed), np.concatenate(halves))


def test_epochs_and_seeds_differ():
    orders = [batch_indices(1000, 1000, epoch, seed).tolist() for epoch in range(3) for seed in range(3)]
    assert len({tuple(order) for order in orders}) == 9


@pytest.mark.parametrize("arguments", [(0, 1, 0, 0), (1, 0, 0, 0), (1, 1, -1, 0), (1, 1, 0, -1)])
def test_bad_batches(arguments):
    with pytest.raises(ValueError, match="batch_indices needs"):
        batch_indices(*arguments)


# Pixels


def test_pixels_go_to_floats_and_back():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    x = to_float(pixels)
    assert x.dtype == torch.float32
    assert (x.min(), x.max()) == (-1, 1)
    np.testing.assert_array_equal(to_uint8(x), pixels)
    np.testing.assert_array_equal(to_float(torch.from_numpy(pixels)), x)
    assert to_uint8(torch.tensor([-7.0, 7.0, 0.001, float("inf")])).tolist() == [0, 255, 128, 255]


def test_pixels_of_a_read_only_map_are_copied_without_a_warning(folder, read):
    images = read(folder).images
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        to_float(images[:2]).add_(1)
        to_float(images[np.array([0, 1])])


def test_pixels_of_the_wrong_type():
    with pytest.raises(ValueError, match="uint8"):
        to_float(torch.zeros(2))
    with pytest.raises(ValueError, match="floats"):
        to_uint8(torch.zeros(2, dtype=torch.uint8))


def test_flip_is_decided_by_sample_and_by_generator():
    x = torch.arange(3.0).expand(1000, 2, 3, 3)
    flipped = random_flip(x, torch.Generator().manual_seed(0))
    mirrored = flipped[:, 0, 0, 0] == 2
    assert 440 < mirrored.sum() < 560
    assert torch.equal(flipped[mirrored], x.flip(-1)[mirrored])
    assert torch.equal(flipped[~mirrored], x[~mirrored])
    assert torch.equal(flipped, random_flip(x, torch.Generator().manual_seed(0)))
    assert not torch.equal(flipped, random_flip(x, torch.Generator().manual_seed(1)))
