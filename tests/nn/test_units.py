"""Units say which rows of which leaf belong to which atoms."""

from __future__ import annotations

import pytest
import torch

from tdc_fast.models.iddpm import UNet
from tdc_fast.nn.units import PruningUnit, UnitSlice, width_step


@pytest.mark.parametrize(
    ("channels", "atom", "step"),
    [(32, 1, 8), (64, 2, 8), (96, 3, 24), (128, 4, 8), (48, 2, 8), (16, 1, 8), (8, 1, 1), (12, 1, 1), (640, 20, 40)],
)
def test_widths_step_by_8_channels_where_whole_norm_groups_allow(channels, atom, step):
    assert width_step(channels, atom) == step


def test_rows_follow_the_order_in_every_copy():
    part = UnitSlice("leaf", "out", copies=2, scale=3)
    unit = PruningUnit("u", "attention", channels=6, atom=2, step=2, slices=(part,))
    assert unit.widths() == (0, 2, 4, 6)
    first, second = unit.kept_rows((2, 0, 1), 4, part)
    assert first.tolist() == [12, 13, 14, 15, 16, 17, 0, 1, 2, 3, 4, 5]
    assert torch.equal(second, first + 18)
    assert not unit.kept_rows((2, 0, 1), 0, part)[0].numel()


def test_a_unets_units_cover_inner_widths_and_heads():
    model = UNet(8, 1, 32, 1, 1, (2,), channel_mult=(1, 2), num_heads=4, use_scale_shift_norm=True)
    units = {unit.name: unit for unit in model.pruning_units()}
    assert sum(unit.kind == "attention" for unit in units.values()) == 1 + 1 + 2  # down, middle, up
    block = units["input_blocks.3.0"]
    assert (block.channels, block.atom, block.step) == (64, 2, 8)
    assert UnitSlice("input_blocks.3.0.emb_layers.1", "out", copies=2) in block.slices
    heads = units["middle_block.1"]
    assert (heads.channels, heads.atom, heads.step, heads.num_atoms) == (64, 16, 16, 4)
    for unit in units.values():
        for part in unit.slices:
            axis = model.get_submodule(part.module).weight.shape[0 if part.dim == "out" else 1]
            assert axis == unit.channels * part.scale * part.copies
