"""A network in training: its weights, their average, its optimizer; on one process or split over several."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterable, Iterator
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

from distil.machine import hash_seed
from distil.presets import PRECISIONS
from distil.settings import Settings
from models import Network


def find_dtype(settings: Settings, device: torch.device, frozen: bool = False) -> torch.dtype:
    """What the networks compute in: --precision, by default half precision on GPUs (bf16 where they have it); a frozen
    teacher in --teacher-precision, where that is given."""
    precision = (settings.teacher_precision if frozen else None) or settings.precision
    if precision == "auto" and device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return getattr(torch, PRECISIONS[precision] or "float32")


def autocast(settings: Settings, device: torch.device, frozen: bool = False) -> torch.autocast:
    """The context in which the networks run, or a frozen teacher."""
    dtype = find_dtype(settings, device, frozen)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


class Tapped(nn.Module):
    """A network that also returns its features: `tapped(x_t, t, cond) -> (prediction, [features])`.

    net          the bare network; it stays usable alone, and `tapped.net.parameters()` leaves the adapters out
    names        the layers to read, by default `net.feature_layers()`; their features come in this order
    adapters_to  channels of the teacher's features: each feature passes a 1x1 convolution without bias to that width,
                 initialised U(-0.005, 0.005), as in the paper's code. None: features as they are.

    For multi-GPU training wrap all of it, DDP(Tapped(...)), so that the adapters' gradients are averaged too.
    AttributeError for a name that is no layer of `net`, ValueError for `adapters_to` of another length.
    """

    def __init__(self, net: Network, names: list[str] | None = None, adapters_to: list[int] | None = None):
        super().__init__()
        self.net, self.adapters = net, None
        self.names = net.feature_layers() if names is None else list(names)
        if adapters_to is not None:
            if len(adapters_to) != len(self.names):
                raise ValueError(f"{len(self.names)} features, but {len(adapters_to)} widths in adapters_to")
            pairs = zip(net.feature_channels(self.names), adapters_to, strict=True)
            self.adapters = nn.ModuleList([nn.Conv2d(own, theirs, 1, bias=False) for own, theirs in pairs])
            for adapter in self.adapters:
                nn.init.uniform_(adapter.weight, -0.005, 0.005)
        # the hooks stay (torch.compile cannot trace their coming and going) and do nothing while no forward below runs
        self.recorder = _Recorder()
        for name in self.names:
            net.get_submodule(name).register_forward_hook(self.recorder)

    def forward(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        outputs: dict[nn.Module, Any] = {}
        outer, self.recorder.outputs = self.recorder.outputs, outputs
        try:
            prediction = self.net(x_t, t, cond)
        finally:
            self.recorder.outputs = outer  # nothing of this call stays behind
        features = [self.net.feature(outputs[self.net.get_submodule(name)]) for name in self.names]  # (B, C, H, W) each
        if self.adapters is not None:
            features = [adapter(f) for adapter, f in zip(self.adapters, features, strict=True)]
        return prediction, features


class _Recorder:
    """A forward hook that puts a layer's output into `outputs` while that is a dict."""

    def __init__(self) -> None:
        self.outputs: dict[nn.Module, Any] | None = None

    def __call__(self, layer: nn.Module, inputs: tuple, output: Any) -> None:
        if self.outputs is not None:
            self.outputs[layer] = output


