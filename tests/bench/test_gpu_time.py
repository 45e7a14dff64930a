"""Where a step's time goes: kernels as a profile of an H200 names them, by kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import gpu_time
from bench.gpu_time import Kernel, kind_of, table


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("conv_tma_kernel", "convolution"),
        ("tdc_conv_dgrad_bf16_128x128", "convolution"),
        ("sm90_xmma_dgrad_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize256x128x64", "convolution"),
        ("wgrad_kernel", "convolution: weight gradient"),
        ("sm90_xmma_wgrad_indexed_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc", "convolution: weight gradient"),
        ("bias_kernel", "bias gradients"),
        ("sum_per_expert_kernel", "group norm"),
        ("tdc_conv_sample_sums_bf16", "bias gradients"),
        ("tdc_group_norm_backward_whole_bf16_vector", "group norm"),
        ("norm_forward_kernel", "group norm"),
        ("void at::native::(anonymous namespace)::RowwiseMomentsCUDAKernel<float>(long, float", "group norm"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma", "attention"),
        ("void (anonymous namespace)::softmax_warp_forward<float, float, float, 8, false, false>", "attention"),
        ("sm80_xmma_gemm_f32f32_f32f32_f32_tn_n_tilesize64x64x8_stage3_warpsize1x4x1", "matrix products"),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy_alignedK_contig", "copies and concatenation"),
        ("void at::native::vectorized_elementwise_kernel<8, at::native::bfloat16_copy_k", "copies and concatenation"),
        ("void at::native::(anonymous namespace)::upsample_nearest2d_nhwc_out_frame<c10", "upsampling"),
        ("void at::native::vectorized_elementwise_kernel<8, at::native::(anonymous namesp", "elementwise and sums"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::", "optimizer and averages"),
        ("something_new", "other"),
    ],
)
def test_kernels_are_sorted_by_kind(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_the_table_adds_up_and_shows_the_longest_kernels_on_request() -> None:
    found = [Kernel("conv_tma_kernel", 3.0, 100), Kernel("conv_pointer_kernel", 1.0, 2), Kernel("wgrad_kernel", 4.5, 9)]
    lines = [line.split() for line in table(found).splitlines()[1:]]
    assert lines[0] == ["convolution:", "weight", "gradient", "4.500", "52.9%", "9"]
    assert lines[1] == ["convolution", "4.000", "47.1%", "102"] and lines[2] == ["all", "8.500"]
    assert "conv_pointer_kernel" not in table(found, 1) and "conv_tma_kernel" in table(found, 1)


def test_a_dry_run_shows_the_operators_of_a_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "kernels.json"
    assert gpu_time.main(["whole", "--dry-run", "--kernels", "1", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    for kind in ("convolution", "group norm", "attention", "copies and concatenation", "optimizer and averages"):
        assert f"\n{kind}" in printed
    assert json.loads(out.read_text())["what"] == "whole"


def test_without_a_gpu_it_says_how_to_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu_time.main(["forward"]) == 2
    assert "--dry-run" in capsys.readouterr().out
