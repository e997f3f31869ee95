"""The networks, and how to make them smaller.

A network is `net(x_t, t, cond=None) -> prediction`: x_t (B, C, H, W), t (B,), cond a dict of tensors or None. Here are

- `UNet`, the pixel-space network of DDIM (https://arxiv.org/abs/2010.02502) and of Diff-Pruning (https://arxiv.org/abs/2305.10924);
  its parameters carry ddim's names, so public checkpoints fit without a renaming table;
- `prune_channels`, which cuts a share of the channels of every layer and returns a smaller network that stands on its own;
- `Tapped`, which reads the features between the blocks (FitNet distillation, https://arxiv.org/abs/1412.6550);
- `net.save(folder)` and `load(folder)`: model.safetensors + config.json, never a pickle.

    teacher = UNet(64, dropout=0.1)                 # CelebA, 78.7 M parameters
    student = prune_channels(teacher, ratio=0.9)    # 1.3 M, weights taken from the teacher
    student.save("student")
    student = load("student")

Letters in shape comments: B batch, C channels, H W height and width, D width of the time embedding.
"""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

# ----------------------------------------------------------------------------------------------------------------------
# U-Net
# ----------------------------------------------------------------------------------------------------------------------


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sines then cosines of t at dim // 2 frequencies from 1 down to 1e-4: (B,) -> (B, dim), in float32.

    As in DDPM: both end frequencies are included, an odd `dim` is filled up with one zero.
    """
    half = dim // 2
    freqs = torch.exp(torch.arange(half, dtype=torch.float32, device=t.device) * (-math.log(10000) / (half - 1)))
    angles = t.float()[:, None] * freqs  # (B, dim // 2)
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, dim % 2))  # (B, dim)


class _Sizes:
    """Says by layer name how wide a layer is and into how many groups a norm splits its channels.

    Blocks ask it while they are built, under their full name. It remembers the questions, so the network knows afterwards
    which layers set a width (`full`, before any pruning) and which are norms (`norms`).
    """

    def __init__(self, widths: dict[str, int] | None, norm_groups: int | dict[str, int]):
        self.given_widths, self.given_groups = widths or {}, norm_groups
        self.full: dict[str, int] = {}
        self.norms: list[str] = []

    def width(self, name: str, full: int) -> int:
        self.full[name] = full
        width = self.given_widths.get(name, full)
        if width < 1:
            raise ValueError(f"widths: {name} needs at least one channel, not {width}")
        return width

    def norm(self, name: str, channels: int) -> nn.GroupNorm:
        self.norms.append(name)
        groups = self.given_groups
        if isinstance(groups, dict):
            if name not in groups:
                raise ValueError(f"norm_groups names every norm layer or is one number, but {name} is missing")
            groups = groups[name]
        if groups < 1 or channels % groups:
            raise ValueError(f"norm_groups: {name} has {channels} channels, which {groups} groups do not divide")
        return nn.GroupNorm(groups, channels, eps=1e-6)

    def check_names(self) -> None:
        """A name that no layer asked for is a mistake: ValueError."""
        groups = self.given_groups if isinstance(self.given_groups, dict) else {}
        for argument, given, known in (("widths", self.given_widths, self.full), ("norm_groups", groups, self.norms)):
            unknown = [name for name in given if name not in known]
            if unknown:
                raise ValueError(f"{argument} names {unknown[0]}, which is no layer of this network that takes one")


class ResnetBlock(nn.Module):
    """norm, conv, + time, norm, conv, + shortcut: (B, C, H, W) -> (B, out_channels, H, W).

    `full` is the constructor's width. Whether there is a shortcut convolution is decided by the caller from FULL widths,
    so pruning never adds or removes one. Without it conv2 is as wide as the input: the residual stream has one width.
    """

    def __init__(
        self, name: str, sizes: _Sizes, in_channels: int, full: int, shortcut: bool, temb_channels: int, dropout: float
    ):
        super().__init__()
        hidden = sizes.width(f"{name}.conv1", full)
        out_channels = sizes.width(f"{name}.nin_shortcut", full) if shortcut else in_channels
        self.norm1 = sizes.norm(f"{name}.norm1", in_channels)
        self.conv1 = nn.Conv2d(in_channels, hidden, 3, padding=1)
        self.temb_proj = nn.Linear(temb_channels, hidden)
        self.norm2 = sizes.norm(f"{name}.norm2", hidden)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(hidden, out_channels, 3, padding=1)
        if shortcut:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)
        self.out_channels = out_channels

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))  # (B, hidden, H, W)
        h = h + self.temb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))  # (B, out_channels, H, W)
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Self-attention over the pixels, one head, residual: (B, C, H, W) -> the same shape."""

    def __init__(self, name: str, sizes: _Sizes, channels: int, full: int):
        super().__init__()
        inner = sizes.width(f"{name}.q", full)  # q, k and v are pruned together
        self.norm = sizes.norm(f"{name}.norm", channels)
        self.q = nn.Conv2d(channels, inner, 1)
        self.k = nn.Conv2d(channels, inner, 1)
        self.v = nn.Conv2d(channels, inner, 1)
        self.proj_out = nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (rearrange(conv(h), "b c h w -> b 1 (h w) c") for conv in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)  # (B, 1, HW, inner), scaled by inner^-0.5: the CURRENT width
        return x + self.proj_out(rearrange(h, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class Downsample(nn.Module):
    """Halves height and width; pads one row below and one column to the right, as ddim does."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # (B, C, H / 2, W / 2)


class Upsample(nn.Module):
    """Doubles height and width: nearest neighbour, then a convolution."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # (B, C, 2H, 2W)


class UNet(nn.Module):
    """The ddim U-Net: `net(x_t, t) -> prediction`, (B, in_channels, H, W), (B,) -> (B, out_channels, H, W).

    image_size           height and width it is made for; decides at which levels attention stands
    channels             width of the first level; level i has channels * channel_mults[i]
    attention_resolutions  sizes of the feature map at which every block is followed by attention (the middle always has one)
    norm_groups          groups of every GroupNorm, or {norm layer name: groups}
    widths               of a pruned net: {layer name: output channels} for the layers that set a width
                         (`net.full_widths` lists them all); every other layer follows from these
    `net.config` is a dict of these arguments that JSON can hold: `UNet(**net.config)` is the same network.

    Published settings: CelebA 64 `UNet(64, dropout=0.1)`, CIFAR-10 `UNet(32, channel_mults=(1, 2, 2, 2), dropout=0.1)`,
    LSUN 256 `UNet(256, channel_mults=(1, 1, 2, 2, 4, 4))`. Sizes that do not fit together raise a ValueError.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int = 3,
        out_channels: int | None = None,
        channels: int = 128,
        channel_mults: tuple[int, ...] = (1, 2, 2, 2, 4),
        num_res_blocks: int = 2,
        attention_resolutions: tuple[int, ...] = (16,),
        dropout: float = 0.0,
        norm_groups: int | dict[str, int] = 32,
        widths: dict[str, int] | None = None,
    ):
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        if min(image_size, in_channels, out_channels, num_res_blocks, *channel_mults, 1) < 1 or not channel_mults:
            raise ValueError("image_size, in_channels, out_channels, num_res_blocks and channel_mults must be positive")
        if channels < 4:
            raise ValueError(f"channels must be at least 4 (the time embedding needs two frequencies), not {channels}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {dropout}")
        levels = len(channel_mults)
        if image_size % 2 ** (levels - 1):
            raise ValueError(f"image_size {image_size} cannot be halved {levels - 1} times, once between two levels")

        self.config = {
            "image_size": image_size,
            "in_channels": in_channels,
            "out_channels": out_channels,
            "channels": channels,
            "channel_mults": list(channel_mults),
            "num_res_blocks": num_res_blocks,
            "attention_resolutions": list(attention_resolutions),
            "dropout": dropout,
            "norm_groups": dict(norm_groups) if isinstance(norm_groups, dict) else norm_groups,
            "widths": dict(widths) if widths else None,
        }
        sizes = _Sizes(widths, norm_groups)
        fulls = [channels * mult for mult in channel_mults]  # full width of each level
        attends = [image_size // 2**i in attention_resolutions for i in range(levels)]

        self.temb = nn.Module()
        dense0, dense1 = (sizes.width(f"temb.dense.{i}", 4 * channels) for i in range(2))
        self.temb.dense = nn.ModuleList([nn.Linear(channels, dense0), nn.Linear(dense0, dense1)])

        # `width`, `skips` are the numbers of channels that really flow, `full`, `full_skips` those before any pruning
        width, full = sizes.width("conv_in", channels), channels
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        skips, full_skips = [width], [full]
        self.down = nn.ModuleList()
        for i in range(levels):
            level = nn.Module()
            level.block, level.attn = nn.ModuleList(), nn.ModuleList()
            for j in range(num_res_blocks):
                shortcut = full != fulls[i]
                level.block.append(
                    ResnetBlock(f"down.{i}.block.{j}", sizes, width, fulls[i], shortcut, dense1, dropout)
                )
                width, full = level.block[-1].out_channels, fulls[i]
                if attends[i]:
                    level.attn.append(AttnBlock(f"down.{i}.attn.{j}", sizes, width, full))
                skips.append(width)
                full_skips.append(full)
            if i < levels - 1:
                out = sizes.width(f"down.{i}.downsample.conv", full)
                level.downsample = Downsample(width, out)
                width = out
                skips.append(width)
                full_skips.append(full)
            self.down.append(level)

        self.mid = nn.Module()
        self.mid.block_1 = ResnetBlock("mid.block_1", sizes, width, full, False, dense1, dropout)
        self.mid.attn_1 = AttnBlock("mid.attn_1", sizes, width, full)
        self.mid.block_2 = ResnetBlock("mid.block_2", sizes, width, full, False, dense1, dropout)

        self.up = nn.ModuleList()
        for i in reversed(range(levels)):
            level = nn.Module()
            level.block, level.attn = nn.ModuleList(), nn.ModuleList()
            for j in range(num_res_blocks + 1):
                in_width, shortcut = width + skips.pop(), full + full_skips.pop() != fulls[i]
                level.block.append(
                    ResnetBlock(f"up.{i}.block.{j}", sizes, in_width, fulls[i], shortcut, dense1, dropout)
                )
                width, full = level.block[-1].out_channels, fulls[i]
                if attends[i]:
                    level.attn.append(AttnBlock(f"up.{i}.attn.{j}", sizes, width, full))
            if i > 0:
                out = sizes.width(f"up.{i}.upsample.conv", full)
                level.upsample = Upsample(width, out)
                width = out
            self.up.insert(0, level)  # up[i] works at the resolution of down[i]

        self.norm_out = sizes.norm("norm_out", width)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)
        sizes.check_names()
        self.full_widths, self.norm_names = sizes.full, sizes.norms

    def forward(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor] | None = None) -> Tensor:
        """x_t (B, in_channels, H, W), t (B,) integers or floats -> (B, out_channels, H, W); `cond` must be empty."""
        if cond:
            raise ValueError(f"this UNet takes no condition, but cond holds {', '.join(cond)}")
        factor = 2 ** (len(self.down) - 1)
        if x_t.shape[1] != self.conv_in.in_channels or x_t.shape[2] % factor or x_t.shape[3] % factor:
            raise ValueError(
                f"x_t must be (B, {self.conv_in.in_channels}, H, W) with H and W multiples of {factor}, not {tuple(x_t.shape)}"
            )
        temb = timestep_embedding(t, self.temb.dense[0].in_features).to(x_t.dtype)  # (B, channels)
        temb = self.temb.dense[1](F.silu(self.temb.dense[0](temb)))  # (B, D)

        h = self.conv_in(x_t)
        skips = [h]
        for level in self.down:
            for j, block in enumerate(level.block):
                h = block(h, temb)
                if level.attn:
                    h = level.attn[j](h)
                skips.append(h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)  # H, W halve
                skips.append(h)

        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h, temb)), temb)

        for level in reversed(self.up):
            for j, block in enumerate(level.block):
                h = block(torch.cat([h, skips.pop()], dim=1), temb)
                if level.attn:
                    h = level.attn[j](h)
            if hasattr(level, "upsample"):
                h = level.upsample(h)  # H, W double

        return self.conv_out(F.silu(self.norm_out(h)))

    def feature_layers(self) -> list[str]:
        """Names of the layers whose outputs FitNet distillation compares, in the order in which they run.

        Every block, every attention and the convolution of every down- and upsampling, as Diff-Pruning's fork hooks them:
        41 for CelebA, 34 for CIFAR-10, 48 for LSUN.
        """
        names = []
        for side, order in (("down", range(len(self.down))), ("up", reversed(range(len(self.up))))):
            for i in order:
                level = getattr(self, side)[i]
                for j in range(len(level.block)):
                    names.append(f"{side}.{i}.block.{j}")
                    if level.attn:
                        names.append(f"{side}.{i}.attn.{j}")
                if hasattr(level, f"{side}sample"):
                    names.append(f"{side}.{i}.{side}sample.conv")
            if side == "down":
                names += ["mid.block_1", "mid.attn_1", "mid.block_2"]
        return names

    def save(self, folder: str | os.PathLike) -> None:
        """Writes folder/model.safetensors and folder/config.json; `load(folder)` gives the network back, bit for bit."""
        save(self, folder)


# ----------------------------------------------------------------------------------------------------------------------
# Saving, loading
# ----------------------------------------------------------------------------------------------------------------------

NETWORKS = {"UNet": UNet}  # what a config.json may name as its "class"


def save(net: nn.Module, folder: str | os.PathLike) -> None:
    """See `UNet.save`. Each file appears whole or not at all, config.json last: a folder without it was never finished."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"class": type(net).__name__, **net.config}
    weights, described = folder / "model.safetensors", folder / "config.json"
    save_file({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, f"{weights}.part")
    Path(f"{described}.part").write_text(json.dumps(config, indent=1) + "\n")
    os.replace(f"{weights}.part", weights)
    os.replace(f"{described}.part", described)


def load(folder: str | os.PathLike) -> nn.Module:
    """The network that `net.save(folder)` wrote, on the CPU, in eval mode.

    FileNotFoundError if a file is missing, ValueError if a file is damaged or the weights do not fit the config.
    """
    folder = Path(folder)
    weights, described = folder / "model.safetensors", folder / "config.json"
    if not described.is_file():
        inside = sorted(path.parent.name for path in folder.glob("*/config.json"))
        hint = f"; it holds networks in {', '.join(inside)}" if inside else ""
        raise FileNotFoundError(f"{folder} is not a saved network: it has no config.json{hint}")
    if not weights.is_file():
        raise FileNotFoundError(f"{folder} is not a complete network: it has no model.safetensors")
    try:
        config = json.loads(described.read_text())
        network = NETWORKS[config.pop("class")]
        return _build(network, config, load_file(weights)).eval()
    except KeyError as error:
        raise ValueError(f"{described} must name its class, one of {', '.join(NETWORKS)}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{described} does not describe a network: {error}") from error
    except SafetensorError as error:
        raise ValueError(f"{weights} is damaged: {error}") from error
    except RuntimeError as error:
        raise ValueError(f"{weights} does not fit {described}: {error}") from error


def _build(network: type[nn.Module], config: dict, state: dict[str, Tensor]) -> nn.Module:
    """A network from its config and a copy of `state`; built on the meta device, so nothing is initialised in vain."""
    with torch.device("meta"):
        net = network(**config)
    net.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    return net


# ----------------------------------------------------------------------------------------------------------------------
# Channel pruning
# ----------------------------------------------------------------------------------------------------------------------


def prune_channels(
    net: UNet,
    ratio: float,
    importance: str | Callable = "magnitude",
    norm_groups: str = "keep",
    seed: int = 0,
) -> UNet:
    """A smaller, independent copy of `net` in which every layer lost the share `ratio` of its channels.

    The rule of Diff-Pruning (https://arxiv.org/abs/2305.10924): channels that are added or normalised together go together. Of C such
    channels C - int(C * (1 - ratio)) are to go; where a GroupNorm with g groups sees them, floor(that / g) go from EACH of
    the g groups, so widths stay multiples of g (at 32 groups and ratio 0.9: 128 -> 32). The least important go first.

    importance   "magnitude": sum of w^2 over all weights that write or read a channel;
                 "random": uniform, drawn from `seed`;
                 or a function from a torch-pruning Group to one score per channel. The group's modules are copies of those
                 of `net`, with its gradients in `.grad`.
    norm_groups  "keep" the NUMBER of groups, as the paper does. At 90 % most groups are left with one channel: an instance
                 norm, which erases each channel's mean and scale;
                 "scale" it, so that the number of channels PER group stays (or the next larger that divides the width).
                 Widths and parameters are the same either way.
    The copy has the device, dtype and mode of `net`; all its parameters are trainable. ValueError for a bad argument.
    """
    import torch_pruning as tp

    if not 0 <= ratio < 1:
        raise ValueError(f"ratio is the share of channels to remove, in [0, 1), not {ratio}")
    if norm_groups not in ("keep", "scale"):
        raise ValueError(f'norm_groups must be "keep" or "scale", not {norm_groups!r}')
    if importance == "magnitude":
        importance = _magnitude
    elif importance == "random":
        generator = torch.Generator().manual_seed(seed)
        importance = lambda group: torch.rand(len(group[0].idxs), generator=generator)  # noqa: E731
    elif not callable(importance):
        raise ValueError(f'importance must be "magnitude", "random" or a function, not {importance!r}')

    # torch-pruning cuts this copy in place; the result is then rebuilt from a config, so that it is a plain UNet
    cut = _build(UNet, net.config, net.state_dict())
    for new, old in zip(cut.parameters(), net.parameters(), strict=True):
        new.grad = None if old.grad is None else old.grad.clone()

    # Which channels belong together does not depend on the image size: trace at 2x2 pixels on the lowest level. (At 256x256
    # tracing takes 20 GiB; one pixel is too little for an instance norm.)
    size = 2 ** len(cut.down)
    x = torch.zeros(
        1, cut.conv_in.in_channels, size, size, device=cut.conv_in.weight.device, dtype=cut.conv_in.weight.dtype
    )
    with torch.enable_grad():
        graph = tp.DependencyGraph().build_dependency(cut, {"x_t": x, "t": x.new_zeros(1)})
    for group in graph.get_all_groups(ignored_layers=[cut.conv_out], root_module_types=[nn.Conv2d, nn.Linear]):
        root, prune = group[0].dep.target.module, group[0].dep.handler
        channels = root.weight.shape[0]
        norms = [dep.target.module for dep, _ in group if isinstance(dep.target.module, nn.GroupNorm)]
        g = max((norm.num_groups for norm in norms if channels % norm.num_groups == 0), default=1)
        remove = min(
            (channels - int(channels * (1 - ratio))) // g, channels // g - 1
        )  # of each group; one channel stays
        if remove > 0:
            scores = rearrange(importance(group).float().cpu(), "(g n) -> g n", g=g)
            lowest = scores.argsort(dim=1)[:, :remove] + torch.arange(g)[:, None] * (channels // g)
            graph.get_pruning_group(root, prune, sorted(lowest.flatten().tolist())).prune()

    widths = {name: cut.get_submodule(name).weight.shape[0] for name in cut.full_widths}
    groups = {}
    for name in cut.norm_names:
        before, width = net.get_submodule(name), cut.get_submodule(name).num_channels
        per_group = (
            before.num_channels // before.num_groups if norm_groups == "scale" else -(-width // before.num_groups)
        )
        groups[name] = next((width // n for n in range(per_group, width) if width % n == 0), 1)
    config = {
        **net.config,
        "widths": {name: width for name, width in widths.items() if width != cut.full_widths[name]},
        "norm_groups": groups if len(set(groups.values())) > 1 else groups["norm_out"],
    }
    return _build(UNet, config, cut.state_dict()).train(net.training)


def _magnitude(group) -> Tensor:
    """One score per channel of a torch-pruning group: the sum of w^2 over every weight that writes or reads it.

    Norms do not count, nor do layers that see the channels more than once (their vectors are longer than the first one).
    """
    scores = []
    for dep, idxs in group:
        weight = getattr(dep.target.module, "weight", None)
        if weight is not None and weight.ndim > 1:
            reads = dep.handler.__name__ == "prune_in_channels"
            squares = weight.detach().float().square().transpose(0, 1) if reads else weight.detach().float().square()
            scores.append(squares.flatten(1).sum(1)[idxs])
    return sum(score for score in scores if len(score) == len(scores[0]))


# ----------------------------------------------------------------------------------------------------------------------
# Features for distillation
# ----------------------------------------------------------------------------------------------------------------------


class Tapped(nn.Module):
    """A network that also returns its features: `tapped(x_t, t, cond) -> (prediction, [features])`.

    net          the bare network; `tapped.net` stays usable alone, and `tapped.net.parameters()` leaves the adapters out
    names        layers to read, default `net.feature_layers()`; the features come in the order in which the layers run
    adapters_to  channel counts of the teacher's features: each feature passes a 1x1 convolution without bias to that width,
                 initialised U(-0.005, 0.005) as in Diff-Pruning's fork. None: features as they are.

    For multi-GPU training wrap the whole of it (DDP(Tapped(...))), so that the adapters' gradients are averaged too.
    ValueError if a name is no layer of `net` or `adapters_to` has another length.
    """

    def __init__(self, net: nn.Module, names: list[str] | None = None, adapters_to: list[int] | None = None):
        super().__init__()
        self.net = net
        names = net.feature_layers() if names is None else names
        self.adapters = None
        if adapters_to is not None:
            if len(adapters_to) != len(names):
                raise ValueError(f"{len(names)} features but {len(adapters_to)} widths in adapters_to")
            pairs = zip(feature_channels(net, names), adapters_to, strict=True)
            self.adapters = nn.ModuleList([nn.Conv2d(own, theirs, 1, bias=False) for own, theirs in pairs])
            for adapter in self.adapters:
                nn.init.uniform_(adapter.weight, -0.005, 0.005)
        # the hooks stay (torch.compile cannot trace their coming and going) and do nothing unless this forward is running
        self.recorder = _Recorder()
        for layer in _layers(net, names):
            layer.register_forward_hook(self.recorder)

    def forward(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        features: list[Tensor] = []
        outer, self.recorder.features = self.recorder.features, features
        try:
            prediction = self.net(x_t, t, cond)
        finally:
            self.recorder.features = outer  # nothing of this call stays behind
        if self.adapters is not None:
            features = [adapter(f) for adapter, f in zip(self.adapters, features, strict=True)]
        return prediction, features


class _Recorder:
    """A forward hook that appends a layer's output to `features` while that is a list."""

    def __init__(self) -> None:
        self.features: list[Tensor] | None = None

    def __call__(self, layer: nn.Module, inputs: tuple, output: Tensor) -> None:
        if self.features is not None:
            self.features.append(output)


def _layers(net: nn.Module, names: list[str]) -> list[nn.Module]:
    modules = dict(net.named_modules())
    if missing := [name for name in names if name not in modules]:
        raise ValueError(f"{type(net).__name__} has no layer {missing[0]}")
    return [modules[name] for name in names]


def feature_channels(net: nn.Module, names: list[str] | None = None) -> list[int]:
    """Channels of the features of these layers (default `net.feature_layers()`): the last convolution in a layer decides."""
    names = net.feature_layers() if names is None else names
    return [[m for m in layer.modules() if isinstance(m, nn.Conv2d)][-1].out_channels for layer in _layers(net, names)]


def feature_loss(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """Sum over the points of mean_B sum_chw (student - teacher)^2, the teacher detached; features (B, C, H, W) -> scalar."""
    pairs = zip(student, teacher, strict=True)
    return sum(F.mse_loss(s.float(), t.detach().float(), reduction="sum") for s, t in pairs) / len(student[0])
