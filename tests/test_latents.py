"""Images and captions to latents with tiny networks, and the folders of latents that can be read."""

import gzip
import io
import json
import os
import shutil
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CAPTIONS, FAMILIES, an_image
from PIL import Image

from distil import data, shards, text_to_image
from distil.batches import batch_indices, fetched
from distil.latents import _adm, encode, main
from distil.latents import captioned as read_captions

diffusers = pytest.importorskip("diffusers")


def tiny_vae(folder, seed=0):
    torch.manual_seed(seed)
    widths, kinds = (8, 16), (["DownEncoderBlock2D"] * 2, ["UpDecoderBlock2D"] * 2)
    settings = {"latent_channels": 4, "norm_num_groups": 4, "sample_size": 16}
    settings |= {"scaling_factor": 0.5, "shift_factor": 0.1}
    net = diffusers.AutoencoderKL(3, 3, *kinds, widths, layers_per_block=1, **settings)
    net.save_pretrained(folder)


def command(*changes, vae="vae", images="images", out="latents"):
    where = ["--vae", vae, "--data", images, "--out", out]
    return main([*where, "--image-size", "16", "--batch", "3", "--device", "cpu", *changes])


def contents(folder):
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two VAEs, 21 pictures of two classes in odd sizes, and their latents in shards of 8."""
    folder = tmp_path_factory.mktemp("made")
    tiny_vae(folder / "vae")
    tiny_vae(folder / "other-vae", seed=1)
    generator = np.random.default_rng(0)
    for i in range(21):
        place = folder / "images" / ("cat" if i % 3 else "ant")
        place.mkdir(parents=True, exist_ok=True)
        size = (int(generator.integers(16, 40)), int(generator.integers(16, 40)), 3)
        Image.fromarray(generator.integers(0, 256, size, np.uint8)).save(place / f"{i:02d}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(shards, "SHARD", 8)
        assert command() == 0
    return folder


@pytest.fixture
def workspace(made, tmp_path, monkeypatch):
    """A copy of it as the working directory."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shards, "SHARD", 8)
    return tmp_path


# ---- Images ----------------------------------------------------------------------------------------------------------


def test_latents_are_those_of_the_vae(workspace):
    latents = data.load("latents", "latents")
    assert latents.images.shape == (21, 2, 4, 8, 8) and latents.shape == (4, 8, 8)
    assert latents.images[:].dtype == latents.images.dtype == np.float32 and latents.no_condition is None
    assert (latents.record["vae"], latents.record["image_size"], latents.record["shard"]) == ("vae", 16, 8)
    files = sorted(Path("images").rglob("*.png"))
    assert latents.labels.tolist() == [file.parent.name == "cat" for file in files]
    net = diffusers.AutoencoderKL.from_pretrained("vae").eval()
    for i in (0, 9, 20):
        image = torch.from_numpy(_adm(files[i], 16))
        both = torch.stack([image, image.flip(-1)]) / 127.5 - 1
        with torch.no_grad():
            posterior = net.encode(both).latent_dist
        noise = torch.from_numpy(np.random.default_rng((0, i)).standard_normal((2, 4, 8, 8), np.float32))
        expected = (posterior.mean + posterior.std * noise - 0.1) * 0.5
        kept = torch.from_numpy(latents.images[i])  # in 16 bits
        torch.testing.assert_close(kept, expected, rtol=2e-3, atol=2e-3)


