"""The Inception network against torch-fidelity's, its metrics against a direct computation, and when they are FID."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tdc_fast import evaluate as command
from tdc_fast.evaluation import EvaluateOptions, evaluate, inception
from tdc_fast.evaluation.inception import InceptionFeatures, load_inception
from tdc_fast.evaluation.inception_network import InceptionNetwork

SMALL = 75  # pixels, the smallest input: a sixteenth of the work of 299


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """Weights from a seed, drawn in the order of their names: `PUBLISHED_NETWORK` was computed with the same ones."""
    generator = torch.Generator().manual_seed(0)
    drawn = {}
    for name, value in sorted(InceptionNetwork().state_dict().items()):
        noise = torch.randn(value.shape, generator=generator)
        if name.endswith("conv.weight") or name == "fc.weight":
            drawn[name] = noise * (2 / noise[0].numel()) ** 0.5
        elif name.endswith(("bn.weight", "running_var")):
            drawn[name] = (1 + 0.1 * noise).abs() if name.endswith("running_var") else 1 + 0.1 * noise
        else:
            drawn[name] = 0.1 * noise
    return drawn


@pytest.fixture(scope="module")
def network(state) -> InceptionNetwork:
    network = InceptionNetwork(SMALL)
    network.load_state_dict(state, strict=False)
    return network


@pytest.fixture(scope="module")
def weights_file(state, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def images() -> tuple[torch.Tensor, torch.Tensor]:
    """Two sets of small RGB images that differ in brightness."""
    generator = torch.Generator().manual_seed(2)
    bright = torch.randint(80, 256, (12, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return torch.randint(200, (12, 3, 8, 8), dtype=torch.uint8, generator=generator), bright


@pytest.fixture(scope="module")
def files(images, tmp_path_factory) -> tuple[str, str]:
    """The two sets as .npz files."""
    folder = tmp_path_factory.mktemp("sets")
    for name, pixels in zip("ab", images, strict=True):
        np.savez(folder / f"{name}.npz", pixels.permute(0, 2, 3, 1).numpy())
    return str(folder / "a.npz"), str(folder / "b.npz")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("TDC_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "statistics"


# torch-fidelity 0.4.0's FeatureExtractorInceptionV3 in float64, with the weights of `state`, on the images of the test:
# of either image, pool features 0 and 2047 and the sum of all; two spatial features and the sum; logits 0 and 1007.
PUBLISHED_NETWORK = {
    299: [[1.8086536, 0.22099660, 817.23126, 1.0004009, 1.3703996, 579.71674, -1.3161254, 2.2284310]],
    75: [
        [0.59578848, 0.40270439, 229.10061, 0.75724334, 0.0, 10.108602, -0.43476394, 0.44275278],
        [0.60904694, 0.37243387, 230.43010, 0.82424200, 0.0, 10.200163, -0.44654110, 0.42468357],
    ],
}
NAMES_AND_SHAPES = "61093f3898ff55ee284da97759a34b5a834fb7ea04e1c984d17b89a2dafcc318"


@pytest.mark.parametrize("size", [299, 75])
def test_the_network_gives_what_torch_fidelitys_gives(state, size):
    images = torch.randint(256, (2, 3, 32, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    sized = InceptionNetwork(size)
    sized.load_state_dict(state, strict=False)
    expected = torch.tensor(PUBLISHED_NETWORK[size])
    out = sized(images[: len(expected)])
    # Channels are innermost: (row 1, column 3, channel 0) of 17 columns, or (row 0, column 2, channel 2) of 3.
    pixel = (1 * 17 + 3) * 7 + 0 if size == 299 else (0 * 3 + 2) * 7 + 2
    columns = [out.pool[:, [0, 2047]], out.pool.sum(1, True), out.spatial[:, [0, pixel]], out.spatial.sum(1, True)]
    found = torch.cat([*columns, out.logits[:, [0, 1007]]], dim=1)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-5)


def test_names_and_shapes_of_the_parameters_are_those_of_the_published_file(state):
    listed = sorted((name, tuple(value.shape)) for name, value in state.items())
    assert hashlib.sha256(repr(listed).encode()).hexdigest() == NAMES_AND_SHAPES


def test_every_metric_equals_a_direct_computation_in_fp64(network, images, files):
    found = evaluate(*files, extractor=InceptionFeatures(network))["metrics"]
    with torch.no_grad():
        outputs = [network(batch) for batch in images]
    pools = [out.pool.double() for out in outputs]
    assert found["frechet_distance"] == pytest.approx(_frechet(*pools), rel=1e-5)
    assert found["spatial_frechet_distance"] == pytest.approx(
        _frechet(*(o.spatial.double() for o in outputs)), rel=1e-5
    )
    assert found["kernel_distance"]["mean"] == pytest.approx(_kernel_distance(*pools), rel=1e-5)
    assert (found["kernel_distance"]["blocks"], found["kernel_distance"]["block_size"]) == (1, 12)
    assert found["precision"] == _share_inside(pools[0], pools[1])
    assert found["recall"] == _share_inside(pools[1], pools[0])
    for name, out in (("compared", outputs[0]), ("reference", outputs[1])):
        assert found["class_score"][name]["mean"] == pytest.approx(_score(out.logits), rel=1e-5)
    assert "FID" not in str(found) and "fid" not in str(found) and "kid" not in str(found)


def _frechet(x: torch.Tensor, y: torch.Tensor) -> float:
    """By the formula, in the span of both sets, where the covariances have few rows."""
    basis = torch.linalg.qr(torch.cat([x, y]).T).Q
    (mean_x, cov_x), (mean_y, cov_y) = ((z.mean(0), torch.cov(z.T)) for z in (x @ basis, y @ basis))
    root = torch.linalg.eigvals(cov_x @ cov_y).real.clamp_min(0).sqrt().sum()
    return float((mean_x - mean_y).square().sum() + (cov_x + cov_y).trace() - 2 * root)


def _kernel_distance(x: torch.Tensor, y: torch.Tensor) -> float:
    n = len(x)
    kernels = [(a @ b.T / 2048 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))]
    own = [(kernel.sum() - kernel.trace()) / (n * (n - 1)) for kernel in kernels[:2]]
    return float(own[0] + own[1] - 2 * kernels[2].sum() / n**2)


def _share_inside(points: torch.Tensor, members: torch.Tensor) -> float:
    radii = torch.cdist(members, members).sort(dim=1).values[:, 3]  # the first is the distance to itself
    return float((torch.cdist(points, members) <= radii).any(dim=1).double().mean())


def _score(logits: torch.Tensor) -> float:
    p, order = logits.double().softmax(1), torch.randperm(len(logits), generator=torch.Generator().manual_seed(0))
    values = []
    for part in range(10):
        rows = p[order[[place for place in range(len(p)) if place * 10 // len(p) == part]]]
        values.append(float((rows * (rows / rows.mean(0)).log()).sum(1).mean().exp()))
    return float(np.mean(values))


def test_grey_images_have_the_features_of_their_rgb_copies(network, images):
    extractor, grey = InceptionFeatures(network), images[0][:2, :1]
    assert torch.equal(extractor(grey), extractor(grey.expand(-1, 3, -1, -1).contiguous()))
    for wrong in (grey.float(), images[0][:2, :2], images[0][0]):
        with pytest.raises(ValueError, match="images: got"):
            extractor(wrong)


def test_any_module_that_gives_features_is_an_extractor(files, images):
    pixels = torch.nn.Flatten()
    found = evaluate(*files, extractor=pixels)
    a, b = (pixels(batch).double() for batch in images)
    assert found["metrics"]["frechet_distance"] == pytest.approx(_frechet(a, b), rel=1e-6)
    assert found["feature_space"] == "Flatten" and "class_score" not in found["metrics"]
    with pytest.raises(ValueError, match="^extractor: "):
        evaluate(*files, EvaluateOptions(features="random-conv"), extractor=pixels)


@pytest.fixture
def at_75(monkeypatch) -> None:
    """Lets the command run the network, and call it Inception, at 75 pixels."""
    monkeypatch.setattr(inception, "InceptionNetwork", functools.partial(InceptionNetwork, SMALL))
    monkeypatch.setattr(inception, "INPUT_SIZE", SMALL)


def test_the_words_fid_and_kid_need_the_published_file(weights_file, files, at_75, monkeypatch, capsys, tmp_path):
    flags = [*files, "--inception_weights", str(weights_file), "--out", str(tmp_path / "e.json")]
    assert command.main(flags) == 0
    shown, written = capsys.readouterr().out, json.loads((tmp_path / "e.json").read_text())
    assert "Fréchet distance: " in shown and "other weights than Inception's" in shown and "no published name" in shown
    for word in ("FID", "KID", "Inception Score"):
        assert word not in shown and word not in str(written)
    monkeypatch.setattr(inception, "WEIGHTS_SHA256", hashlib.sha256(weights_file.read_bytes()).hexdigest())
    assert command.main(flags) == 0
    shown, named = capsys.readouterr().out, json.loads((tmp_path / "e.json").read_text())
    for word in ("FID: ", "sFID: ", "KID: ", "Inception Score: ", "precision: ", "recall: "):
        assert word in shown
    assert named["metrics"]["fid"] == written["metrics"]["frechet_distance"] == named["frechet_distance"]
    assert "Inception with its weights of 2015-12-05" in named["feature_space"]
    assert "statistics of " in shown  # of the second set, kept by the first command


def test_other_weights_and_another_size_of_the_images_are_not_fid(network, monkeypatch):
    monkeypatch.setattr(inception, "WEIGHTS_SHA256", "5" * 64)
    assert InceptionFeatures(InceptionNetwork(), "5" * 64).published
    assert not InceptionFeatures(InceptionNetwork(298), "5" * 64).published
    assert not InceptionFeatures(network, "6" * 64).published and not InceptionFeatures(network).published


def test_a_file_that_is_not_the_networks_is_refused_by_name(state, weights_file, tmp_path):
    for changed, message in (
        ({"fc.bias": torch.zeros(1000)}, r"fc.bias is torch.float32 \(1000,\)'; expected floats of shape \(1008,\)"),
        ({"fc.bias": torch.full((1008,), torch.nan)}, "fc.bias has infinities or NaN"),
        ({"AuxLogits.fc.bias": torch.zeros(1)}, "with AuxLogits.fc.bias'; expected .*pytorch-fid"),
        ({"fc.bias": None}, "without fc.bias"),
    ):
        made = {name: value for name, value in {**state, **changed}.items() if value is not None}
        torch.save(made, tmp_path / "changed.pth")
        with pytest.raises(ValueError, match=f"inception_weights: .*{message}"):
            load_inception(str(tmp_path / "changed.pth"))
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="a list"):
        load_inception(str(tmp_path / "list.pth"))
    with pytest.raises(ValueError, match="inception_weights: got .*existing file"):
        load_inception(str(tmp_path / "nowhere.pth"))


def test_a_download_is_kept_only_if_it_is_the_published_file(weights_file, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(inception, "WEIGHTS_URL", weights_file.as_uri())
    with pytest.raises(OSError, match="cannot be downloaded; use --inception_weights FILE .*invalid hash"):
        load_inception("download")
    assert list((tmp_path / "checkpoints").iterdir()) == []
    monkeypatch.setattr(inception, "WEIGHTS_SHA256", hashlib.sha256(weights_file.read_bytes()).hexdigest())
    assert load_inception("download").published
    (tmp_path / "checkpoints" / weights_file.name).write_bytes(b"something else")
    with pytest.raises(ValueError, match="delete .*random.pth"):
        load_inception("download")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--features", "inception"], "features: got 'inception'; expected --inception_weights"),
        (
            ["--features", "digits", "--inception_weights", "x.pth"],
            "inception_weights: got 'x.pth'; expected none with",
        ),
        (["--inception_weights", "nowhere.pth"], "inception_weights: got 'nowhere.pth'; expected an existing file"),
    ],
)
def test_options_that_contradict_each_other_are_refused(flags, message, capsys, tmp_path):
    assert command.main(["digits", "digits", *flags, "--out", str(tmp_path / "e.json")]) == 2
    assert message in capsys.readouterr().err
