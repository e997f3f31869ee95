"""Beside what people would use instead, with the same weights on the same images: one run of the clock.

    python benchmarks/peers.py --official ../LIFT_PLACE --tinyfusion ../TinyFusion     # clones of both repositories
    python benchmarks/peers.py --quick                                                 # tiny networks: does it run?
    python benchmarks/bench.py --show benchmarks/peers.json

diffusers' UNet2DModel and DDIMPipeline, the authors' code, and TinyFusion's networks and losses (pip install timm), all
as their own training scripts use them, in float32. What is not given is left out.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import models
import train
from benchmarks import answers, bench, official
from benchmarks.answers import Row
from benchmarks.bench import Cases
from benchmarks.official import package
from distil import machine
from distil.batches import draw
from distil.process import make_process
from distil.settings import Settings
from distil.students import Student, tap
from distil.teachers import ddim_names


def rows(b: bench.Setup, cases: Cases, batch: int) -> Iterable[Row]:
    """Seconds of every case, which take turns; ours stands first of those whose names begin alike."""
    took = b.medians(cases)
    first: dict[str, float] = {}
    for name, s in took.items():
        ours = first.setdefault(name.partition(",")[0], s)
        yield {"what": name, "batch": batch, "s": s, "ours_vs_this": ours / s}


# ---- diffusers -------------------------------------------------------------------------------------------------------


def of_diffusers(net: models.UNet) -> nn.Module:
    """diffusers' UNet2DModel with the layers of `net`."""
    from diffusers import UNet2DModel
    from diffusers.models.downsampling import Downsample2D
    from diffusers.models.upsampling import Upsample2D

    c = net.config
    sizes = [net.shape[1] // 2**i for i in range(len(c["channel_mults"]))]
    attends = [size in c["attention_resolutions"] for size in sizes]
    theirs = UNet2DModel(
        net.shape[1], c["in_channels"], c["out_channels"], layers_per_block=c["num_res_blocks"], dropout=c["dropout"],
        block_out_channels=[c["channels"] * mult for mult in c["channel_mults"]], attention_head_dim=None,
        down_block_types=["AttnDownBlock2D" if attention else "DownBlock2D" for attention in attends],
        up_block_types=["AttnUpBlock2D" if attention else "UpBlock2D" for attention in attends[::-1]],
        norm_num_groups=1, norm_eps=1e-6, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1,
    )  # fmt: skip
    for name, layer in list(theirs.named_modules()):
        if isinstance(layer, nn.Conv2d | nn.Linear | nn.GroupNorm):
            (ours,) = ddim_names({f"{name}.weight": layer.weight}, len(sizes))
            own = copy.deepcopy(net.get_submodule(ours.removesuffix(".weight")))
            if isinstance(layer, nn.Linear) and isinstance(own, nn.Conv2d):  # in attention
                linear = nn.Linear(own.in_channels, own.out_channels)
                linear.weight, linear.bias = nn.Parameter(own.weight.detach().flatten(1)), own.bias
                own = linear
            theirs.set_submodule(name, own)
    for layer in theirs.modules():
        if isinstance(layer, Downsample2D | Upsample2D):  # they compare what comes in with this
            layer.channels = layer.conv.in_channels
    return theirs.to(next(net.parameters()).device)


def diffusers_step(b: bench.Setup, student: models.UNet) -> Callable[[], None]:
    """A step as diffusers' training script makes it, with the squared distance to the teacher added."""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import EMAModel

    teacher, net, scheduler = of_diffusers(b.teacher).eval(), of_diffusers(student).train(), DDPMScheduler()
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-4)
    ema = EMAModel(net.parameters(), decay=0.9999)

    def step() -> None:
        batch = b.draw(b.settings())
        x_t = scheduler.add_noise(batch.x0, batch.noise, batch.t)
        with torch.no_grad():
            target = teacher(x_t, batch.t).sample
        output = net(x_t, batch.t).sample
        loss = nn.functional.mse_loss(output, batch.noise) + nn.functional.mse_loss(output, target)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(net.parameters())

    return step


def unet_step(b: bench.Setup) -> Iterable[Row]:
    """A step of the CelebA student of 90 %: OutKD beside diffusers, PLACE with features beside the authors' code."""
    plain = b.settings(lambda_feat=0)
    out = b.student(plain, "out")
    cases: Cases = {"out": partial(b.step, [out], plain), "out, diffusers": diffusers_step(b, b.pruned(0.9))}
    yield from rows(b, cases, b.batch)
    if b.authors:
        settings = b.settings()
        cases = {"place": partial(b.step, [b.student(settings)], settings), "place, authors": official.step(b)}
        yield from rows(b, cases, b.batch)