def test_the_square_is_that_of_adm(tmp_path):
    """A picture of 4 times the size: halved by boxes until it is near, then bicubic, then the middle."""
    pixels = np.random.default_rng(0).integers(0, 256, (70, 100, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = Image.fromarray(pixels).resize((50, 35), Image.Resampling.BOX).resize((25, 17), Image.Resampling.BOX)
    image = np.asarray(image.resize((24, 16), Image.Resampling.BICUBIC))[:, 4:20]
    np.testing.assert_array_equal(_adm(tmp_path / "a.png", 16), image.transpose(2, 0, 1))


def test_images_are_encoded_as_people_see_them(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3  # stored upside down
    above = np.zeros((16, 16, 3), np.uint8)
    above[:8] = 200
    Image.fromarray(above).save(tmp_path / "a.png", exif=exif)
    assert (_adm(tmp_path / "a.png", 16)[:, 8:] == 200).all()
    Image.fromarray(np.full((16, 16), 32768, np.uint16)).save(tmp_path / "b.png")
    assert (_adm(tmp_path / "b.png", 16) == 128).all()
    Image.new("RGBA", (16, 16), (0, 0, 0, 0)).save(tmp_path / "c.png")
    assert (_adm(tmp_path / "c.png", 16) == 255).all()


def test_encoding_goes_on_where_it_was_and_may_be_shared(workspace, monkeypatch):
    from distil.text_to_image import Vae

    files = contents("latents")
    names = ["labels.npy", "latents-00000.npy", "latents-00001.npy", "latents-00002.npy", "latents.json"]
    assert sorted(files) == names
    (Path("latents") / "latents-00001.npy").unlink()
    before = (Path("latents") / "latents-00000.npy").stat().st_mtime_ns
    assert command() == 0
    assert contents("latents") == files
    assert (Path("latents") / "latents-00000.npy").stat().st_mtime_ns == before
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    for rank, count in (("0", 4), ("1", 5)):
        monkeypatch.setenv("RANK", rank)
        encode(Vae("vae"), Path("images"), Path("shared"), image_size=16, batch=3)
        assert len(contents("shared")) == count
    assert contents("shared") == files
    (Path("shared") / "latents.json").unlink()  # then nothing says that the others were made so, too
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match=r"latents-00000\.npy is there without latents\.json, .*: empty that folder"):
        encode(Vae("vae"), Path("images"), Path("shared"), image_size=16, seed=1)
    assert not (Path("shared") / "latents.json").exists()


def test_a_vae_is_given_as_many_pixels_as_memory_takes(workspace, monkeypatch):
    vae, sizes = text_to_image.Vae("vae"), []
    images = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    whole = vae.encode(images, noise)
    shown = vae.decode(whole)
    torch.testing.assert_close(shown, vae.net.decode(whole / 0.5 + 0.1).sample)
    for name in ("encode", "decode"):
        method = getattr(vae.net, name)
        monkeypatch.setattr(vae.net, name, lambda x, method=method: (sizes.append(len(x)), method(x))[1])
    monkeypatch.setattr(text_to_image, "ENCODED", 4 * 256)
    monkeypatch.setattr(text_to_image, "DECODED", 256)
    torch.testing.assert_close(vae.encode(images, noise), whole)
    torch.testing.assert_close(vae.decode(whole), shown)
    assert sizes == [4, 2] + [1] * 6


def test_a_full_disk_is_noticed_before_encoding(workspace, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(SystemExit):
        command(out="full")
    assert "latents take 0.0 GB" in capsys.readouterr().err and not list(Path("full").iterdir())


def test_tinyfusions_layout_is_read(workspace):
    latents = data.load("latents", "latents")
    for kind in ("features", "labels"):
        Path(f"tiny/imagenet256_{kind}").mkdir(parents=True)
    for i in range(12):
        np.save(f"tiny/imagenet256_features/{i}.npy", latents.images[i : i + 1] if i % 2 else latents.images[i])
        np.save(f"tiny/imagenet256_labels/{i}.npy", latents.labels[i : i + 1])
    read = data.load("imagenet", "tiny", cache="cache")
    order = sorted(range(12), key=str)  # their order is that of the names
    assert read.images.shape == (12, 2, 4, 8, 8) and read.record == {"vae": None, "count": 12, "size": [4, 8, 8]}
    np.testing.assert_array_equal(read.images[:], latents.images[order])
    np.testing.assert_array_equal(read.images[3], latents.images[order[3]])
    for _ in range(2):
        np.testing.assert_array_equal(data.load("imagenet", "tiny", cache="cache").labels, latents.labels[order])
    np.save("tiny/imagenet256_labels/9.npy", 1 - latents.labels[9:10])
    assert data.load("imagenet", "tiny", cache="cache").labels[-1] == 1 - latents.labels[9]  # they are read again
    for shape in ((1, 4, 8, 8), (4, 8, 8)):
        np.save("tiny/imagenet256_features/0.npy", np.zeros(shape, np.float32))
        with pytest.raises(ValueError, match=r"0\.npy has the shape .* not \(2, C, H, W\), an image and its mirror"):
            data.load("imagenet", "tiny", cache="cache")
    np.save("tiny/imagenet256_features/0.npy", latents.images[0])
    Path("tiny/imagenet256_features/0.npy").write_bytes(b"")
    with pytest.raises(ValueError, match=r"features/0\.npy is damaged"):
        data.load("imagenet", "tiny", cache="cache")
    np.save("tiny/imagenet256_features/0.npy", latents.images[0])
    Path("tiny/imagenet256_labels/3.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"3\.npy is missing"):
        data.load("imagenet", "tiny", cache="other-cache")


def test_more_files_of_tinyfusion_are_read_than_may_be_open(tmp_path):
    resource = pytest.importorskip("resource")
    for kind, value in (("features", np.zeros((2, 4, 2, 2), np.float32)), ("labels", np.array([1]))):
        (tmp_path / f"of_{kind}").mkdir()
        for i in range(200):
            np.save(tmp_path / f"of_{kind}" / f"{i}.npy", value)
    former = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 60, former[1]))
    try:
        assert data.load("imagenet", tmp_path, cache=tmp_path / "cache").labels.tolist() == [1] * 200
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, former)


# ---- Captions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_captions_lie_beside_their_latents(family, pipelines, latents):
    from distil.text_to_image import TextEncoder

    found, encoder = data.load("latents", latents[family]), TextEncoder(pipelines[family])
    assert found.shape == (4, 8, 8) and len(found.images) == 8 and found.labels is None
    rows = np.array([5, 0, 2])
    for name, value in found.conditions(rows).items():
        exact = encoder.encode([CAPTIONS[i] for i in rows])[name]
        assert value.dtype == torch.bfloat16 and torch.equal(value, exact.bfloat16())
        assert torch.equal(found.no_condition[name], encoder.encode([""])[name][0].bfloat16())
    pixels, cond = next(fetched(found, 8, seed=0))
    expected = found.conditions(batch_indices(8, 8, 0, 0))
    assert pixels.shape == (8, 2, 4, 8, 8)
    assert cond.keys() == expected.keys() == set(encoder.shapes)
    assert all(torch.equal(value, expected[name]) for name, value in cond.items())


def test_a_broken_image_gives_its_place_to_another_with_its_caption(pipelines, captioned, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MAX_CORRUPT", 0.5)
    shutil.copytree(captioned, tmp_path / "images")
    (tmp_path / "images" / "3.png").write_bytes(b"no image")
    pipeline, where = str(pipelines["sd"]), {"images": str(tmp_path / "images"), "out": str(tmp_path / "out")}
    assert command("--text", pipeline, "--image-size", "64", vae=pipeline, **where) == 0
    text = data.load("latents", tmp_path / "out").conditions(np.arange(8))["text"]
    assert torch.equal(text[3], text[4]) and not torch.equal(text[3], text[2])


@pytest.fixture
def layouts(tmp_path):
    """The captioned images as metadata.jsonl, and as two tars."""
    (tmp_path / "jsonl").mkdir()
    (tmp_path / "tars").mkdir()
    rows = [json.dumps({"file_name": f"{i}.png", "text": text, "more": 1}) for i, text in enumerate(CAPTIONS)]
    (tmp_path / "jsonl" / "metadata.jsonl").write_text("\n".join(rows))
    for i, caption in enumerate(CAPTIONS):
        an_image(i).save(tmp_path / "jsonl" / f"{i}.png")
        png = (tmp_path / "jsonl" / f"{i}.png").read_bytes()
        about = {".json": json.dumps({"caption": caption}).encode()} if i % 2 else {".txt": f"{caption}\n".encode()}
        with tarfile.open(tmp_path / "tars" / f"{i // 4}.tar", "a") as tar:
            for suffix, content in {".png": png, **about}.items():
                member = tarfile.TarInfo(f"{i:03d}{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return tmp_path


def test_captions_of_every_layout_are_the_same(captioned, layouts):
    both = read_captions(captioned)
    assert both.captions == CAPTIONS
    for source in (layouts / "jsonl", layouts / "tars"):
        found = read_captions(source)
        assert found.captions == CAPTIONS
        for name, other in zip(found.files, both.files, strict=True):
            assert Image.open(found.open(name)).tobytes() == Image.open(both.open(other)).tobytes()
    assert read_captions(layouts / "tars" / "1.tar").captions == CAPTIONS[4:]
    table, rows = captioned / "metadata.csv", layouts / "jsonl" / "metadata.jsonl"
    (layouts / "jsonl" / "metadata.csv").write_bytes(b"\xef\xbb\xbf" + table.read_bytes())  # as Excel writes it
    rows.write_text(rows.read_text() + "\n\n")
    assert read_captions(layouts / "jsonl").captions == CAPTIONS
    (layouts / "jsonl" / "metadata.csv").unlink()


def test_a_caption_with_half_a_character_is_named(layouts):
    with (layouts / "jsonl" / "metadata.jsonl").open("a") as table:
        table.write("\n" + json.dumps({"file_name": "3.png", "text": "caf\ud83d"}))
    with pytest.raises(ValueError, match=r"the caption of 3\.png in .* holds half a character, 'caf.ud83d': mend it"):
        read_captions(layouts / "jsonl")


def test_a_tar_that_cannot_be_read_is_named(layouts):
    (layouts / "tars" / "2.tar").touch()
    with pytest.raises(ValueError, match=r"the captions in .*2\.tar cannot be read"):
        read_captions(layouts / "tars")
    with tarfile.open(layouts / "tars" / "0.tar") as tar:
        between = tar.getmembers()[4].offset
    (layouts / "tars" / "2.tar").write_bytes((layouts / "tars" / "0.tar").read_bytes()[:between])
    with pytest.raises(ValueError, match=r"2\.tar cannot be read: it ends without the mark of its end"):
        read_captions(layouts / "tars")
    packed = layouts / "packed.tar"
    packed.write_bytes(gzip.compress((layouts / "tars" / "0.tar").read_bytes()))
    with pytest.raises(ValueError, match=r"the captions in .*packed\.tar cannot be read"):
        read_captions(packed)


# ---- Refusals --------------------------------------------------------------------------------------------------------


def remove(path):
    Path(path).unlink()


def spoil(path):
    Path(path).write_bytes(b"no array")


def flip(path, at=-100):  # of the last row
    content = bytearray(Path(path).read_bytes())
    content[at] ^= 1
    Path(path).write_bytes(content)


def change(path, **record):
    Path(path).write_text(json.dumps(json.loads(Path(path).read_text()) | record))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: remove("latents/latents-00002.npy"), "latents-00002.npy is missing: run the command .* completes it"),
        (lambda: spoil("latents/latents-00002.npy"), "latents-00002.npy is damaged .*: remove it and run"),
        (
            lambda: np.save("latents/latents-00000.npy", np.zeros((8, 2, 4, 8, 9))),
            r"damaged .*its shape is \(8, 2, 4, 8",
        ),
        (lambda: remove("latents/labels.npy"), "labels.npy is missing"),
        (lambda: spoil("latents/latents.json"), "latents.json is damaged"),
        (lambda: Path("latents/latents.json").write_text('{"count": 21}'), "latents.json is damaged .KeyError"),
        (lambda: remove("latents/latents.json"), "holds no latents"),
        (lambda: flip("latents/latents-00002.npy", 10), "latents-00002.npy is damaged"),
        (lambda: flip("latents/labels.npy"), "labels.npy is damaged.*another checksum"),
        (lambda: change("latents/latents.json", shard=0), "latents.json is damaged"),
        (lambda: change("latents/latents.json", count=-1), "latents.json is damaged"),
        (lambda: change("latents/latents.json", size="big"), "latents.json is damaged"),
        (lambda: change("latents/latents.json", classes=1), "labels.npy holds labels outside of 0 to 0"),
        (lambda: Path("latents/latents.json").write_text("[" * 100_000), "latents.json is damaged"),
    ],
)
def test_a_folder_of_latents_that_is_not_whole_is_refused(change, message, workspace):
    change()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        data.load("latents", "latents")


