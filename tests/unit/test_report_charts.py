"""`hybridlm report`: what it draws, and a page that needs nothing else."""

import base64
import hashlib
import re
import sys

import pytest
from report_cases import Page, blocks, chart, run
from report_files import arm, check_file, eval_file, needle, race_file, score, training_folder, write, write_all

from hybridlm.report import make_report, render, write_report
from hybridlm.report.blocks import Grid
from hybridlm.report.charts import Axis, HeatMap, LineChart, Point, Series, extent, ticks
from hybridlm.report.page import picture_names
from hybridlm.report.svg import draw

HOSTILE = "</script><script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp; ${x} $a_b$ \ud800\u202e"


# -- charts --------------------------------------------------------------------------------------------------------


def test_a_needle_map_has_a_cell_for_each_depth_and_length(everything):
    found = chart(everything, "passkey, small")
    assert (found.columns, found.rows) == (["256", "1,024*"], ["0 %", "50 %"])
    assert found.values == [[1.0, 0.25], [0.8, 0.0]]
    assert found.below == ["0.90", "at chance"]
    cells = Page(draw(found, "x")).all("g", **{"class": "spot"})
    assert [cell["text"] for cell in cells][:2] == [
        "depth 0 %, 256 tokens: 1.000 over 10 documents1.00",
        "depth 0 %, 1,024 tokens: 0.250 over 10 documents0.25",
    ]
    assert [c["class"] for c in Page(draw(found, "x")).all("rect")] == [f"cell h{n}" for n in (10, 2, 8, 0)]


def test_a_needle_that_was_not_measured_at_a_depth_leaves_its_cell_empty(tmp_path):
    data = eval_file() | {"cells": [needle(256, score(0.9), {0.0: 1.0}), needle(512, score(0.9), {0.0: 1.0, 0.5: 0.5})]}
    (found,) = [c for c in make_report([write(tmp_path / "x.json", data)]).charts if isinstance(c, HeatMap)]
    assert found.values == [[1.0, 1.0], [None, 0.5]]
    assert "no document" in draw(found, "x")


def test_bits_per_byte_are_drawn_against_length_and_position(everything):
    by_length = chart(everything, "Bits per byte against length")
    assert [(p.x, p.y, p.error) for p in by_length.series[0].points] == [(512, 1.5, 0.02), (1024, 1.75, 0.02)]
    assert by_length.marks == [("trained length", 512)]
    by_position = chart(everything, "small")
    assert [series.name for series in by_position.series] == ["window of 512", "window of 1,024"]
    assert [point.y for point in by_position.series[0].points] == pytest.approx([1.5, 1.6, 1.7])


def test_a_race_is_drawn_against_steps_state_and_length(everything):
    steps = chart(everything, "Accuracy against steps")
    assert [(p.x, p.y, p.error) for p in steps.series[0].points] == [
        (0, 0.06, None),
        (100, 0.495, 0.02),
        (200, 0.99, 0.01),
    ]
    assert steps.rules == [("chance", 0.0625)]
    state = chart(everything, "Accuracy against state bytes")
    assert [(s.name, s.points[0].x, s.points[0].y) for s in state.series] == [
        ("hybrid", 8192, 0.99),
        ("mamba2", 4096, 0.07),
    ]
    length = chart(everything, "Accuracy against length")
    assert [(p.x, p.y) for p in length.series[1].points] == [(32, 0.07), (128, 0.035)]


def test_losses_routers_and_spans_are_drawn_over_steps(everything):
    loss = chart(everything, "Loss in training")
    assert [(p.x, p.y) for p in loss.series[0].points] == [(n, 8.0 / n) for n in range(1, 6)]
    titles = [found.title for found in everything.charts]
    for start in ("Load of the busiest expert", "Entropy of the routers", "Dead experts", "Share of the tokens"):
        assert any(title.startswith(start) for title in titles), start


