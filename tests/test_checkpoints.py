"""Networks that others published: files of every format, diffusers folders, the hub, downloads."""

import argparse
import hashlib
import inspect
import json
import sys
import threading
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import save_file

import foreign
from foreign import PUBLIC, download, load, public_teacher
from models import UNet, load_checkpoint

TINY = {"image_size": 8, "channels": 8, "channel_mults": (1, 2), "num_res_blocks": 1, "norm_groups": 4}


def a_net(seed: int) -> UNet:
    torch.manual_seed(seed)
    return UNet(**TINY).eval()


def prefixed(state: dict) -> dict:
    return {f"module.{name}": tensor for name, tensor in state.items()}


def holds(net: torch.nn.Module, state: dict) -> bool:
    return all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())


# ---- files -----------------------------------------------------------------------------------------------------------

FORMATS = {  # what a file holds, from the last weights and their average, which is what has to be read
    "plain": lambda last, mean: mean,
    "plain with module.": lambda last, mean: prefixed(mean),
    "ddim": lambda last, mean: [prefixed(last), {"state": {}, "param_groups": []}, 7, 1000, prefixed(mean)],
    "ddim without average": lambda last, mean: [prefixed(mean), {"state": {}}, 7, 1000],
    "Diff-Pruning's CelebA": lambda last, mean: [last, {"state": {}}, 7, 1000, prefixed(mean)],
    "DiT": lambda last, mean: {"model": last, "ema": mean, "opt": {}, "args": argparse.Namespace(lr=1e-4)},
    "model": lambda last, mean: {"model": mean, "step": 3},
    "state_dict": lambda last, mean: {"state_dict": prefixed(mean)},
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_every_format_fills_the_network(name, zipped, tmp_path):
    last, mean = a_net(0).state_dict(), a_net(1).state_dict()
    path = tmp_path / "model.ckpt"
    torch.save(FORMATS[name](last, mean), path, _use_new_zipfile_serialization=zipped)
    net = a_net(2).train()
    load_checkpoint(net, path)
    assert holds(net, mean) and net.training


def test_safetensors_fill_the_network_whatever_its_dtype(tmp_path):
    state = a_net(1).state_dict()
    save_file(state, tmp_path / "model.safetensors")
    net = a_net(2).bfloat16()
    load_checkpoint(net, str(tmp_path / "model.safetensors"))
    assert holds(net, {name: tensor.bfloat16() for name, tensor in state.items()})


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_refused_and_does_not_run(zipped, tmp_path):
    torch.save([Bomb(tmp_path / "ran"), {}], tmp_path / "model.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"model\.pth holds a pickled .* would run code from the file") as caught:
        load_checkpoint(a_net(0), tmp_path / "model.pth")
    assert not (tmp_path / "ran").exists() and "\n" not in str(caught.value)


@pytest.mark.parametrize("training", [False, True], ids=["pruned file", "training checkpoint"])
def test_the_command_in_the_refusal_converts_a_pickled_module(training, tmp_path, monkeypatch):
    last, mean = a_net(0), a_net(1)
    content = [last, {}, 7, 1000, list(mean.parameters())] if training else mean
    torch.save(content, tmp_path / "old.pth")
    with pytest.raises(ValueError, match="python -c") as caught:
        load_checkpoint(a_net(2), tmp_path / "old.pth")
    monkeypatch.chdir(tmp_path)
    exec(str(caught.value).split('python -c "')[1].removesuffix('"'))
    net = a_net(2)
    load_checkpoint(net, tmp_path / "weights.pt")
    assert holds(net, mean.state_dict())


def test_damaged_files_are_one_clear_error(tmp_path):
    state = a_net(0).state_dict()
    torch.save(state, tmp_path / "zip.pt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "new.safetensors")
    for path in list(tmp_path.iterdir()):
        whole = path.read_bytes()
        for length in (0, 3, 10, 100, 1000, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:length])
            with pytest.raises(ValueError, match=rf"{path.name} \({length:,} bytes\) is cut off, damaged, or no check"):
                load_checkpoint(a_net(0), path)
    (tmp_path / "page.pt").write_text("<html>Too many users have downloaded this file</html>")
    with pytest.raises(ValueError, match=r"page\.pt .* no checkpoint"):
        load_checkpoint(a_net(0), tmp_path / "page.pt")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt"):
        load_checkpoint(a_net(0), tmp_path / "nowhere.pt")


@pytest.mark.parametrize("content", [[], {}, {"step": 3}, [1, 2], {"ema": 0.5}, torch.zeros(3)], ids=str)
def test_files_without_weights_are_one_clear_error(content, tmp_path):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model\.pt holds no weights"):
        load_checkpoint(a_net(0), tmp_path / "model.pt")


def test_weights_that_do_not_fit_are_named_and_change_nothing(tmp_path):
    net, state = a_net(0), a_net(1).state_dict()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    del state["conv_in.bias"]
    state["conv_in.weight"] = torch.zeros(8, 1, 3, 3)
    state["logits.weight"] = torch.zeros(10)
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(ValueError) as caught:
        load_checkpoint(net, tmp_path / "model.pt")
    for part in (
        "model.pt does not fit UNet(image_size=8, ",
        "channel_mults=[1, 2]",
        "conv_in.weight is (8, 3, 3, 3) by the config, but (8, 1, 3, 3) in the weights",
        "conv_in.bias is (8,) by the config, but absent in the weights",
        "logits.weight is absent by the config, but (10,) in the weights",
    ):
        assert part in str(caught.value)
    torch.save({"other": torch.zeros(1)}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"and \d+ more$"):
        load_checkpoint(net, tmp_path / "model.pt")
    assert holds(net, before)


# ---- diffusers -------------------------------------------------------------------------------------------------------

# the settings of the published networks, which differ from diffusers' defaults
DDPM = {
    "freq_shift": 1,
    "flip_sin_to_cos": False,
    "downsample_padding": 0,
    "norm_eps": 1e-6,
    "attention_head_dim": None,
}
SMALL = {
    "sample_size": 16,
    "block_out_channels": (32, 32, 64),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
    "dropout": 0.1,
    **DDPM,
}
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def theirs(**settings) -> UNet2DModel:
    torch.manual_seed(0)
    net = UNet2DModel(**{**SMALL, **settings}).eval()
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)  # norms and biases would else be 1 and 0, and could be exchanged unnoticed
    return net


def agree(ours: UNet, other: UNet2DModel) -> bool:
    size, channels = ours.config["image_size"], ours.config["in_channels"]
    x, t = torch.randn(3, channels, size, size), torch.tensor([0, 500, 999])
    with torch.no_grad():
        difference = (ours(x, t) - other(x, t).sample).abs().max()
    return difference < 1e-5 * other(x, t).sample.abs().max()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"in_channels": 1, "out_channels": 2, "layers_per_block": 1, "sample_size": 8},
        {  # widths as in LSUN: pairs of equal ones, the attention on the way between
            "block_out_channels": (32, 32, 64, 64),
            "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        },
    ],
)
def test_a_diffusers_folder_gives_the_same_outputs(settings, tmp_path, monkeypatch):
    other = theirs(**settings)
    other.save_pretrained(tmp_path / "unet")
    monkeypatch.setitem(sys.modules, "diffusers", None)  # not needed for reading
    for folder in (tmp_path / "unet", tmp_path):
        net = load(folder)
        assert type(net) is UNet and not net.training and agree(net, other)
        assert net.config["dropout"] == 0.1
    net.save(tmp_path / "ours")
    assert agree(load(tmp_path / "ours"), other)


