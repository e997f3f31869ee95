"""distil/importance.py: which channels and blocks matter, by hand and on networks where it is known."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distil import importance
from distil.importance import GatedDepth, accumulate_gradients, block_influence, learned_blocks, random_blocks
from distil.process import DDPM
from models import DiT, UNet, prune_channels, prune_depth

SMALL = {"image_size": 8, "in_channels": 1, "channels": 32, "channel_mults": (1, 2), "num_res_blocks": 1}


def a_dit(depth: int = 6, useless: tuple[int, ...] = ()) -> DiT:
    """With random weights everywhere, for adaLN-Zero does nothing; but the gates of the `useless` blocks are closed."""
    torch.manual_seed(0)
    net = DiT(input_size=4, in_channels=2, hidden_size=16, num_heads=2, num_classes=3, depth=depth)
    for p in net.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.15)
    for i in useless:
        for p in net.blocks[i].adaLN_modulation.parameters():
            nn.init.zeros_(p)
    return net.eval()


def inputs(n: int = 5) -> tuple[torch.Tensor, torch.Tensor, dict]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 2, 4, 4, generator=generator)
    return x, torch.randint(0, 1000, (n,), generator=generator), {"y": torch.arange(n) % 3}


# ---- channels --------------------------------------------------------------------------------------------------------


def test_accumulated_gradients_are_the_sum_over_timesteps():
    torch.manual_seed(0)
    net = UNet(**SMALL, norm_groups=8, dropout=0.5).train().requires_grad_(False)  # a teacher, whatever its mode
    net.conv_in.weight.grad = torch.ones_like(net.conv_in.weight)  # of something else
    x0, noise, process = torch.randn(3, 1, 8, 8), torch.randn(3, 1, 8, 8), DDPM()
    with torch.no_grad():
        assert accumulate_gradients(net, process, x0, noise, timesteps=[0, 10, 990], progress=False) == 3
    assert net.training and not any(p.requires_grad for p in net.parameters())

    twin = copy.deepcopy(net).eval().requires_grad_(True)
    total = 0
    for t in (0, 10, 990):
        a = process.alpha_bar[t]
        prediction = twin(a.sqrt() * x0 + (1 - a).sqrt() * noise, torch.full((3,), t))
        total = total + (noise - prediction).square().sum(dim=(1, 2, 3)).mean()
    for p, expected in zip(net.parameters(), torch.autograd.grad(total, twin.parameters()), strict=True):
        torch.testing.assert_close(p.grad, expected, rtol=1e-4, atol=1e-4)
    taylor, magnitude = (prune_channels(net, 0.5, importance) for importance in ("taylor", "magnitude"))
    assert not torch.equal(taylor.conv_in.weight, magnitude.conv_in.weight)
    assert taylor(x0, torch.tensor([0, 500, 999])).isfinite().all()


class Given(nn.Module):
    """A network and a process in one, whose loss at timestep t is losses[t] * weight^2."""

    def __init__(self, losses: list[float]):
        super().__init__()
        self.losses, self.weight, self.seen = torch.tensor(losses), nn.Parameter(torch.ones(())), []

    def forward(self, x_t, t, cond=None):
        self.seen.append(int(t[0]))
        return self.weight * x_t

    def add_noise(self, x0, noise, t):
        return self.losses[t].sqrt().view(-1, 1, 1, 1) * x0

    def target(self, x0, noise, t):
        return torch.zeros_like(x0)


@pytest.mark.parametrize(("thr", "summed"), [(0, [0, 1, 2, 3]), (0.3, [0, 1, 2, 3]), (0.5, [0, 1, 2]), (1, [0, 1])])
def test_accumulation_stops_before_the_first_small_loss(thr, summed, capsys):
    losses = [2.0, 10.0, 5.0, 4.0]  # 10 is the largest so far from t = 1 on; 5 is not below half of it
    net, one = Given(losses), torch.ones(2, 1, 1, 1)
    assert accumulate_gradients(net, net, one, one, thr, range(4)) == len(summed)
    assert net.weight.grad.item() == pytest.approx(2 * sum(losses[t] for t in summed))
    assert net.seen == list(range(min(len(summed) + 1, 4)))
    assert "importance" in capsys.readouterr().err


# ---- blocks ----------------------------------------------------------------------------------------------------------


def test_random_blocks_keep_the_ends_and_depend_on_the_seed():
    drawn = {tuple(random_blocks(8, 4, seed)) for seed in range(20)}
    assert len(drawn) > 5 and all(len(set(keep)) == 4 and {0, 7} <= set(keep) for keep in drawn)
    assert random_blocks(8, 4, 3) == random_blocks(8, 4, 3) == sorted(random_blocks(8, 4, 3))
    assert [random_blocks(8, n, 0) for n in (1, 2, 8)] == [[7], [0, 7], list(range(8))]


def test_influence_finds_the_blocks_that_do_nothing():
    net, process = a_dit(useless=(1, 3)), DDPM()
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(50, *net.shape, generator=generator) for _ in range(2))
    influence = block_influence(net.train(), process, x0, noise, {"y": torch.arange(50) % 3}, progress=False)
    assert influence.shape == (6,) and set(influence.argsort()[:2].tolist()) == {1, 3}
    assert influence[[1, 3]].abs().max() < 1e-6 and influence[[0, 2, 4, 5]].min() > 1e-4
    assert net.training and not any(block._forward_hooks for block in net.blocks)

    sums, seen = [], {}  # one block by hand, at all timesteps
    net.eval().blocks[2].register_forward_hook(lambda block, args, output: seen.update(a=args[0], b=output))
    for t in range(0, 1000, 50):
        steps = torch.arange(t, t + 50)
        with torch.no_grad():
            net(process.add_noise(x0, noise, steps), steps, {"y": torch.arange(50) % 3})
        sums.append(torch.cosine_similarity(seen["a"], seen["b"], dim=-1).mean())
    assert influence[2] == pytest.approx(1 - torch.stack(sums).mean().item(), abs=1e-5)


@pytest.mark.parametrize("keep", [3, 4, 5])
def test_the_gated_network_with_one_hot_gates_is_the_rebuilt_one(keep):
    net = a_dit()
    x, t, cond = inputs()
    gated = GatedDepth(copy.deepcopy(net), keep)
    nn.init.normal_(gated.gates)
    chosen = gated.choice(gated.gates)
    assert len(chosen) == keep and gated.options.sum(1).unique().numel() == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            F, "gumbel_softmax", lambda logits, *_, **__: F.one_hot(logits.argmax(2), logits.shape[2]).float()
        )
        torch.testing.assert_close(gated(x, t, cond), prune_depth(net, chosen)(x, t, cond))

    # a drawn pass is, sample by sample, the network rebuilt with the options that were drawn
    masks = []
    gated.net.register_forward_pre_hook(lambda *_: masks.append(gated.mask))
    drawn = gated(x, t, cond)
    for i, mask in enumerate(masks[0]):
        rebuilt, one = prune_depth(net, mask.round().nonzero().flatten().tolist()), slice(i, i + 1)
        torch.testing.assert_close(drawn[one], rebuilt(x[one], t[one], {"y": cond["y"][one]}), rtol=1e-4, atol=1e-4)


def test_low_rank_updates_start_at_zero_and_are_all_that_learns():
    net = a_dit()
    gated = GatedDepth(copy.deepcopy(net), 3, lora_rank=2)
    torch.testing.assert_close(gated.net(*inputs()), net(*inputs()))  # without a mask all blocks act
    learns = {name for name, p in gated.named_parameters() if p.requires_grad}
    linears = sum(isinstance(module, nn.Linear) for module in net.modules())
    assert "gates" in learns and len(learns) == 1 + 2 * linears


def test_the_learned_choice_drops_useless_blocks_and_leaves_the_network_alone():
    net = a_dit(depth=4, useless=(1, 2))
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    x, t, cond = inputs(16)
    target = net(x, t, cond).detach()

    def loss(module, step):
        yield (module(x, t, cond) - target).square().mean() / target.square().mean()

    for lora_rank in (8, 0):
        assert learned_blocks(net, 2, loss, 60, lora_rank=lora_rank, progress=False) == [0, 3]  # of 0 1 | 2 3
    fresh = []

    def in_parts(module, step):
        for rows in torch.arange(16).split(4):
            fresh.append(module.gates.grad is None)
            part = module(x[rows], t[rows], {"y": cond["y"][rows]})
            yield (part - target[rows]).square().mean() / target.square().mean() / 4

    assert learned_blocks(net, 2, in_parts, 60, progress=False) == [0, 3]
    assert fresh == [True, False, False, False] * 60  # a part is learnt from before the next is looked at
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    with pytest.MonkeyPatch.context() as patch:  # what is learnt of is the mean over all processes
        patch.setattr(importance.machine, "mean_over_ranks", torch.zeros_like)
        assert learned_blocks(net, 2, loss, 3, progress=False) == [0, 2]  # the first options: nothing was learnt


def test_the_learned_choice_has_the_published_constants(monkeypatch):
    """Those of TinyFusion's code; but its average does not forget the start of short runs."""
    x, t, cond = inputs()
    temperatures, optimizers, norms, gates, decided = [], [], [], [], []

    class Spied(torch.optim.AdamW):
        def __init__(self, groups, **options):
            super().__init__(groups, **options)
            optimizers.append([(group["lr"], group["weight_decay"]) for group in self.param_groups])

        def step(self):
            learned = [p for group in self.param_groups for p in group["params"]]
            norms.append(torch.stack([p.grad.square().sum() for p in learned]).sum().sqrt().item())
            super().step()
            gates.append(learned[0].detach().clone())

    def steep(module, step):
        temperatures.append(module.tau)
        assert sum(isinstance(layer, importance.LoRA) and len(layer.down) == 8 for layer in module.modules()) > 8
        yield 1e4 * module(x, t, cond).square().mean()

    choice = GatedDepth.choice
    monkeypatch.setattr(torch.optim, "AdamW", Spied)
    monkeypatch.setattr(GatedDepth, "choice", lambda self, average: decided.append(average) or choice(self, average))
    learned_blocks(a_dit(), 3, steep, 4, progress=False)
    assert temperatures == pytest.approx([4, 2.7, 1.4, 0.1])
    assert optimizers == [[(1e-3, 0), (1e-4, 0)]]
    assert norms == pytest.approx([1] * 4, rel=1e-4)  # clipped, all together
    average = torch.full_like(gates[0], 0.02)
    for step, now in enumerate(gates):
        average = average + 9 / (10 + step) * (now - average)
    torch.testing.assert_close(decided[0], average)
    update = importance.LoRA(torch.zeros(12, 10), 8)
    nn.init.ones_(update.up)
    torch.testing.assert_close(update(torch.ones(12, 10)), 1 + 2 * update.down.sum(0).expand(12, 10))
    assert update.down.abs().max() <= 10**-0.5  # uniform, as Kaiming's of a = sqrt(5)


# ---- refusals --------------------------------------------------------------------------------------------------------


def accumulate(losses, thr=0.0):
    net, one = Given(losses), torch.ones(2, 1, 1, 1)
    return lambda: accumulate_gradients(net, net, one, one, thr, range(len(losses)), progress=False)


def nothing_learnt(module, step):
    yield module.gates.sum() * math.nan


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (accumulate([1.0, math.nan]), "loss at timestep 1 is nan"),
        *[(accumulate([1.0], thr), "share of the largest loss") for thr in (-0.1, 1.1, math.nan)],
        (lambda: learned_blocks(a_dit(), 3, nothing_learnt, 5, progress=False), "loss at step 0"),
        (lambda: learned_blocks(a_dit(), 6, nothing_learnt, 5), "of 6 blocks 1 to 5 can be chosen, not 6"),
        (lambda: learned_blocks(a_dit(), 0, nothing_learnt, 5), "1 to 5 can be chosen, not 0"),
        (lambda: GatedDepth(a_dit(depth=17), 8), "24,310 options a group, too many"),
    ],
)
def test_what_cannot_be_told_is_one_clear_error(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
