"""Tuning: find what each layer of a model can bear, prove it on held-out text, write a recipe and a report."""

from saccade.tune.plan import Plan, Settings
from saccade.tune.progress import Progress
from saccade.tune.run import TuneResult, plan_tuning, tune

__all__ = ["Plan", "Progress", "Settings", "TuneResult", "plan_tuning", "tune"]