def test_an_old_diffusers_folder_gives_the_same_outputs(tmp_path):
    other = theirs()
    state = other.state_dict()
    for new, old in OLD_NAMES.items():
        state = {name.replace(f".{new}.", f".{old}."): tensor for name, tensor in state.items()}
    torch.save(state, tmp_path / "diffusion_pytorch_model.bin")
    early = {"sample_size", "block_out_channels", "layers_per_block", "down_block_types", "up_block_types", *DDPM}
    config = {name: value for name, value in other.config.items() if name in early | {"norm_num_groups"}}
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel", **config}))
    assert agree(load(tmp_path), other)


def test_the_published_config_is_that_of_our_table():
    config = {  # of google/ddpm-cat-256, the same network as bedroom and church
        "_class_name": "UNet2DModel",
        "_diffusers_version": "0.0.4",
        "act_fn": "silu",
        "block_out_channels": [128, 128, 256, 256, 512, 512],
        "center_input_sample": False,
        "down_block_types": ["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"],
        "in_channels": 3,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 256,
        "time_embedding_type": "positional",
        "up_block_types": ["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4,
        **DDPM,
    }
    with torch.device("meta"):
        assert UNet(**foreign._diffusers_config(config)).config == UNet(**PUBLIC["lsun_church"].config).config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_eps": 1e-5}, "setting norm_eps is 1e-05, but UNet only knows 1e-06"),
        ({"attention_head_dim": 8}, "setting attention_head_dim is 8, but UNet only knows None"),
        ({"freq_shift": 0}, "setting freq_shift"),
        ({"flip_sin_to_cos": True}, "setting flip_sin_to_cos"),
        ({"downsample_padding": 1}, "setting downsample_padding"),
        ({"resnet_time_scale_shift": "scale_shift"}, "setting resnet_time_scale_shift"),
        ({"time_embedding_type": "fourier"}, "setting time_embedding_type"),
        ({"num_class_embeds": 10}, "setting num_class_embeds"),
        ({"add_attention": False}, "setting add_attention"),
        ({"_class_name": "UNet1DModel"}, "a UNet1DModel, of diffusers only UNet2DModel, UNet2DConditionModel, SD3Tr"),
        ({"sample_size": None}, "sample_size"),
        ({"sample_size": [16, 32]}, "sample_size"),
        ({"block_out_channels": [32, 48, 64]}, "multiples of the first"),
        ({"down_block_types": ["DownBlock2D", "SkipDownBlock2D", "DownBlock2D"]}, "SkipDownBlock2D"),
        ({"up_block_types": ["UpBlock2D", "UpBlock2D", "UpBlock2D"]}, "mirrored"),
        ({}, "by the config, but absent in the weights"),
    ],
)
def test_what_unet_cannot_express_is_refused_by_name(change, message, tmp_path):
    config = {"_class_name": "UNet2DModel", **json.loads(json.dumps(SMALL)), **change}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save({"conv_in.weight": torch.zeros(32, 3, 3, 3)}, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=f"cannot be loaded: .*{message}"):
        load(tmp_path)


