"""Inception as a feature extractor, with its published weights or others; only the former give FID its name."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from tdc_fast.atomic import sha256_of
from tdc_fast.errors import invalid
from tdc_fast.evaluation.inception_network import INPUT_SIZE, POOL_FEATURES, InceptionNetwork, InceptionOutputs
from tdc_fast.runs.weights import load_tensors

WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""Of `weights-inception-2015-12-05-6726825d.pth` (torch-fidelity) and `pt_inception-2015-12-05-6726825d.pth`
(pytorch-fid), which are one file: the weights of the graph that FID is defined by."""
WEIGHTS_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
DOWNLOAD = "download"
"""What stands for the published file in `--inception_weights`."""


class InceptionFeatures(nn.Module):
    """The 2048 features of an Inception network, and with `outputs` all that the metrics read from it.

    Args:
        network: the network with its weights.
        sha256: of the file that the weights come from, in hex; empty for weights from no file.
        name: what they come from, for the description.

    Attributes:
        num_features: length of a feature vector, 2048.
        published: whether these are Inception's published weights at 299 pixels, by the file's checksum. Distances have
            the names FID, sFID and KID only then.
        description: names the feature space in reports.
        fingerprint: identifies the features, so that statistics of a set of images can be kept.
        images_at_once: images of a batch that fits the memory of a small machine.
    """

    num_features = POOL_FEATURES
    images_at_once = 64

    def __init__(self, network: InceptionNetwork, sha256: str = "", name: str = "weights in memory") -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.published = sha256 == WEIGHTS_SHA256 and network.input_size == INPUT_SIZE
        self.fingerprint = f"inception {network.input_size} {sha256 or _digest(network.state_dict())}"
        if self.published:
            self.description = f"2048 features of Inception with its weights of 2015-12-05 (sha256 {sha256[:12]})"
        else:
            made = f"sha256 {sha256[:12]}" if sha256 else "of no file"
            self.description = (
                f"2048 features of Inception's architecture at {network.input_size} pixels with other weights than "
                f"Inception's: {name} ({made}); the distance has no published name"
            )

    def outputs(self, images: Tensor) -> InceptionOutputs:
        """Everything that the metrics read, for images (B, C, H, W) uint8; grey ones are taken as RGB."""
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3):
            raise invalid("images", f"{images.dtype} {tuple(images.shape)}", "uint8 images (B, C, H, W), C 1 or 3")
        # In whole fp32 on a GPU: cuDNN's convolutions round to tf32 by default, which moves FID in its third digit.
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
            return self.network(images.expand(-1, 3, -1, -1))

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, 2048) of images (B, C, H, W) uint8, C 1 or 3."""
        return self.outputs(images).pool


def load_inception(weights: str) -> InceptionFeatures:
    """Inception with the weights of a file.

    Args:
        weights: a state dict with the names of pytorch-fid and torch-fidelity, or "download": the published file, which
            is kept in torch.hub's folder of checkpoints, where torch-fidelity looks for it too.

    Raises:
        ValueError: the file is missing or damaged, or its tensors are not those of the network; names it.
        OSError: the download fails.
    """
    path = _downloaded() if weights == DOWNLOAD else Path(weights)
    state = load_tensors(path, "inception_weights")
    with torch.device("meta"):  # no memory is drawn full of random numbers first
        network = InceptionNetwork()
    own = _checked(path, state, network.state_dict())
    network.load_state_dict(own, strict=False, assign=True)  # torch adds counts of batches that no norm here has
    with open(path, "rb") as file:
        return InceptionFeatures(network, sha256_of(file), str(path))


def _downloaded() -> Path:
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(WEIGHTS_URL).name
    if not path.is_file():
        print(f"downloading {WEIGHTS_URL} to {path}", flush=True)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(WEIGHTS_URL, str(path), WEIGHTS_SHA256, progress=False)
        except Exception as error:  # of the network, the disk, or the checksum
            remedy = f"--inception_weights FILE with a copy of it ({error})"
            raise OSError(f"{WEIGHTS_URL} cannot be downloaded; use {remedy}") from error
    with open(path, "rb") as file:
        found = sha256_of(file)
    if found != WEIGHTS_SHA256:
        remedy = f"the published file; delete {path}, whose sha256 is {found[:12]}, to download it again"
        raise invalid("inception_weights", DOWNLOAD, remedy)
    return path


def _checked(path: Path, state: object, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The network's weights, float32, from what a file holds."""
    remedy = "the state dict of FID's Inception, as pytorch-fid and torch-fidelity publish it"
    if not isinstance(state, Mapping):
        raise invalid("inception_weights", f"{path}: a {type(state).__name__}", remedy)
    missing = sorted(expected.keys() - state.keys())
    unknown = sorted(str(n) for n in state.keys() - expected.keys() if not str(n).endswith("num_batches_tracked"))
    if missing or unknown:
        differences = [f"without {name}" for name in missing[:1]] + [f"with {name}" for name in unknown[:1]]
        raise invalid("inception_weights", f"{path}, {' and '.join(differences)}", remedy)
    for name in sorted(expected):
        value, shape = state[name], tuple(expected[name].shape)
        if not isinstance(value, Tensor) or tuple(value.shape) != shape or not value.is_floating_point():
            found = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise invalid("inception_weights", f"{path}: {name} is {found}", f"floats of shape {shape}")
        if not value.isfinite().all():
            raise invalid("inception_weights", f"{path}: {name} has infinities or NaN", "finite weights")
    return {name: state[name].float() for name in expected}


def _digest(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