def test_images_may_change_until_there_are_latents_of_them(workspace, capsys):
    broken = Path("images/ant/odd.png")
    broken.write_bytes(b"no picture")
    with pytest.raises(SystemExit):
        command(out="new")
    assert "remove or repair them" in capsys.readouterr().err
    broken.unlink()
    assert command(out="new") == 0 and contents("new") == contents("latents")


def test_another_image_size_is_refused(workspace):
    with pytest.raises(ValueError, match=r"has images of 16 pixels, not of 32: use --image-size 16"):
        data.load("latents", "latents", image_size=32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vae": "nowhere"}, "neither a folder nor a Hugging Face id"),
        ({"vae": "images"}, "--vae images cannot be loaded: it holds no diffusion_pytorch_model.safetensors"),
        ({"images": "nowhere"}, "there is no folder"),
        ({"more": ["--image-size", "17"]}, "no multiple of 2"),
        ({"more": ["--batch", "0"]}, "--batch 0"),
        ({"more": ["--seed", "-1"]}, "--seed -1"),
        ({"more": ["--device", "cuda:99"]}, "--device cuda:99 is not on this machine"),
        ({"more": ["--colour"]}, "unrecognized arguments: --colour"),
        ({"out": ""}, "--out '' cannot be used"),
        ({"vae": "other-vae", "out": "latents"}, "made otherwise (vae was vae, is other-vae"),
        ({"missing": "diffusers"}, 'pip install -e ".[sd]"'),
    ],
)
def test_the_command_refuses_what_it_cannot_use(changes, message, workspace, capsys, monkeypatch):
    if "missing" in changes:
        monkeypatch.setitem(sys.modules, changes.pop("missing"), None)
    before = contents("latents")
    with pytest.raises(SystemExit) as stop:
        command(*changes.pop("more", []), **{"out": "odd", **changes})
    err = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and message in err[-1]
    assert err[-1].startswith("distil.latents: error: ")
    assert not Path("odd").exists() and contents("latents") == before


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (None, r"has no captions: it needs metadata\.jsonl or metadata\.csv"),
        ("file_name,caption\n0.png,a\n", "needs file_name and text, but one is .*caption"),
        ("file_name,text\n0.png,a\n", "names 1 images that are not there, such as 0.png"),
        ("file_name,text\n", "holds no image with a caption"),
        ("file_name,text\n../a.png,a\n", "names files outside of its folder, such as '../a.png'"),
        ("file_name,text\n/etc/passwd,a\n", "names files outside of its folder, such as '/etc/passwd'"),
        ("\udcff", "the captions in .* cannot be read: .*utf-8"),
    ],
)
def test_captions_that_cannot_be_read_say_why(table, message, tmp_path):
    if table:
        (tmp_path / "metadata.csv").write_bytes(table.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=message):
        read_captions(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no .*nowhere"):
        read_captions(tmp_path / "nowhere")


@pytest.mark.parametrize("rows", ["[1, 2]", "{", "[" * 100_000, "null"])
def test_rows_and_tars_that_are_odd_say_why(rows, tmp_path):
    (tmp_path / "metadata.jsonl").write_text(rows)
    with pytest.raises(ValueError, match=r"cannot be read|needs file_name and text"):
        read_captions(tmp_path)
    with tarfile.open(tmp_path / "odd.tar", "w") as tar:
        link = tarfile.TarInfo("c.txt")  # out of the tar: it is passed over
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        for name, content in (("a.png", b""), ("a.json", rows.encode()), ("b.txt", b"\xff")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("c.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(ValueError, match="cannot be read"):
        read_captions(tmp_path / "odd.tar")
