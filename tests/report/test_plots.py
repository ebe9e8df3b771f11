import base64
import io
import re

import numpy as np
import pytest

from saccade.report import plots
from saccade.report.page import mechanisms

BOX = re.compile(r"M([\d.]+) ([\d.]+)h([\d.]+)v([\d.]+)h-[\d.]+z")


def boxes(path):
    return [tuple(map(float, found)) for found in BOX.findall(path)]


def png(address):
    from matplotlib.image import imread

    head, data = address.split(",")
    assert head == "data:image/png;base64"
    return imread(io.BytesIO(base64.b64decode(data)), format="png")


@pytest.mark.parametrize("wide", [True, False])
def test_layer_map_has_each_head_once_and_fits(report, wide):
    drawn = plots.layer_map(report["layers"], mechanisms(report), 9, wide=wide)
    backs = [box for group in drawn["groups"] for box in boxes(group["back"])]
    assert len({box[:2] for box in backs}) == len(backs) == 270
    assert drawn["width"] <= (plots.WIDE if wide else plots.NARROW)
    assert max(x + width for x, _, width, _ in backs) <= drawn["width"]
    assert max(y + height for _, y, _, height in backs) <= drawn["height"]


def test_layer_map_fills_by_density():
    layers = [{"choices": [
        {"heads": [0], "mechanism": "dense", "label": "dense", "density": 1.0},
        {"heads": [1, 2], "mechanism": "moba", "label": "moba(topk=8)", "density": 0.25},
    ]}]  # fmt: skip
    drawn = plots.layer_map(layers, ["dense", "moba"], 3, wide=True)
    full, quarter = drawn["groups"]
    assert boxes(full["fill"]) == boxes(full["back"])
    for (_, y, _, height), (_, top, _, part) in zip(boxes(quarter["back"]), boxes(quarter["fill"]), strict=True):
        assert part == pytest.approx(height / 4, abs=0.1)
        assert top + part == pytest.approx(y + height, abs=0.2)
    assert quarter["title"] == "layer 0, heads 1–2: moba(topk=8), density 25.0%"
    assert [full["series"], quarter["series"]] == [0, 1]


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (32, 32), (80, 64), (126, 128)])
def test_layer_map_of_any_model(layers, heads):
    rows = [{"choices": [{"heads": list(range(heads)), "mechanism": "dense", "label": "dense", "density": 1.0}]}]
    drawn = plots.layer_map(rows * layers, ["dense"], heads, wide=False)
    assert drawn["width"] <= plots.NARROW
    across = [tick["x"] for tick in drawn["ticks"] if tick["anchor"] == "middle"]
    assert all(right - left >= 20 for left, right in zip(across, across[1:], strict=False))


@pytest.mark.parametrize(("numbers", "text"), [
    ([], ""), ([3], "3"), ([0, 1, 2, 3, 5], "0–3 5"), ([7, 2, 3], "2–3 7"), ([1, 3, 5], "1 3 5"),
])  # fmt: skip
def test_runs(numbers, text):
    assert plots.runs(numbers) == text


def test_series_share_no_grey_with_dense():
    assert plots.series(0) == 0
    assert [plots.series(n) for n in (1, 11, 12, 23)] == [1, 11, 1, 1]


@pytest.mark.parametrize("wide", [True, False])
def test_frontier(report, wide):
    text = plots.frontier(report, mechanisms(report), wide=wide)
    name = "wide" if wide else "narrow"
    assert text.startswith('<svg role="img" aria-label="quality against speed')
    assert not re.search(r"#0[a147]0[b258]", text)
    assert text.count("<title>") == len(report["candidates"])
    assert all(found.startswith(f"frontier-{name}-") for found in re.findall(r' id="([^"]*)"', text))
    assert f"<title>{report['candidates'][0]['label']}: " in text
    for label in ("measured: in the recipe", "measured: held, but slower", "measured: did not hold", "xattention"):
        assert f">{label}</text>" in text


def test_frontier_of_nothing(dense_report):
    dense_report["candidates"] = []
    text = plots.frontier(dense_report, ["dense"], wide=True)
    assert "measured" not in text
    assert "time of dense attention" in text


def test_frontier_escapes(report):
    report["candidates"][0] |= {"label": "<b>&", "mechanism": "$x^2$ <i>"}
    text = plots.frontier(report, mechanisms(report), wide=True)
    assert "<title>&lt;b&gt;&amp;: " in text
    assert ">$x^2$ &lt;i&gt;</text>" in text


def test_damage_floor(report):
    floor = plots.damage_floor(report)
    smallest = min(row["damage"] for row in report["search"]["frontier"] if row["damage"] > 0)
    assert 0 < floor < smallest
    largest = max(row["damage"] for row in report["candidates"])
    assert floor >= 1e-6 * largest


def test_damage_floor_without_mixtures(dense_report):
    largest = max(row["damage"] for row in dense_report["candidates"])
    assert plots.damage_floor(dense_report) == pytest.approx(1e-4 * largest)


def test_attention_picture():
    colours = png(plots.attention_picture([[0.0, -6.0], [-6.0, -3.0]]))
    assert colours.shape == (2, 2, 4)
    assert colours[0, 1, 3] == 0
    np.testing.assert_allclose(colours[[0, 1, 1], [0, 0, 1], 3], 1)
    np.testing.assert_allclose(colours[0, 0, :3], (0.993, 0.906, 0.144), atol=0.01)
    np.testing.assert_allclose(colours[1, 0, :3], (0.267, 0.005, 0.329), atol=0.01)
    np.testing.assert_allclose(colours[1, 1, :3], (0.128, 0.567, 0.551), atol=0.01)


def test_pattern_picture():
    colours = png(plots.pattern_picture([[1.0, 1.0], [0.0, 0.5]]))
    assert colours[0, 1, 3] == 0
    np.testing.assert_allclose(colours[0, 0], (0.22, 0.5, 0.8, 1.0), atol=0.01)
    np.testing.assert_allclose(colours[1, 0], (0.5, 0.5, 0.5, 0.22), atol=0.01)
    np.testing.assert_allclose(colours[1, 1], (0.36, 0.5, 0.65, 0.61), atol=0.01)


def test_pattern_smaller_than_the_attention_keeps_its_diagonal():
    colours = png(plots.pattern_picture([[1.0] * 4] * 2))
    np.testing.assert_allclose(colours[..., 3] > 0, [[True, True, False, False], [True] * 4])
