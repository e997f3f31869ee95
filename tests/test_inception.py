"""distil/inception.py against clean-fid and torch-fidelity, with random networks in the place of the published ones."""

import hashlib
import urllib.request

import numpy as np
import pytest
import torch
from conftest import Trap
from PIL import Image

from distil import inception, metrics


@pytest.mark.parametrize("mode", inception.MODES[:2])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_reach_inception_as_those_of_clean_fid(mode, channels, tmp_path):
    fid = pytest.importorskip("cleanfid.fid")
    images = np.random.default_rng(0).integers(0, 256, (5, channels, 20, 20), np.uint8)
    for i, image in enumerate(images):
        Image.fromarray(image.transpose(1, 2, 0).squeeze()).save(tmp_path / f"{i}.png")

    def network(x):  # sees where a pixel is
        return x[:, :, ::7, ::5].flatten(1)

    theirs = fid.get_folder_features(
        str(tmp_path), model=network, mode=mode, num_workers=0, device=torch.device("cpu"), verbose=False
    )
    ours = metrics.features(inception.Inception(mode, network=network), images)
    np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-3)


def test_weights_of_inception_that_cannot_be_had_or_read(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = tmp_path / "hub" / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth"
    urllib.request.install_opener(urllib.request.build_opener(urllib.request.ProxyHandler({"https": "127.0.0.1:9"})))
    try:
        for _ in range(2):
            with pytest.raises(ValueError, match=rf"Inception weights {weights} .*: get https://.* and put it there"):
                inception.Inception("legacy_pytorch")
            weights.parent.mkdir(parents=True, exist_ok=True)
            weights.write_bytes(b"half a file")
    finally:
        urllib.request.install_opener(None)


@pytest.fixture(scope="module")
def fidelity_weights(tmp_path_factory):
    """The file of a random network of torch-fidelity, named as the published one is: after its own hash."""
    found = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")

    class Blank(found.FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            torch.manual_seed(0)

    folder = tmp_path_factory.mktemp("hub") / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(found, "load_state_dict_from_url", lambda *_, **__: {})
        torch.save(Blank("blank", ["2048"]).state_dict(), folder / "weights")
    return named(folder / "weights")


def named(path):
    """The file, renamed after its hash."""
    return path.rename(path.with_name(f"weights-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth"))


def test_adm_scores_through_the_network_of_torch_fidelity(fidelity_weights, monkeypatch, tmp_path):
    from torch_fidelity import feature_extractor_inceptionv3 as found

    monkeypatch.setenv("TORCH_HOME", str(fidelity_weights.parents[2]))
    monkeypatch.setattr(found, "URL_INCEPTION_V3", f"https://nowhere/{fidelity_weights.name}")
    images = torch.randint(0, 256, (2, 3, 20, 24), dtype=torch.uint8)
    net = found.FeatureExtractorInceptionV3(
        "one", ["2048", "logits_unbiased"], feature_extractor_weights_path=fidelity_weights
    )
    theirs, logits = net(images)
    extract = inception.Inception("torch_fidelity")
    ours = metrics.features(extract, images)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(ours @ extract.classes.T, logits)

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(Trap(tmp_path / "touched"), folder / fidelity_weights.name)
    with pytest.raises(ValueError, match=r"not the published ones.*: get https://nowhere/weights-.* and put it there"):
        inception.Inception("torch_fidelity")
    trap = named(folder / fidelity_weights.name)  # a pickle whose hash is right is not run either
    monkeypatch.setattr(found, "URL_INCEPTION_V3", f"https://nowhere/{trap.name}")
    with pytest.raises(ValueError, match="torch_fidelity needs the Inception weights"):
        inception.Inception("torch_fidelity")
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("mode", inception.MODES[:2])  # of clean-fid
def test_weights_of_inception_are_opened_only_with_the_published_checksum(mode, tmp_path, monkeypatch):
    """A TorchScript file can run anything: another one is refused unopened, wherever it comes from."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.jit, "load", lambda *_: pytest.fail("opened"))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    for name, _ in inception.INCEPTION.values():
        torch.save({}, folder / name)
    with pytest.raises(ValueError, match=r"not the published ones, by their checksum\): get https://"):
        inception.Inception(mode)
