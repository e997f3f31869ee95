"""Which channels and blocks of a network matter, so that pruning leaves those that do.

For `models.prune_channels`: the rule of Diff-Pruning (arXiv 2305.10924). For `models.prune_depth`: random blocks, block
influence (ShortGPT, arXiv 2403.03853), learned choice (TinyFusion, arXiv 2412.01199). B batch, N tokens, D their width.
"""

import copy
import itertools
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distil import machine
from distil.process import Process
from models import Network


def accumulate_gradients(
    net: nn.Module, process: Process, x0: Tensor, noise: Tensor, thr: float = 0.0,
    timesteps: Iterable[int] = range(1000), progress: bool = True, cond: dict[str, Tensor] | None = None,
) -> int:  # fmt: skip
    """Sums the gradients of the diffusion loss over timesteps into `.grad`, for `prune_channels(..., "taylor")`.

    The rule of Diff-Pruning: ONE batch x0 and ONE noise, (B, C, H, W) on the device of `net`, which is in eval mode
    (published batches: CelebA 64, LSUN bedroom 4). L_t is the squared error summed over an image, averaged over the
    batch. The sum ends before the first t with L_t < thr * (the largest L so far): from so noisy images little is
    learnt. thr 0, the published choice for CelebA, never stops; 0.05 is that for CIFAR-10.

    Older gradients are dropped; mode and requires_grad of `net` stay. Returns how many timesteps were summed.
    ValueError for a `thr` outside [0, 1] or a loss that is not finite.
    """
    if not 0 <= thr <= 1:
        raise ValueError(f"thr is a share of the largest loss, in [0, 1], not {thr}")
    training, trainable = net.training, [p.requires_grad for p in net.parameters()]
    net.eval().requires_grad_(True).zero_grad()
    largest, summed = 0.0, 0
    try:
        with torch.enable_grad():
            for step in machine.progress_bar(timesteps, desc="importance", disable=not progress):
                t = torch.full(x0.shape[:1], step, device=x0.device)  # (B,)
                prediction, target = net(process.add_noise(x0, noise, t), t, cond), process.target(x0, noise, t)
                loss = F.mse_loss(prediction.float(), target.float(), reduction="sum") / len(x0)
                if not loss.isfinite():
                    what = f"the teacher's loss at timestep {step} is {loss.item()}, so it says no importance"
                    raise ValueError(f"{what}: train or name another one")
                largest = max(largest, loss.item())
                if loss.item() < thr * largest:
                    break
                loss.backward()
                summed += 1
    finally:
        net.train(training)
        for p, flag in zip(net.parameters(), trainable, strict=True):
            p.requires_grad_(flag)
    return summed


def random_blocks(depth: int, n: int, seed: int) -> list[int]:
    """n of `depth` blocks, drawn from `seed`; the first and the last stay, for they talk to the layers outside."""
    ends = [0, depth - 1][-n:]
    inner = torch.randperm(depth - 2, generator=torch.Generator().manual_seed(seed))[: n - len(ends)] + 1
    return sorted({*ends, *inner.tolist()})


