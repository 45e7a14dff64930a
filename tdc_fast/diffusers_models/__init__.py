"""Packed models where diffusers expects a model of its own, and experts that plain diffusers loads.

Needs the extra `[diffusers]`.
"""

from __future__ import annotations

from tdc_fast.diffusers_models.export import save_expert, save_two_experts
from tdc_fast.diffusers_models.model import TDCModel
from tdc_fast.diffusers_models.unets import from_diffusers, to_diffusers

__all__ = ["TDCModel", "from_diffusers", "save_expert", "save_two_experts", "to_diffusers"]
