"""The authors' code, imported from a clone of their repository, for a step to compare with. b: a `bench.Setup`."""

import copy
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn

from models import UNet


def package(name: str, file: Path) -> ModuleType:
    """The module or package of that file, under a name that hides none of ours."""
    places = [str(file.parent)] if file.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=places)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def authors(clone: str) -> SimpleNamespace:
    """The authors' loss, network, feature loss and weight average, from a clone of their repository."""
    folder = Path(clone) / "Diff_Pruning_EXP"
    if not (folder / "functions" / "losses.py").is_file():
        raise ValueError(f"--official {clone} is no clone of the authors' repository: {folder}/functions is missing")
    names = ("functions/losses", "models/diffusion", "models/ema")
    losses, networks, average = (package(name.replace("/", "_"), folder / f"{name}.py") for name in names)
    return SimpleNamespace(losses=losses, Model=networks.Model, EMAHelper=average.EMAHelper)


def step(b: Any) -> Callable[[], None]:
    """A step as their training loop makes it: the same widths and weights in their network, float32."""
    teacher, student = (their_network(b, net) for net in (b.teacher, b.pruned(0.9)))
    teacher, student = teacher.eval(), student.train()
    ema = b.authors.EMAHelper(mu=0.9999)
    ema.register(student)
    batch = b.draw(b.settings())
    x0, e, t = batch.x0, batch.noise, batch.t
    adapters = b.authors.losses.FitNetLoss(b.device)
    adapters.construct_adapter(teacher, student, None, None, x0[:2], t[:2])
    optimizer = torch.optim.Adam([*student.parameters(), *adapters.parameters()], lr=2e-4)

    def call() -> None:
        x = b.process.add_noise(x0, e, t)
        output, theirs, own, their_features = b.authors.losses.hook_forward(student, teacher, x, t)
        kd = b.authors.losses.LIFT_PLACE(output, theirs, patch_size=16, args=SimpleNamespace(use_l2=False))
        kd = kd + adapters(own, their_features) * 1e-6
        (theirs - output).square().sum(dim=(1, 2, 3)).mean(dim=0)  # for their log, in every step
        loss = (e - output).square().sum(dim=(1, 2, 3)).mean(dim=0) + kd
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        ema.update(student)

    return call


def their_network(b: Any, net: UNet) -> nn.Module:
    """Their network with the layers of `net`, whose parameters have the same names."""
    c = net.config
    model = SimpleNamespace(
        type="simple", in_channels=3, out_ch=3, ch=c["channels"], ch_mult=c["channel_mults"], dropout=0.1,
        num_res_blocks=c["num_res_blocks"], attn_resolutions=c["attention_resolutions"], resamp_with_conv=True,
    )  # fmt: skip
    data, diffusion = SimpleNamespace(image_size=b.size), SimpleNamespace(num_diffusion_timesteps=b.process.steps)
    theirs = b.authors.Model(SimpleNamespace(model=model, data=data, diffusion=diffusion))
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear | nn.GroupNorm):
            theirs.set_submodule(name, copy.deepcopy(layer))
    return theirs.to(b.device, memory_format=torch.contiguous_format)
