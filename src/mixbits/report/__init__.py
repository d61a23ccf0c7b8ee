"""Report: one HTML file about one run, read from the run's JSON files only."""

from __future__ import annotations

from mixbits.report.build import build_report

__all__ = ["build_report"]
