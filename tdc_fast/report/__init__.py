"""The report of a comparison: its numbers as JSON, and one self-contained HTML page."""

from __future__ import annotations

from tdc_fast.report.html import render_report, write_report
from tdc_fast.report.numbers import Comparison, ModelResult

__all__ = ["Comparison", "ModelResult", "render_report", "write_report"]
