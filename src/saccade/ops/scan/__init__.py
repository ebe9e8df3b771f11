"""See `api`."""

from saccade.ops.scan.api import ScanState, diagonal_scan, linear_mix, scan

__all__ = ["ScanState", "diagonal_scan", "linear_mix", "scan"]
