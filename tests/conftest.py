"""What several test files share: one thread, no hub, a small network, tiny pipelines of Stable Diffusion and latents.

One thread for all tests and the processes that they start: networks so small would only wait for a second one.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # tests are of the CPU, on machines with a GPU too
os.environ["HF_HUB_OFFLINE"] = "1"  # before diffusers is: a name that is no folder is refused at once

import contextlib
import csv
import json
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import models
from distil import data
from distil.networks import Run
from distil.settings import Settings

ROOT = Path(__file__).parents[1]
CAPTIONS = ["a", "ab", "a b", "c", "cab", "b a c", "bb", "ca"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
FAMILIES = ("sd", "mmdit")
SMALL = {"channels": 16, "channel_mults": (1, 2), "num_res_blocks": 1, "attention_resolutions": (), "norm_groups": 8}


def pytest_collection_modifyitems(items: list) -> None:
    """The files with the longest single tests first, so that no process is left alone with them at the end."""
    slow = ("test_train", "test_notebooks", "test_text_to_image", "test_models", "test_evaluate", "test_calibrate",
            "test_process", "test_lift_place", "test_teachers", "test_readme", "test_bench")  # fmt: skip
    items.sort(key=lambda item: slow.index(item.path.stem) if item.path.stem in slow else len(slow))


def a_unet(seed: int = 0, channels: int = 1, **changes) -> models.UNet:
    """A small network for images of 8x8 pixels, in eval mode."""
    torch.manual_seed(seed)
    return models.UNet(8, channels, **{**SMALL, **changes}).eval()


def a_dit(depth: int = 6) -> models.DiT:
    """A small transformer for latents of `some_latents`, in eval mode, whose blocks do something."""
    torch.manual_seed(0)
    net = models.DiT(8, 2, 4, 16, depth, 2, num_classes=2)
    for p in net.parameters():
        if p.requires_grad:  # with adaLN-Zero its blocks would do nothing
            torch.nn.init.normal_(p, std=0.15)
    return net.eval()


def some_latents(n: int = 24) -> data.Images:
    """Random latents of images and their mirror images, of two classes."""
    generator = np.random.default_rng(0)
    latents = generator.standard_normal((n, 2, 4, 8, 8), np.float32)
    return data.Images(latents, np.arange(n) % 2, "latents")


def a_run(settings: Settings, images: data.Images) -> Run:
    """A run that has nothing but its images."""
    return Run(settings, torch.device("cpu"), images)


def same(a, b) -> bool:
    """Whether nested dicts and lists of tensors are equal bit for bit; of networks, all their weights."""
    if isinstance(a, torch.nn.Module):
        return same(a.state_dict(), b.state_dict())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def free_ports(n: int) -> list[str]:
    """Numbers of ports on which nothing listens, all different."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(n)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [str(each.getsockname()[1]) for each in sockets]


def an_image(i: int) -> Image.Image:
    """The image behind CAPTIONS[i], (70 + i, 80) pixels."""
    return Image.fromarray(np.random.default_rng(i).integers(0, 256, (70 + i, 80, 3), dtype=np.uint8))


class Trap:
    """Unpickled, it touches a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def refused(main, arguments, capsys) -> str:
    """The one sentence on stderr with which a command refuses."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in err
    return err.strip().splitlines()[-1]


def a_tokenizer(transformers, folder: Path):
    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8)


def an_encoder(transformers, kind: str, seed: int = 0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "projection_dim": 12, "max_position_embeddings": 8}
    tokens = {"vocab_size": 54, "bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}
    config = transformers.CLIPTextConfig(num_hidden_layers=2, num_attention_heads=2, **sizes, **tokens)
    return getattr(transformers, kind)(config)


def a_vae(diffusers, **settings):
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 4, 4, 4), norm_num_groups=2, latent_channels=4, layers_per_block=1, **blocks, **settings
    )


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory) -> dict[str, Path]:
    """{family: folder of a pipeline}: tiny, random, and otherwise real, with tokenizers, text encoders and a VAE."""
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("pipelines")
    tokenizer = a_tokenizer(transformers, folder)
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 16, 16),
        attention_head_dim=(1, 2, 2, 2),
        cross_attention_dim=16,
        norm_num_groups=4,
        use_linear_projection=True,
    )
    scheduler = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
    diffusers.StableDiffusionPipeline(
        vae=a_vae(diffusers, sample_size=64),
        text_encoder=an_encoder(transformers, "CLIPTextModel"),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(**scheduler, steps_offset=1, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder / "sd")
    mmdit = diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=36,
        caption_projection_dim=16,
        pooled_projection_dim=24,
        pos_embed_max_size=8,
    )
    diffusers.StableDiffusion3Pipeline(
        vae=a_vae(diffusers, sample_size=64, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=an_encoder(transformers, "CLIPTextModelWithProjection"),
        text_encoder_2=an_encoder(transformers, "CLIPTextModelWithProjection", 1),
        text_encoder_3=None,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=None,
        transformer=mmdit,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(folder / "mmdit")
    return {family: folder / family for family in FAMILIES}


@pytest.fixture(scope="session")
def captioned(tmp_path_factory) -> Path:
    """A folder of 8 images with metadata.csv, which holds their CAPTIONS."""
    folder = tmp_path_factory.mktemp("captioned")
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "text"])
        for i, caption in enumerate(CAPTIONS):
            an_image(i).save(folder / f"{i}.png")
            writer.writerow([f"{i}.png", caption])
    return folder


def encode(pipeline: Path, images: Path, out: Path, *more: str) -> int:
    """`python -m distil.latents` with this pipeline's VAE and text encoders, 64 pixels."""
    from distil import latents

    where = ["--vae", str(pipeline), "--text", str(pipeline), "--data", str(images), "--out", str(out)]
    return latents.main([*where, "--image-size", "64", "--batch", "3", *more])


@pytest.fixture(scope="session")
def latents(pipelines, captioned, tmp_path_factory) -> dict[str, Path]:
    """{family: folder of latents}, encoded from `captioned` with the pipeline of that family."""
    folder = tmp_path_factory.mktemp("latents")
    assert [encode(pipelines[family], captioned, folder / family) for family in FAMILIES] == [0, 0]
    return {family: folder / family for family in FAMILIES}