def unet_sampling(b: bench.Setup) -> Iterable[Row]:
    """A step of DDIM, of which 100 make an image, of the CelebA teacher and of its student of 90 %."""
    from diffusers import DDIMPipeline, DDIMScheduler

    for batch, steps in [(1, 1)] if b.quick else [(1, 2), (16, 1)]:
        cases: Cases = {}
        for kind, net in {"teacher": b.teacher, "student": b.pruned(0.9).eval()}.items():
            cases[kind] = partial(b.process.sample, net, (batch, *net.shape), steps)
            pipeline = DDIMPipeline(of_diffusers(net).eval(), DDIMScheduler())
            pipeline.set_progress_bar_config(disable=True)
            cases[f"{kind}, diffusers"] = partial(pipeline, batch, num_inference_steps=steps, output_type="np")
        for row in rows(b, cases, batch):
            yield row | {"s": row["s"] / steps}


# ---- TinyFusion ------------------------------------------------------------------------------------------------------


def tinyfusion(clone: str) -> SimpleNamespace:
    """TinyFusion's networks and its diffusion, from a clone of their repository."""
    if not (Path(clone) / "train_masked_kd.py").is_file():
        raise ValueError(f"--tinyfusion {clone} is no clone of TinyFusion: it has no train_masked_kd.py")
    package("models_with_layer_pruning", Path(clone) / "models_with_layer_pruning.py")  # the next one imports it
    networks = package("tinyfusion_models", Path(clone) / "models.py")
    diffusion = package("tinyfusion_diffusion", Path(clone) / "diffusion/__init__.py")
    return SimpleNamespace(DiT=networks.DiT, diffusion=diffusion)


def tinyfusion_step(b: bench.Setup, net: models.DiT, teacher: models.DiT, x0: Tensor, y: Tensor) -> Callable[[], None]:
    """A step as their train_masked_kd.py makes it, without its autocast and its scaler."""

    def theirs(ours: models.DiT) -> nn.Module:
        names = ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes")
        made = b.tinyfusion.DiT(**{name: ours.config[name] for name in names})
        made.load_state_dict(ours.state_dict())
        return made

    def keep(module: nn.Module, args: tuple, output: Tensor) -> None:
        module.feature = output

    frozen, student = theirs(teacher).eval().requires_grad_(False), nn.DataParallel(theirs(net).train(), device_ids=[])
    for i, block in enumerate(student.module.blocks):
        block.target_layer = 2 * i + 1
        block.register_forward_hook(keep)
        frozen.blocks[2 * i + 1].register_forward_hook(keep)
    diffusion = b.tinyfusion.diffusion.create_diffusion("")
    average = copy.deepcopy(student.module).requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-4, weight_decay=0.0)

    def step() -> None:
        optimizer.zero_grad()
        t = torch.randint(0, 1000, (len(x0),))
        losses = diffusion.training_losses_kd_rep(student, frozen, x0, t, {"y": y}, beta_feat=1e-2)
        losses["loss"].mean().backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            own = dict(student.module.named_parameters())
            for name, mean in average.named_parameters():
                mean.mul_(0.9999).add_(own[name], alpha=1 - 0.9999)
        losses["loss"].mean().item()

    return step


def dit_step(b: bench.Setup) -> Iterable[Row]:
    """A step of half the blocks of a DiT-B/2, output and masked features, beside TinyFusion's loop."""
    batch, sizes = 4, {"hidden_size": 768, "depth": 12, "num_heads": 12}
    if b.quick:
        batch, sizes = 2, {"hidden_size": 64, "depth": 2, "num_heads": 2, "input_size": 8}
    settings = Settings(dataset="imagenet", data="latents", batch_size=batch, prune=0.5, device=str(b.device))
    teacher = models.DiT(**sizes).eval().requires_grad_(False)
    net = teacher.keep_blocks(list(range(1, sizes["depth"], 2))).requires_grad_(True)
    net.pos_embed.requires_grad_(False)
    kd, process = train.resolve(settings, "out+feat"), make_process(settings.process)
    tapped = tap(teacher, net, kd.taps)
    one = Student(settings, kd, 0, copy.deepcopy(net), tapped)
    latents, y = torch.randn(batch, 2, *net.shape), torch.arange(batch)

    def step() -> None:
        shown = draw(settings, latents, {"y": y}, process, teacher, 0)
        train.step(settings, [one], tapped, process, shown, 0)

    cases: Cases = {"out+feat": step}
    if b.tinyfusion:
        cases["out+feat, TinyFusion"] = tinyfusion_step(b, net, teacher, latents[:, 0], y)
    yield from rows(b, cases, batch)


SECTIONS = {f.__name__: f for f in (unet_step, unet_sampling, dit_step)}


def main(arguments: list[str] | None = None) -> int:
    parser = answers.parser_of("peers.py", __doc__, SECTIONS, "benchmarks/peers.json")
    parser.add_argument("--tinyfusion", metavar="DIR", help="a clone of TinyFusion's repository [none]")
    parser.set_defaults(device="cpu")
    options = parser.parse_args(arguments)
    with machine.refusing("peers.py"):
        b = bench.Setup(options)
        if b.device.type != "cpu":
            raise ValueError("this is measured on a CPU: leave --device out")
        b.tinyfusion = options.tinyfusion and tinyfusion(options.tinyfusion)
    return answers.answer(options, b, SECTIONS)


if __name__ == "__main__":
    sys.exit(main())
