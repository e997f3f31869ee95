"""The networks of FID and of the Inception Score: images to the features that published numbers are taken on."""

import contextlib
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distil import disk, machine

MODES = ("clean", "legacy_pytorch", "torch_fidelity")  # as clean-fid names them, and ADM's network
Extract = Callable[[Tensor], Tensor]  # images (B, C, H, W) uint8 -> features (B, D) float32


class Inception:
    """The features of FID: images (B, C, H, W) uint8, gray or colour -> (B, 2048) float32, resized as clean-fid does.

    mode: `clean` (antialiased), `legacy_pytorch` (that of pytorch-fid: Tables 1 and 2), or `torch_fidelity`
        (that of ADM: Table 3), which also has the classes of the Inception Score.
    network: (B, 3, 299, 299) floats 0 .. 255 on `device` -> features; None: that of `mode`, with published weights.
    classes: (K, 2048), which times features are the logits of its classes; None where the mode has none.
    """

    def __init__(
        self, mode: str = "clean", device: torch.device | str = "cpu", network: Extract | None = None,
        classes: Tensor | None = None,
    ):  # fmt: skip
        from cleanfid.resize import build_resizer

        self.__name__, self.device = f"inception-{mode}", torch.device(device)
        inside = mode == "torch_fidelity"  # the network resizes, as TensorFlow's does
        self.pool, self.resizer = ThreadPoolExecutor(), build_resizer("legacy_tensorflow" if inside else mode)
        self.network, self.classes = network, classes
        if network is None:
            self.network, self.classes = fidelity(self.device) if inside else (inception(mode, self.device), None)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        colour = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()  # (B, H, W, 3)
        resized = np.stack(list(self.pool.map(self.resizer, colour)))  # (B, 299, 299, 3)
        return self.network(torch.from_numpy(resized).permute(0, 3, 1, 2).float().to(self.device)).float().cpu()


@contextlib.contextmanager
def published(mode: str, url: str, name: str, digits: str) -> Iterator[Path]:
    """The weights of an Inception network (95 MB), downloaded once into torch's cache folder of this user. Inside the
    block they are opened, after their sha256 was seen to begin with `digits`. ValueError if they cannot be had, are not
    the published ones, or cannot be opened."""
    path = Path(torch.hub.get_dir(), "checkpoints", name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            torch.hub.download_url_to_file(url, path, hash_prefix=digits)  # renamed when whole
        if not disk.checksum(path).startswith(digits):
            raise ValueError("they are not the published ones, by their checksum")
        yield path
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason, remedy = str(error).partition("\n")[0], f"get {url} and put it there"
        raise ValueError(f"--mode {mode} needs the Inception weights {path} ({reason}): {remedy}") from error


def fidelity(device: torch.device) -> tuple[Extract, Tensor]:
    """torch-fidelity's network: (B, 3, H, W) floats 0 .. 255 -> features (B, 2048), and its classes (1008, 2048).

    Raises:
        ImportError: torch-fidelity is missing.
        ValueError: as of `published`.
    """
    machine.library("torch_fidelity", "--mode torch_fidelity", "torch-fidelity")
    from torch_fidelity import feature_extractor_inceptionv3 as found

    name = found.URL_INCEPTION_V3.rpartition("/")[2]  # it ends with the first digits of the checksum
    with published("torch_fidelity", found.URL_INCEPTION_V3, name, Path(name).stem.rpartition("-")[2]) as path:
        torch.load(path, weights_only=True)  # the library would unpickle anything
        net = found.FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(path))
    net.to(device)
    return lambda images: net(images.to(torch.uint8))[0], net.fc.weight.cpu()


# Of the weights: for both names of a mode the file, and what its sha256 begins with. The first is that of the file as
# NVIDIA serves it, which k-diffusion also checks; of the second the name says it.
INCEPTION = {
    "torchscript": ("inception-2015-12-05.pt", "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"),
    "legacy_pytorch": ("pt_inception-2015-12-05-6726825d.pth", "6726825d"),
}


def inception(mode: str, device: torch.device) -> Extract:
    """The network of FID as clean-fid has it. ValueError as of `published`."""
    from cleanfid.downloads_helper import inception_url
    from cleanfid.features import build_feature_extractor
    from cleanfid.inception_pytorch import FID_WEIGHTS_URL
    from cleanfid.inception_torchscript import InceptionV3W

    legacy = mode == "legacy_pytorch"
    name, digest = INCEPTION["legacy_pytorch" if legacy else "torchscript"]
    with published(mode, FID_WEIGHTS_URL if legacy else inception_url, name, digest) as path:
        if legacy:  # clean-fid looks into the same folder
            return build_feature_extractor(mode, device, use_dataparallel=False)
        return InceptionV3W(str(path.parent), download=False, resize_inside=False).to(device).eval()