def test_points_lie_where_their_values_are():
    found = LineChart("t", Axis("x", low=0.0, high=10.0), Axis("y", low=0.0, high=1.0),
                      [Series("a", [Point(0, 0.0), Point(5, 0.5), Point(10, 1.0, 0.1)])])  # fmt: skip
    spots = [(float(c["cx"]), float(c["cy"])) for c in Page(draw(found, "x")).all("circle", **{"class": "hover"})]
    (left, bottom), middle, (right, top) = spots
    assert middle == pytest.approx(((left + right) / 2, (bottom + top) / 2), abs=0.01)
    assert left < right
    assert top < bottom  # places count downwards
    assert "a: y 1 ± 0.1 at x 10" in draw(found, "x")


def test_a_logarithmic_axis_has_equal_steps_for_equal_factors():
    found = LineChart("t", Axis("x", log=2), Axis("y"), [Series("a", [Point(x, 1.0) for x in (256, 512, 1024)])])
    places = [float(c["cx"]) for c in Page(draw(found, "x")).all("circle", **{"class": "hover"})]
    assert places[2] - places[1] == pytest.approx(places[1] - places[0], abs=0.02)


def test_what_has_no_place_on_a_logarithmic_axis_is_in_the_table_alone():
    found = LineChart("t", Axis("x", log=2), Axis("y"), [Series("a", [Point(0, 1.0)]), Series("b", [Point(8, 2.0)])])
    assert len(Page(draw(found, "x")).all("circle", **{"class": "hover"})) == 1
    assert [row[0] for row in found.numbers()[1]] == ["0", "8"]
    empty = LineChart("t", Axis("x", log=2), Axis("y"), [Series("a", [Point(0, 1.0)])])
    assert not Page(draw(empty, "x")).all("circle", **{"class": "hover"})


@pytest.mark.parametrize("values", [[5.0], [0.0, 0.0], [1e-9, 1e9], [-3.0, 2.0], [0.4, 0.400001]])
def test_an_axis_has_a_few_labels_inside_its_ends(values):
    axis = Axis("x", log=10 if values[0] > 0 else 0)
    low, high = extent(axis, values)
    assert low < min(values) <= max(values) < high
    places = ticks(axis, low, high, values)
    assert places == sorted(places)
    assert all(low <= place <= high for place in places)
    assert len(places) <= 20


def test_a_chart_is_told_in_words_and_its_numbers_in_a_table(everything, page):
    found = chart(everything, "Accuracy against steps")
    assert "hybrid ends at 0.99" in found.alt
    titles, rows, _ = found.numbers()
    assert titles == ["step", "hybrid", "mamba2"]
    assert rows[-1] == ["200", "0.99 ± 0.01", "0.07 ± 0.01"]
    for svg in [element for element in page.all("svg") if "aria-hidden" not in element]:
        assert svg["role"] == "img"
        ids = svg["aria-labelledby"].split()
        assert all(
            [element for element in page.found if element.get("id") == ident and element["text"]] for ident in ids
        )


def test_a_long_curve_is_thinned_in_its_table_and_says_so():
    found = LineChart("t", Axis("step"), Axis("loss"), [Series("a", [Point(x, 1.0) for x in range(1000)])])
    _, rows, left_out = found.numbers()
    assert len(rows) <= 62
    assert rows[-1][0] == "999"
    assert "of 1000 places" in left_out


# -- the page ------------------------------------------------------------------------------------------------------


def test_the_page_is_whole(page):
    assert not page.bad
    ids = [element["id"] for element in page.found if element.get("id")]
    assert len(ids) == len(set(ids))
    assert len(page.all("h1")) == 1
    assert page.all("html")[0]["lang"] == "en"
    assert page.all("a", **{"class": "skip"})[0]["href"] == "#main"


def test_the_page_needs_nothing_from_elsewhere(everything, page):
    text = render(everything, pictures=True)
    for element in Page(text).found:
        for name in ("src", "href", "action", "data", "poster", "srcset", "xlink:href"):
            value = element.get(name, "#")
            assert value.startswith("#") or re.fullmatch(r"[a-z0-9-]+\.png", value), (element["tag"], value)
        assert element["tag"] not in {"link", "img", "iframe", "object", "base", "form"}
        assert "style" not in element, "the policy forbids style attributes"
        assert not [name for name in element if name.startswith("on")]
    assert "url(" not in text
    assert "@import" not in text
    assert "://" not in re.sub(r"[a-z]+ [^<>]*://", "", page.all("style")[0]["text"] + page.all("script")[0]["text"])


