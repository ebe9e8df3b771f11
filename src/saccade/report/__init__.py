"""Reports: a self-contained HTML page and its plots, from the report's JSON."""

from saccade.report.page import render, require_packages, write_report

__all__ = ["render", "require_packages", "write_report"]
