"""A roofline: the time of a layer from its MACs and bytes, and the steps in which the device's kernels work.

A layer takes the longer of the time of its MACs and the time of its bytes, plus a constant for the call. MACs are those
of whole tiles: a tile with one live channel costs what a full one does, as in the kernels. Convolutions of upsampled
images multiply each pixel of the small image once for all taps that meet it: 4/9 of the MACs with 3x3 filters.

* GPU: a convolution runs on the tile that `kernels.tile_shapes` chooses for it, in waves of one program per
  multiprocessor, or as hopper.py says where the backend that would run it has the Hopper form for it. The rates are
  those measured on an H200 (bench/results/gpu-nvidia-h200.md), per multiprocessor; other GPUs are taken to have its
  balance of arithmetic, bandwidth and launches.
* CPU: the kernels compute panels of two vectors of output channels. The rates are those of one core of an AMD EPYC with
  AVX2; other processors are taken to have its balance.

Since budgets are shares of the base's own time, the balance matters and the absolute rates do not. Where more precision
is needed, measure a table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tdc_fast.kernels.problems import ConvProblem
from tdc_fast.kernels.tile_shapes import Device, choose_tile, device_of, pixel_classes, programs, tile_rate
from tdc_fast.pruning.latency import hopper
from tdc_fast.pruning.latency.layers import Layer
from tdc_fast.pruning.latency.problems import conv_problem
from tdc_fast.pruning.latency.setting import Setting, instruction_set

_H200_MULTIPROCESSORS = 132
_GPU_MACS = 772.6e12 / 2 / _H200_MULTIPROCESSORS  # per second and multiprocessor: a bf16 matrix product
_GPU_BYTES = 4.25e12 / _H200_MULTIPROCESSORS  # per second and multiprocessor: a copy, read and written
_GPU_NORM = 0.3  # share of that which a group norm reaches
_GPU_CALL = 4.8e-6  # an empty launch
_CPU_MACS = 28e9  # per second and core: fp32 convolutions of 64 to 128 channels
_CPU_BYTES = 10e9  # per second, of all cores: a copy, read and written
_CPU_CALL = 22e-6  # a convolution of eight channels and one pixel
_LANES = {"avx512": 16, "avx2": 8}
_PANEL_VECTORS = 2


@dataclass(frozen=True)
class Roofline:
    """Estimates times of layers; a `LatencyModel`.

    Attributes:
        setting: where and how they run.
        gpu: the device that GPU kernels' tiles are chosen for; None for the CPU.
        is_hopper: says which convolutions run in the Hopper form on it; None: none do.
        threads: of the CPU.
        panel: output channels that a CPU kernel computes together.
    """

    setting: Setting
    gpu: Device | None = None
    threads: int = 1
    panel: int = 16
    is_hopper: Callable[[ConvProblem], bool] | None = None

    @classmethod
    def on(cls, device: torch.device, dtype: torch.dtype, batch: int, num_groups: int, threads: int = 0) -> Roofline:
        """The roofline of a device of this machine.

        Args:
            device: a GPU, or the CPU.
            dtype: what the layers compute in.
            batch: samples of a forward, over all groups.
            num_groups: N.
            threads: of the CPU; 0 for as many as torch has now.
        """
        setting = Setting.on(device, dtype, batch, num_groups, threads)
        if device.type == "cuda":
            return cls(setting, device_of(device), is_hopper=hopper.runs_in_hopper_form)
        panel = _PANEL_VECTORS * _LANES.get(instruction_set(device), 4)
        return cls(setting, None, threads or torch.get_num_threads(), panel)

    def nanoseconds(self, layer: Layer) -> int:
        """The estimated time of a layer."""
        if self.gpu is None:
            seconds = max(self._cpu_macs(layer) / (_CPU_MACS * self.threads), self._bytes(layer) / _CPU_BYTES)
            return round(1e9 * (seconds + _CPU_CALL))
        bandwidth = _GPU_BYTES * self.gpu.multiprocessors
        if layer.kind == "group_norm":
            return round(1e9 * (self._bytes(layer) / (_GPU_NORM * bandwidth) + _GPU_CALL))
        calls = 2 if _merges_taps(layer) else 1
        return round(
            1e9 * (max(self._gpu_seconds(layer, self.gpu), self._bytes(layer) / bandwidth) + calls * _GPU_CALL)
        )

    def step(self, layer: Layer) -> int:
        """The step, in live channels on the narrowed axis, at which the time of a convolution rises.

        Args:
            layer: with fewer live channels than all on one side.
        """
        if self.gpu is None:
            return self.panel if layer.live_out < layer.out_channels else 1
        problem, narrows_out = self._problem(layer), layer.live_out < layer.out_channels
        if self.in_hopper_form(layer):
            return hopper.column_step(problem, self.gpu) if narrows_out else hopper.DEPTH
        tile = choose_tile(*_portable(problem), self.gpu)
        return tile.block_channels if narrows_out else tile.block_k

    def in_hopper_form(self, layer: Layer) -> bool:
        """Whether a convolution is estimated in the Hopper form."""
        return self.is_hopper is not None and self.is_hopper(self._problem(layer))

    def _bytes(self, layer: Layer) -> int:
        """Bytes read and written: live input channels and weights, and all output channels, dead ones being zeroed.

        On a GPU a launch of its own merges the taps of an upsampled convolution, all channels of them.
        """
        s = self.setting
        out_height, out_width = layer.out_size
        x = s.batch * layer.height * layer.width * layer.live_in
        y = s.batch * out_height * out_width * layer.out_channels
        weights = 0
        if layer.kind in ("conv2d", "linear"):
            weights = layer.live_in * layer.live_out * math.prod(layer.filter)
        if self.gpu is not None and _merges_taps(layer):  # all channels: read, then merged taps written and read
            merged = math.prod(taps + 1 for taps in layer.filter)
            weights = layer.in_channels * layer.out_channels * (math.prod(layer.filter) + 2 * merged)
        weights *= min(s.num_groups, s.batch)
        return (x + y + weights) * s.torch_dtype.itemsize

    def _cpu_macs(self, layer: Layer) -> int:
        if layer.kind == "group_norm":
            return 0
        if layer.kind == "attention":
            return 2 * self.setting.batch * layer.height**2 * layer.live_out  # dead heads are not computed
        panels = -(-layer.live_out // self.panel) * self.panel
        pixels = self.setting.batch * math.prod(layer.out_size)
        return round(pixels * math.prod(_source_pixels(layer)) * layer.live_in * panels)

    def _gpu_seconds(self, layer: Layer, gpu: Device) -> float:
        if layer.kind == "attention":  # every head is computed
            macs = 2 * self.setting.batch * layer.height**2 * layer.out_channels
            return macs / (_GPU_MACS * gpu.multiprocessors)
        if not layer.live_in or not layer.live_out:
            return 0.0
        problem = self._problem(layer)
        if self.in_hopper_form(layer):
            return hopper.clocks(problem, gpu, layer.live_in, layer.live_out) * hopper.PAIRS / _GPU_MACS
        direction, problem = _portable(problem)
        tile = choose_tile(direction, problem, gpu)
        rate = tile_rate(direction, problem, gpu, tile)
        all_tiles = -(-layer.out_channels // tile.block_channels)
        live_tiles = -(-layer.live_out // tile.block_channels)
        waves = -(-programs(direction, problem, tile) * live_tiles // all_tiles // gpu.multiprocessors)
        taps = math.prod(problem.filter) / pixel_classes(direction, problem)
        depth = -(-layer.live_in // tile.block_k) * tile.block_k * taps
        return waves * tile.block_pixels * tile.block_channels * depth / (rate * _GPU_MACS)

    def _problem(self, layer: Layer) -> ConvProblem:
        """The convolution at its full shape, as the kernels' choice of tiles takes it."""
        return conv_problem(layer, self.setting, torch.device("cuda"))


def _merges_taps(layer: Layer | ConvProblem) -> bool:
    """Whether GPU kernels compute an upsampled convolution on merged taps, in two launches."""
    fits = all(pad < taps for pad, taps in zip(layer.padding, layer.filter, strict=True))
    return layer.upsample > 1 and layer.stride == (1, 1) and fits


def _portable(problem: ConvProblem) -> tuple[str, ConvProblem]:
    """What the portable kernels compute for a forward: "forward" or "dgrad", and of which convolution."""
    if _merges_taps(problem):
        return "dgrad", problem.adjoint()
    return "forward", problem.unfused()


def _source_pixels(layer: Layer) -> list[float]:
    """Input pixels that an output pixel is computed from, along each axis: the filter's taps, if not upsampled."""
    return [
        sum(len({(i * step + tap - pad) // layer.upsample for tap in range(taps)}) for i in range(layer.upsample))
        / layer.upsample
        for taps, step, pad in zip(layer.filter, layer.stride, layer.padding, strict=True)
    ]