@torch.no_grad()
def block_influence(
    net: Network, process: Process, x0: Tensor, noise: Tensor, cond: dict[str, Tensor] | None = None,
    progress: bool = True,
) -> Tensor:  # fmt: skip
    """How much each block changes what it passes on, 1 - cos(in, out) averaged over tokens and timesteps: (depth,).

    ShortGPT's measure, taken where the network works: on noised inputs, timestep t with sample t mod B of x0, noise.
    """
    training, sums = net.training, torch.zeros(len(net.blocks), dtype=torch.float64)
    cosines: dict[int, Tensor] = {}

    def watch(i: int, block: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        before, after = net.block_tokens(args, kwargs, output)  # (B, N, D) each
        cosines[i] = F.cosine_similarity(before.float(), after.float(), dim=-1).mean().cpu().double()

    hooks = [block.register_forward_hook(partial(watch, i), with_kwargs=True) for i, block in enumerate(net.blocks)]
    net.eval()
    try:
        timesteps = torch.arange(process.steps, device=x0.device)
        for t in machine.progress_bar(timesteps.split(len(x0)), desc="block influence", disable=not progress):
            part = None if cond is None else {key: value[: len(t)] for key, value in cond.items()}
            net(process.add_noise(x0[: len(t)], noise[: len(t)], t), t, part)
            sums += torch.stack([cosines[i] for i in range(len(sums))]) * len(t)
    finally:
        net.train(training)
        for hook in hooks:
            hook.remove()
    return (1 - sums / process.steps).float()


def groups_of(depth: int, keep: int) -> tuple[int, int, int]:
    """(g, M, N): into how many groups of M blocks `GatedDepth` cuts `depth` of them, and N of a group stay.
    ValueError where these cannot be chosen from."""
    if not 1 <= keep < depth:
        raise ValueError(f"of {depth} blocks 1 to {depth - 1} can be chosen, not {keep}")
    groups = math.gcd(depth, keep)
    size, stay = depth // groups, keep // groups
    if (count := math.comb(size, stay)) > 5000:
        raise ValueError(f"{keep} of {depth} blocks give {count:,} options a group, too many to choose from")
    return groups, size, stay


class GatedDepth(nn.Module):
    """A network in which every group of consecutive blocks draws, sample by sample, which of them act.

    TinyFusion's differentiable choice: the blocks form g groups of M, as small as they can be (14 of 28: 14 groups
    of two), of each of which N may stay. A group has one logit for each of its C(M, N) options; a forward pass draws
    one by the straight-through Gumbel-softmax of temperature `tau`, and a block that is switched off passes on what it
    got. All blocks are computed, so the loss reaches the logits. The network learns to live without the dropped ones
    through low-rank updates of its linear layers (lora_rank 0: through its own weights). Hooks stay on `net`: give it a
    copy.
    """

    def __init__(self, net: Network, keep: int, lora_rank: int = 8):
        super().__init__()
        groups, size, stay = groups_of(len(net.blocks), keep)
        device = next(net.parameters()).device
        options = [[float(i in option) for i in range(size)] for option in itertools.combinations(range(size), stay)]
        self.net, self.tau = net, 1.0
        self.register_buffer("options", torch.tensor(options, device=device))  # (options, M)
        self.gates = nn.Parameter(torch.full((groups, len(options)), 0.02, device=device))
        self.mask = None
        for i, block in enumerate(net.blocks):
            block.register_forward_hook(partial(self._switch, i), with_kwargs=True)
        if lora_rank:
            net.requires_grad_(False)
            for layer in [layer for layer in net.modules() if isinstance(layer, nn.Linear)]:
                nn.utils.parametrize.register_parametrization(layer, "weight", LoRA(layer.weight, lora_rank))

    def forward(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor] | None = None) -> Tensor:
        """As the network, with options drawn for each sample."""
        logits = 100 * self.gates.expand(len(x_t), -1, -1)  # (B, g, options); a learning rate for weights fits them so
        one_hot = F.gumbel_softmax(logits, self.tau, hard=True)  # (B, g, options)
        self.mask = (one_hot @ self.options).flatten(1)  # (B, depth)
        try:
            return self.net(x_t, t, cond)
        finally:
            self.mask = None

    def _switch(self, i: int, block: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        if self.mask is None:
            return output
        return self.net.skip_block(self.mask[:, i, None, None], args, kwargs, output)  # on: (B, 1, 1)

    def choice(self, gates: Tensor) -> list[int]:
        """The blocks that stay, of the logits (g, options)."""
        return self.options[gates.argmax(1)].flatten().nonzero().flatten().tolist()


class LoRA(nn.Module):
    """weight (out, in) -> weight + 2 B A with A (rank, in), B (out, rank), B = 0 at the start (arXiv 2106.09685)."""

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        rank = min(rank, *weight.shape)
        self.down = nn.Parameter(weight.new_empty(rank, weight.shape[1]))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        self.up = nn.Parameter(weight.new_zeros(weight.shape[0], rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + 2 * self.up @ self.down


def learned_blocks(
    net: Network, keep: int, losses: Callable[[nn.Module, int], Iterable[Tensor]], steps: int, *, lora_rank: int = 8,
    seed: int = 0, progress: bool = True,
) -> list[int]:  # fmt: skip
    """The `keep` blocks that TinyFusion's learned choice would leave, for `prune_depth`; `net` stays as it is.

    losses: (network, step) -> those of one batch, () each, which are summed, for a network that is called as `net` is;
    of several one is in memory at a time. Published: the diffusion loss alone, batch 128, one epoch of ImageNet; AdamW,
    1e-3 for the logits, 1e-4 for the rest, clip 1, a temperature that falls from 4 to 0.1, decision by an average of
    rate 0.999 (here it forgets the start of short runs). Of several processes each learns from its own batches, and
    from the mean of all gradients. torch's global random state stays as it was.
    ValueError for a `keep` that cannot be chosen, or a loss that is not finite.
    """
    device = next(net.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
        torch.manual_seed(seed)  # of the low-rank updates
        gated = GatedDepth(copy.deepcopy(net), keep, lora_rank).train()
        learned = [p for p in gated.net.parameters() if p.requires_grad]
        groups = [{"params": [gated.gates], "lr": 1e-3}, {"params": learned, "lr": 1e-4}]
        optimizer = torch.optim.AdamW(groups, weight_decay=0)
        average = gated.gates.detach().clone()
        for step in machine.progress_bar(range(steps), desc="choosing blocks", disable=not progress):
            gated.tau = 4 + (0.1 - 4) * step / max(steps - 1, 1)
            torch.manual_seed(machine.hash_seed(seed, step, machine.rank_and_world()[0]))
            for loss in losses(gated, step):
                if not loss.isfinite():
                    what = f"the loss at step {step} of choosing blocks is {loss.item()}"
                    raise ValueError(f"{what}: name another teacher or --depth-method")
                loss.backward()
            for p in (gated.gates, *learned):
                p.grad = machine.mean_over_ranks(p.grad)
            nn.utils.clip_grad_norm_([gated.gates, *learned], 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            average.lerp_(gated.gates.detach(), max(0.001, 9 / (10 + step)))  # warmed up: short runs forget the start
    return gated.choice(average)