def feature_loss(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """Sum over the points of mean_B sum_CHW (student - teacher)^2, no gradient to the teacher; (B, C, H, W) each."""
    pairs = zip(student, teacher, strict=True)
    return sum(mse_loss(s.float(), t.detach().float(), reduction="sum") for s, t in pairs) / len(student[0])


def mean_feature_loss(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """BK-SDM's: sum over the points of mean (student - teacher)^2, no gradient to the teacher; same shapes."""
    return sum(mse_loss(s.float(), t.detach().float()) for s, t in zip(student, teacher, strict=True))


def masked_feature_loss(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """TinyFusion's: mean over the points of mean (m_S h_S - m_T h_T)^2, no gradient to the teacher; (B, ...) each.

    Each side's mask m drops what is 2 standard deviations or more from the mean of its sample (massive activations).
    """

    def masked(h: Tensor) -> Tensor:
        std, mean = torch.std_mean(h, dim=tuple(range(1, h.ndim)), keepdim=True)  # (B, 1, ...)
        return h * ((h - mean).abs() < 2 * std)  # (B, ...)

    pairs = zip(student, teacher, strict=True)
    return sum(mse_loss(masked(s.float()), masked(t.detach().float())) for s, t in pairs) / len(student)


PATIENCE = 10  # steps that are not finite, one after the other, after which a student learns no more
HALVINGS = 16  # until the scale of half precision, which starts at 2 ** 16, has come to 1

FEATURES = {"diff-pruning": feature_loss, "bk-sdm": mean_feature_loss, "tinyfusion": masked_feature_loss}


# Which of a deep teacher's blocks the blocks of a shallow student are compared with, where it is not the rule below:
# published are D14 <- D28: 2i + 1, D7 <- D28: 4i + 3, D7 <- D14: 2i + 1 and these.
LAYER_MAPS = {(4, 28): [1, 8, 15, 22], (4, 7): [1, 3, 4, 6]}


def layer_map(student_depth: int, teacher_depth: int) -> list[int]:
    """The teacher's block for each of the student's: the last one of as many equal stretches."""
    if student_depth > teacher_depth:
        raise ValueError(f"a student of {student_depth} blocks cannot be mapped to a teacher of {teacher_depth}")
    rule = [math.ceil((i + 1) * teacher_depth / student_depth) - 1 for i in range(student_depth)]
    return LAYER_MAPS.get((student_depth, teacher_depth), rule)


def tap(teacher: Network, student: Network, taps: slice) -> Tapped:
    """The teacher with the features that those of a student are compared with; `taps`: which of them."""
    names = teacher.feature_layers(student)
    if teacher.blocks:
        names = [names[i] for i in layer_map(len(student.blocks), len(teacher.blocks))]
    return Tapped(teacher, names[taps])


def tap_like(net: Network, teacher: Tapped, taps: slice, adapt: bool) -> Tapped:
    """The student with the features that go with those of the teacher.

    adapt: FitNet, where channels were pruned: every feature passes an adapter. Otherwise only features of other widths.
    """
    names = net.feature_layers(teacher.net)[taps]
    widths = teacher.net.feature_channels(teacher.names)
    adapt = (adapt and net.pruning == "channels") or widths != net.feature_channels(names)
    return Tapped(net, names, widths if adapt else None)


class Student:
    """A network in training.

    net      the network itself
    model    the same with the adapters of its features, if its method has any: what the optimizer moves
    parallel what a step calls: `model`, or that within DistributedDataParallel
    ema      the average of the weights of `net`, which is evaluated and saved
    kd       what it learns from: a `train.Method`; method: its name
    taught_by the fingerprint of its teacher's weights, None without one
    logit    of a learned w of LIFT and PLACE, (1,), else None
    seconds  how long its share of all steps took
    bad      (), on the device: how many steps in a row were not finite and left out
    stopped  the step before which it ceased to learn, None for one that learns
    """

    def __init__(
        self, settings: Settings, kd: Any, seed: int, net: Network, teacher: nn.Module | None = None,
        taught_by: str | None = None,
    ):  # fmt: skip
        """`teacher`: a Tapped one, if this method compares features. The average starts from the weights of `net`."""
        self.taught_by = taught_by
        self.kd, self.method, self.seed, self.name, self.seconds = kd, kd.name, seed, f"{kd.name}-{seed}", 0.0
        self.device = next(net.parameters()).device
        self.net = self.model = net.train()
        self.ema = copy.deepcopy(net).eval().requires_grad_(False)
        if kd.features is not None:
            torch.manual_seed(hash_seed(seed))  # of the adapters
            self.model = tap_like(net, teacher, kd.taps, kd.adapt).to(self.device)
        self.logit = None
        if kd.learns_weight:
            self.model = self.model if kd.features is not None else Tapped(net, [])
            self.logit = self.model.logit = nn.Parameter(torch.zeros(1, device=self.device))
        if settings.compile:
            self.model.compile()  # in place: the names of the parameters stay
        self._distribute()
        options = {"lr": settings.lr, "weight_decay": settings.weight_decay, "fused": self.device.type != "mps"}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), **options)
        half = find_dtype(settings, self.device) == torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=half)
        self.patience = PATIENCE + HALVINGS * half
        self.bad, self.stopped = torch.zeros((), device=self.device), None
        own = set(self.net.parameters())
        self.adapters = [p for p in self.model.parameters() if p not in own]

    def _distribute(self) -> None:
        self.parallel = (
            DistributedDataParallel(self.model, broadcast_buffers=False) if dist.is_initialized() else self.model
        )

    def learned_weight(self, coarse: Tensor) -> Tensor:
        """w as a parameter, in (0, 1), whatever the coarse term: (1,)."""
        return self.logit.sigmoid()

    def sync(self, last: bool) -> contextlib.AbstractContextManager:
        """Gradients of several processes are averaged once, in the backward pass of the last part of a batch."""
        return contextlib.nullcontext() if last or self.parallel is self.model else self.parallel.no_sync()

    def norm(self, weights: Iterable[Tensor], limit: float) -> Tensor:
        """The norm of their gradient, (), which is clipped to the limit."""
        return nn.utils.clip_grad_norm_(weights, limit)

    def diverged(self) -> bool:
        """Whether so many steps in a row were not finite that it learns no more; this waits for the device."""
        return bool(self.bad >= self.patience)

    def advance(self, loss: Tensor, norm: Tensor) -> None:
        """A step of the optimizer; none if its loss (), the norm () of its gradient or an adapter's is not finite, and
        none ever after `patience` such steps in a row. No device is waited for but where AdamW is not fused.
        """
        numbers = [loss, norm, *([self.norm(self.adapters, math.inf)] if self.adapters else [])]
        finite = torch.stack([number.detach() for number in numbers]).isfinite().all()
        skip = ~finite | (self.bad >= self.patience)
        self.bad = (self.bad + 1) * skip
        if self.scaler.is_enabled():
            for found in self.scaler._found_inf_per_device(self.optimizer).values():
                found.copy_(torch.maximum(found, skip))
            self.scaler.step(self.optimizer)
        elif self.optimizer.defaults["fused"]:
            self.optimizer.found_inf = skip.float()
            self.optimizer.step()
        elif not skip:
            self.optimizer.step()

    def average(self) -> Network:
        """The average as one whole network, on rank 0. Every process has to call it."""
        return self.ema

    @property
    def updates(self) -> int:
        """How often the optimizer moved the weights; it leaves out steps that were not finite."""
        states = iter(self.optimizer.state.values())
        return int(next(states, {"step": 0})["step"])

    def state(self) -> dict[str, Any]:
        """What `restore` takes: plain tensors and numbers. Every process has to call it; rank 0 gets them all."""
        parts = {"module": self.model, "ema": self.ema, "optimizer": self.optimizer, "scaler": self.scaler}
        return {**self.history(), **{name: part.state_dict() for name, part in parts.items()}}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes back to what `state` returned, now or before there were steps to skip."""
        parts = {"module": self.model, "ema": self.ema, "optimizer": self.optimizer, "scaler": self.scaler}
        for name, part in parts.items():
            if name != "scaler" or state[name]:  # that one is empty, if the run began on a device without it
                part.load_state_dict(state[name])
        for group in self.optimizer.param_groups:
            group["fused"] = self.optimizer.defaults["fused"]
        for weight, moments in self.optimizer.state.items():
            if any(moment.ndim and moment.shape != weight.shape for moment in moments.values()):
                raise ValueError("the state of its optimizer has other shapes")
            for name, moment in moments.items():
                if moment.ndim:  # fused AdamW takes them to lie in memory as the weight does, which devices differ in
                    moments[name] = torch.empty_like(weight).copy_(moment)
                elif self.optimizer.defaults["fused"]:
                    moments[name] = moment.to(weight.device)
        self.remember(state)

    def history(self) -> dict[str, Any]:
        """What a state holds beside tensors."""
        own = {"blocks": self.net.kept} if self.net.kept else {}
        own |= {"teacher": self.taught_by} if self.taught_by else {}
        return {"seconds": self.seconds, "bad": self.bad.item(), "stopped": self.stopped, **own}

    @property
    def seconds(self) -> float:
        """How long its share of all steps took; this waits for a GPU that has marked some since the last call."""
        for start, end in self.marks:
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1000
        self.marks.clear()
        return self._seconds

    @seconds.setter
    def seconds(self, value: float) -> None:
        self.marks, self._seconds = [], value

    def remember(self, state: dict[str, Any]) -> None:
        if state.get("teacher", self.taught_by) != self.taught_by:
            raise ValueError("it has learned from a teacher with other weights: bring that back")
        self.seconds, self.stopped = state["seconds"], state.get("stopped")
        self.bad = torch.tensor(state.get("bad", 0.0), device=self.device)


class ShardedStudent(Student):
    """A student whose weights, gradients, optimizer and average are split over the processes (torch FSDP2)."""

    def _distribute(self) -> None:
        from torch.distributed.checkpoint import state_dict
        from torch.distributed.fsdp import fully_shard

        self.sharded, self.options = state_dict, state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)
        for net in (self.model, self.ema):
            net.to(memory_format=torch.contiguous_format)  # FSDP takes no other
        self.parallel, self.whole = self.model, copy.deepcopy(self.ema).to("meta")
        for root, inside in ((self.model, self.net), (self.ema, self.ema)):
            for stage in inside.stages():
                fully_shard(stage)
            fully_shard(root)

    def sync(self, last: bool) -> contextlib.AbstractContextManager:
        self.model.set_requires_gradient_sync(last)
        return contextlib.nullcontext()

    def norm(self, weights: Iterable[Tensor], limit: float) -> Tensor:
        return super().norm(weights, limit).full_tensor()

    def average(self) -> Network:
        if state := self.sharded.get_model_state_dict(self.ema, options=self.options):  # on rank 0
            self.whole.load_state_dict(state, assign=True)
        return self.whole

    def state(self) -> dict[str, Any]:
        parts = {"module": self.model, "ema": self.ema}
        parts = {name: self.sharded.get_model_state_dict(net, options=self.options) for name, net in parts.items()}
        parts["optimizer"] = self.sharded.get_optimizer_state_dict(self.model, self.optimizer, options=self.options)
        return {**self.history(), **parts, "scaler": self.scaler.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        self.sharded.set_model_state_dict(self.model, state["module"], options=self.options)
        self.sharded.set_model_state_dict(self.ema, state["ema"], options=self.options)
        self.sharded.set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"], options=self.options)
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.remember(state)


def predict(net: nn.Module, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The output (B, C or 2C, H, W) of a network, and the features of a tapped one or []."""
    result = net(x_t, t, cond)
    return result if isinstance(result, tuple) else (result, [])


@contextlib.contextmanager
def timed(*students: Student) -> Iterator[None]:
    """Adds the seconds that the block takes to those of these students; a GPU works on later, it marks when it does."""
    if students and students[0].device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield
        end.record()
        for student in students:
            student.marks.append((start, end))
        return
    began = perf_counter()
    yield
    took = perf_counter() - began
    for student in students:
        student.seconds += took
