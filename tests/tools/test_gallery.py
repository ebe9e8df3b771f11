"""Pictures of patterns."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ET
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch

from saccade.catalog import get

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="module")
def gallery() -> ModuleType:
    spec = spec_from_file_location("gallery", TOOLS / "gallery.py")
    module = module_from_spec(spec)
    sys.modules["gallery"] = module
    spec.loader.exec_module(module)
    return module


def test_rectangles_cover_what_is_true_once(gallery):
    mask = torch.rand(23, 31, generator=torch.Generator().manual_seed(0)) < 0.5
    seen = torch.zeros(23, 31, dtype=torch.int)
    for x, y, width, height in gallery.rectangles(mask):
        seen[y : y + height, x : x + width] += 1
    assert torch.equal(seen, mask.int())
    assert len(list(gallery.rectangles(torch.ones(4, 4, dtype=torch.bool)))) == 1


def test_every_selector_has_a_picture_and_all_are_small(gallery):
    assert gallery.is_current()
    files = list(gallery.FOLDER.glob("*.svg"))
    assert sum(path.stat().st_size for path in files) < 1_500_000
    assert all(ET.parse(path).getroot().tag.endswith("svg") for path in files)


def test_a_static_picture_is_drawn_bit_for_bit(gallery):
    for name in ("sink_window", "swin"):
        card = get(name)
        assert gallery.picture(card) == (gallery.FOLDER / f"{name}.svg").read_text(encoding="utf-8")


def test_links_lead_somewhere(gallery):
    shown = gallery.PAGE.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", shown):
        assert (gallery.PAGE.parent / target).exists(), target
    table = (gallery.PAGE.parent / "mechanisms.md").read_text(encoding="utf-8")
    for name in re.findall(r"\(gallery\.md#(\w+)\)", table):
        assert f"### {name}\n" in shown