def test_settings_that_a_config_leaves_out_are_those_of_diffusers():
    defaults = {
        name: parameter.default for name, parameter in inspect.signature(UNet2DModel.__init__).parameters.items()
    }
    needed = foreign.DIFFUSERS_NEEDED
    assert {name: defaults[name] for name in needed} == {**needed, **foreign.DIFFUSERS_DEFAULTS}
    assert {name: needed[name] for name in foreign.DIFFUSERS_DEFAULTS} == DDPM
    for name in DDPM:
        config = {"_class_name": "UNet2DModel", **SMALL}
        del config[name]
        with pytest.raises(ValueError, match=f"setting {name}"):
            foreign._diffusers_config(config)


def test_a_diffusers_folder_without_weights_says_so(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel", **SMALL}))
    with pytest.raises(FileNotFoundError, match=r"no diffusion_pytorch_model\.safetensors and no .*\.bin"):
        load(tmp_path)


# ---- the hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one model, whose files a test puts into the folder `hub.folder`."""

    def snapshot_download(name, allow_patterns):
        fake.asked.append((name, allow_patterns))
        if fake.error:
            raise fake.error
        for file in fake.folder.rglob("*.*"):
            inside = file.relative_to(fake.folder)
            if inside.as_posix() in allow_patterns:
                (fake.cache / inside).parent.mkdir(parents=True, exist_ok=True)
                (fake.cache / inside).write_bytes(file.read_bytes())
        return str(fake.cache)

    fake = types.ModuleType("huggingface_hub")
    fake.snapshot_download, fake.asked, fake.error = snapshot_download, [], None
    fake.folder, fake.cache = tmp_path / "remote", tmp_path / "cache"
    fake.folder.mkdir()
    fake.cache.mkdir()
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    monkeypatch.chdir(tmp_path)
    return fake


@pytest.mark.parametrize("inside", ["", "unet"])
@pytest.mark.parametrize("safe", [True, False])
def test_a_hub_id_is_fetched_and_loaded(hub, inside, safe):
    other = theirs()
    other.save_pretrained(hub.folder / inside, safe_serialization=safe)
    if not safe and not list(hub.folder.rglob("*.bin")):  # newer diffusers write safetensors whatever they are told
        file = next(hub.folder.rglob("*.safetensors"))
        file.unlink()
        torch.save(other.state_dict(), file.with_suffix(".bin"))
    assert agree(load("someone/ddpm"), other)
    assert len(hub.asked) == (1 if safe else 2)
    assert len(list(hub.cache.rglob("*model*"))) == 1


def test_our_own_students_load_from_the_hub_and_folders_come_first(hub, tmp_path):
    a_net(0).save(hub.folder)
    assert holds(load("someone/student"), a_net(0).state_dict())
    a_net(1).save(tmp_path / "someone" / "student")
    hub.asked.clear()
    assert holds(load("someone/student"), a_net(1).state_dict()) and not hub.asked


def test_hub_ids_that_cannot_be_fetched_say_why(hub, monkeypatch):
    hub.error = OSError("no connection to the hub")
    with pytest.raises(FileNotFoundError, match=r"no folder google/ddpm, and .* cannot be fetched: no connection"):
        load("google/ddpm")
    hub.error = None
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors"):
        load("google/ddpm")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match=r"no folder google/ddpm, .* pip install huggingface_hub"):
        load("google/ddpm")
    for path in ("ddpm", "a/b/c", "/a/b", "../a", "./b"):
        with pytest.raises(FileNotFoundError, match="is not a saved network"):
            load(path)


