"""The study behind "What the head needs" in docs/head.md.

    python benchmarks/head.py OUT --seeds 0 1 --steps 600                     trains what is missing below runs/head
    python benchmarks/head.py OUT --variants all shared --data photos --seeds 0 1

Every flag of train.py may follow. Each variant is a head of its own, put in the place of `models.StatisticsHead` while
its students are trained and compared; OUT/metrics.json has the form of a run's. A variant's students lie in its own
folder, and only this script can read them.
"""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import models
from benchmarks import calibrate
from distil import machine, sample
from distil.command import Parser, check
from distil.prepare import prepare
from distil.settings import parse
from notebooks.analysis import finished


class Part(models.StatisticsHead):
    """A head that reads some of [1, mean x_t, std x_t, mean e, std e]; shared: one line for all channels."""

    def __init__(self, net: models.UNet, kept: Sequence[int] = range(5), shared: bool = False):
        super().__init__(1 if shared else net.shape[0])
        self.kept = [[float(i in kept)] for i in range(5)]

    def forward(self, x_t: Tensor, t: Tensor, output: Tensor) -> Tensor:
        weights = self.mlp(models.timestep_embedding(t, 32)).unflatten(1, (-1, 5, 2))  # (B, C or 1, 5, 2)
        return models.correct(x_t, output, weights * weights.new_tensor(self.kept))


class Time(nn.Module):
    """The other form: mean and std of x_t are added to the time embedding; the output stays as it is."""

    def __init__(self, net: models.UNet):
        super().__init__()
        self.linear = nn.Linear(2 * net.shape[0], net.temb.dense[1].out_features)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        net.register_forward_pre_hook(self.look)
        net.temb.dense[1].register_forward_hook(self.add)

    def look(self, net: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.seen = models.statistics(args[0], args[0])[..., 1:3].flatten(1)  # (B, 2 C)

    def add(self, layer: nn.Module, args: tuple[Tensor, ...], temb: Tensor) -> Tensor:
        return temb + self.linear(self.seen)  # (B, D)

    def forward(self, x_t: Tensor, t: Tensor, output: Tensor) -> Tensor:
        return output


VARIANTS = {
    "all": Part,
    "x_t": partial(Part, kept=(0, 1, 2)),
    "e": partial(Part, kept=(0, 3, 4)),
    "means": partial(Part, kept=(0, 1, 3)),
    "deviations": partial(Part, kept=(0, 2, 4)),
    "constants": partial(Part, kept=(0,)),
    "shared": partial(Part, shared=True),
    "time": Time,
}


@contextlib.contextmanager
def heads(variant: str) -> Iterator[None]:
    """In this context the statistics heads of new networks, loaded ones too, are of this variant."""
    build, known = VARIANTS[variant], models.Network.set_head

    def set_head(net: models.Network, head: str | None) -> None:
        known(net, head)
        if head is not None:
            net.head = build(net).to(next(net.parameters()).device)

    models.Network.set_head = set_head
    try:
        yield
    finally:
        models.Network.set_head = known


def main(argv: list[str] | None = None) -> int:
    parser = Parser("head.py", __doc__)
    parser.add_argument("out", type=Path)
    usual = [name for name in VARIANTS if name != "shared"]  # of one channel that is the same as all
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=usual)
    parser.add_argument("--num", type=int, default=300, help="samples of each network [300]")
    given, flags = parser.parse_known_args(argv)
    with machine.refusing("head.py"):
        check("OUT", given.out, {"folder": True})
        check("--num", given.num, {"low": 2})
    rows, samples = [], {}
    for variant in given.variants:
        folder = Path("runs/head") / given.out.name / variant
        told = ["--head", "statistics", "--eval-samples", "0", "--lambda-feat", "0", "--out", str(folder)]
        with heads(variant):
            with machine.refusing("head.py"):
                settings = parse([*flags, *told])
                prepare(settings)
            finished(settings)
            case = calibrate.open_run(folder, sample.Flags(num=given.num))
            found, drawn = case.compare(calibrate.study(case, ["plain"], more=f", {variant}"))
        rows = [found[0], *rows[1:], *found[1:]]  # the teacher's stands first, once
        samples |= drawn
    protocol = f"{given.num} generated, {len(case.times)} steps; a head of its own kind in each row, nothing calibrated"
    calibrate.write(given.out, folder, len(case.times), protocol, rows, samples)
    return 0


if __name__ == "__main__":
    sys.exit(main())