def test_the_policy_allows_the_pages_own_style_and_script_and_nothing_else(page):
    (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy["content"].startswith("default-src 'none'")
    for kind in ("style", "script"):
        (element,) = page.all(kind)
        digest = base64.b64encode(hashlib.sha256(element["text"].encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy["content"]
    assert "unsafe" not in policy["content"]


def test_tables_carry_what_they_are_sorted_by(page):
    (score_cell,) = [e for e in page.all("td") if e["text"] == "at chance (0.125 ± 0.050)" and e.get("data-sort")][:1]
    assert score_cell["data-sort"] == "0.125"
    assert "dim" in score_cell["class"]
    (length,) = [e for e in page.all("td") if e["text"] == "1,024*"][:1]
    assert length["data-sort"] == "1024"
    heads = [e for e in page.all("th", scope="col")]
    assert {e.get("class") for e in heads if e["text"] == "chance"} == {"number"}
    assert all("data-sort" not in e for e in page.all("td") if e["text"] == "–")


def test_hostile_strings_are_shown_and_not_run(tmp_path):
    folder = tmp_path / "hostile"
    write(folder / "e.json", eval_file(HOSTILE) | {"date": HOSTILE, "versions": {HOSTILE: HOSTILE}})
    data = race_file(**{HOSTILE: arm(0.9, 64) | {"about": HOSTILE}}) | {"title": HOSTILE, "summary": [HOSTILE]}
    data["ordering"] = {"claim": HOSTILE, "shows": False, "why": HOSTILE}
    write(folder / "race.json", data | {"recipe": {HOSTILE: HOSTILE}})
    training_folder(folder / "train", HOSTILE)
    write(folder / "check.json", check_file(HOSTILE, HOSTILE))
    path, pictures = write_report(make_report([folder]), tmp_path / "out", HOSTILE)
    page = Page(path.read_text(encoding="utf-8"))
    assert not page.bad
    assert len(page.all("script")) == len(page.all("style")) == 1
    assert not page.all("img")
    assert not [name for element in page.found for name in element if name.startswith("on")]
    shown = HOSTILE.replace("\ud800", "?")
    assert page.all("h1")[0]["text"] == shown
    assert sum(shown in element["text"] for element in page.all("th")) > 5
    assert all(re.fullmatch(r"[a-z0-9-]+\.png", picture.name) for picture in pictures)


def test_pictures_have_names_of_their_own():
    axes = Axis("x"), Axis("y")
    names = picture_names([LineChart(title, *axes, []) for title in ("../A b", "a/b", "äöü", "")])
    assert names == ["a-b.png", "a-b-2.png", "chart.png", "chart-2.png"]


def test_the_command_writes_the_page_and_a_picture_of_every_chart(tmp_path):
    pytest.importorskip("matplotlib")
    result = run(write_all(tmp_path / "in"), "--out", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert "read 5 files: 1 check, 2 eval, 1 race, 1 training" in result.stdout
    assert "left out, since they hold no results: in/train/data.json" in result.stdout
    pictures = sorted(tmp_path.glob("out/*.png"))
    assert f"report.html and {len(pictures)} pictures" in " ".join(result.stdout.split())
    links = {e["href"] for e in Page((tmp_path / "out" / "report.html").read_text()).all("a")}
    assert {picture.name for picture in pictures} == {link for link in links if not link.startswith("#")}
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)


def test_without_matplotlib_the_page_is_whole_and_the_pictures_are_said_to_be_left_out(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [name for name in sys.modules if name.startswith("matplotlib.") or name == "hybridlm.report.png"]:
        monkeypatch.delitem(sys.modules, name)
    result = run(write_all(tmp_path / "in"), "--out", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert "pictures are left out: pip install 'hybridlm[plot]'" in result.stdout
    assert not list(tmp_path.glob("out/*.png"))
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert len([e for e in page.all("svg") if e.get("role") == "img"]) > 10
    assert all(e["href"].startswith("#") for e in page.all("a"))


def test_small_charts_stand_together_under_a_heading(everything, page):
    titles = {grid.title for grid in blocks(everything, Grid)}
    assert titles <= {element["text"] for element in page.all("h3")}