# ---- downloads -------------------------------------------------------------------------------------------------------

CONTENT = bytes(range(256)) * 1000
MD5 = hashlib.md5(CONTENT).hexdigest()


@pytest.fixture
def server():
    """A local server of one file: its `content`, where to `cut` it off, whether it knows `ranges`, tells `lengths`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked = self.headers.get("Range")
            httpd.asked.append(asked)
            if self.path != "/file":
                self.send_error(404)
                return
            start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and httpd.ranges else 0
            if start >= len(httpd.content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(httpd.content)}")
                self.end_headers()
                return
            self.send_response(206 if start else 200)
            if httpd.lengths:
                self.send_header("Content-Length", str(len(httpd.content) - start))
            self.end_headers()
            self.wfile.write(httpd.content[start : httpd.cut])

        def log_message(self, *args):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.content, httpd.cut, httpd.ranges, httpd.lengths, httpd.asked = CONTENT, None, True, True, []
    httpd.url = f"http://127.0.0.1:{httpd.server_port}/file"
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield httpd
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def test_a_download_is_made_once(server, tmp_path, capsys):
    path = tmp_path / "deep" / "file"
    for _ in range(2):
        download(server.url, path, MD5, progress=False)
        assert path.read_bytes() == CONTENT and [f.name for f in path.parent.iterdir()] == ["file"]
    download(server.url, path, progress=False)  # nothing to compare with
    assert server.asked == [None]
    path.write_bytes(b"something else")
    download(server.url, path, MD5, progress=True)
    assert path.read_bytes() == CONTENT and server.asked == [None, None]
    assert "file: 100%" in capsys.readouterr().err


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_that_was_cut_off_goes_on(ranges, server, tmp_path):
    server.cut, server.ranges = len(CONTENT) // 2, ranges
    with pytest.raises(OSError, match="broke off after 128,000 of 256,000 bytes: the same command goes on"):
        download(server.url, tmp_path / "file", MD5, progress=False)
    assert [f.name for f in tmp_path.iterdir()] == ["file.part"]
    server.cut = None
    download(server.url, tmp_path / "file", MD5, progress=False)
    assert (tmp_path / "file").read_bytes() == CONTENT and server.asked == [None, "bytes=128000-"]
    assert not (tmp_path / "file.part").exists()


@pytest.mark.parametrize("found", [CONTENT, CONTENT + b"more"], ids=["complete", "too long"])
def test_a_part_with_nothing_left_to_fetch(found, server, tmp_path):
    (tmp_path / "file.part").write_bytes(found)
    download(server.url, tmp_path / "file", progress=False)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert len(server.asked) == (1 if found == CONTENT else 2)


def test_a_server_that_names_no_length(server, tmp_path):
    server.lengths = False
    download(server.url, tmp_path / "file", MD5, progress=False)
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_wrong_checksum_leaves_nothing_behind(server, tmp_path):
    server.content = CONTENT[::-1]
    with pytest.raises(ValueError, match=f"256,000 bytes with md5 .* instead of {MD5}; they were removed"):
        download(server.url, tmp_path / "file", MD5, progress=False)
    assert not list(tmp_path.iterdir())


def test_servers_that_do_not_answer_are_one_clear_error(server, tmp_path):
    with pytest.raises(OSError, match=r"/nothing cannot be downloaded: .*404"):
        download(server.url.replace("/file", "/nothing"), tmp_path / "file", progress=False)
    with pytest.raises(OSError, match=r"cannot be downloaded: .*refused"):
        download("http://127.0.0.1:1/file", tmp_path / "file", progress=False)
    assert not list(tmp_path.iterdir())


# ---- public teachers -------------------------------------------------------------------------------------------------


def test_the_table_holds_the_published_networks():
    sizes = {"celeba": 78_700_803, "cifar10": 35_746_307, "lsun_bedroom": 113_673_219, "lsun_church": 113_673_219,
             "imagenet": 675_129_632}  # fmt: skip
    for name, public in PUBLIC.items():
        with torch.device("meta"):
            assert sum(p.numel() for p in public.kind(**public.config).parameters()) == sizes.pop(name)
        assert public.url.startswith("https://") and (public.md5 is None or len(bytes.fromhex(public.md5)) == 16)
    assert not sizes and len({public.file for public in PUBLIC.values()}) == len(PUBLIC)


@pytest.fixture
def public(server, tmp_path, monkeypatch):
    """A data set `dots` with a public teacher on the local server."""
    torch.save(a_net(1).state_dict(), tmp_path / "remote.pt")
    server.content = (tmp_path / "remote.pt").read_bytes()
    entry = foreign.Public("dots.pt", server.url, hashlib.md5(server.content).hexdigest(), TINY, "google/dots")
    monkeypatch.setitem(PUBLIC, "dots", entry)
    return entry


def test_the_public_teacher_is_downloaded_once(public, server, tmp_path):
    for _ in range(2):
        net = public_teacher("dots", tmp_path / "teachers", progress=False)
        assert holds(net, a_net(1).state_dict()) and not net.training
    assert len(server.asked) == 1


def test_a_teacher_that_cannot_be_had_names_the_alternatives(public, server, tmp_path, monkeypatch):
    others = (
        r"with a browser and give it as --teacher PATH .*dots\.pt\), or use --teacher google/dots or --teacher train$"
    )
    server.content = b"<html>"
    with pytest.raises(OSError, match=f"md5 .*; if that does not help, fetch {server.url} {others}"):
        public_teacher("dots", tmp_path / "teachers", progress=False)
    with pytest.raises(ValueError, match=r"no public teacher is known for cats, only for celeba, .*--teacher train"):
        public_teacher("cats", tmp_path)


def test_a_teacher_behind_a_page_for_people_is_fetched_by_hand(public, tmp_path, monkeypatch):
    monkeypatch.setitem(PUBLIC, "celeba", PUBLIC["celeba"]._replace(config=TINY))
    with pytest.raises(
        FileNotFoundError, match=r"fetch https://drive\.google\.com.* as --teacher PATH .*celeba\.pth\)"
    ):
        public_teacher("celeba", tmp_path)
    mean = a_net(1).state_dict()
    torch.save([prefixed(a_net(0).state_dict()), {}, 7, 1000, prefixed(mean)], tmp_path / PUBLIC["celeba"].file)
    assert holds(public_teacher("celeba", tmp_path), mean)
    torch.save({"conv_in.weight": torch.zeros(1)}, tmp_path / PUBLIC["celeba"].file)
    with pytest.raises(ValueError, match=r"ddim_celeba\.pth is no teacher for celeba: .* by the config"):
        public_teacher("celeba", tmp_path)
