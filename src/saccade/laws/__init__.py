"""The laws: what every registered mechanism must keep, run by pytest and by `saccade verify`."""

from saccade.laws.suite import LAWS, Law, Verdict, run_law, verify

__all__ = ["LAWS", "Law", "Verdict", "run_law", "verify"]
