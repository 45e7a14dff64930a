"""Inception's features on a GPU are those of the CPU: convolutions in whole fp32, whatever torch's default is."""

from __future__ import annotations

import pytest
import torch

from tdc_fast.evaluation.inception import InceptionFeatures
from tdc_fast.evaluation.inception_network import InceptionNetwork
from tests.gpu.problems import on_device


@on_device
def test_features_are_those_of_fp64_to_the_rounding_of_fp32(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # torch's default, with errors of 1e-3
    images = torch.randint(256, (2, 3, 20, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    network = InceptionNetwork(input_size=75)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):  # as large outputs as inputs, through all layers
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    found = [out.double().cpu() for out in InceptionFeatures(network.to(device)).outputs(images.to(device))]
    exact = network.cpu().double()(images)
    for ours, expected in zip(found, exact, strict=True):
        assert float((ours - expected).norm() / expected.norm()) < 1e-5
    assert torch.backends.cudnn.allow_tf32  # what the caller chose is left as it was
