"""How long a model's layers take on a device at each width: measured (a table), or estimated (a roofline)."""

from __future__ import annotations

from tdc_fast.pruning.latency.costs import unit_latencies
from tdc_fast.pruning.latency.layers import LatencyModel, Layer
from tdc_fast.pruning.latency.roofline import Roofline
from tdc_fast.pruning.latency.table import LatencyTable, Setting

__all__ = ["LatencyModel", "LatencyTable", "Layer", "Roofline", "Setting", "unit_latencies"]
