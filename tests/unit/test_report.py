"""`hybridlm report`: what stands on the page, and that it needs nothing else."""

import base64
import hashlib
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_files import (
    DATE,
    accuracy,
    arm,
    check_file,
    eval_file,
    needle,
    race_file,
    score,
    training_folder,
    write,
    write_all,
)
from typer.testing import CliRunner

from hybridlm.cli import app
from hybridlm.report import make_report, render, write_report
from hybridlm.report.blocks import Grid, Score, Table, read_score
from hybridlm.report.charts import Axis, HeatMap, LineChart, Point, Series, extent, ticks
from hybridlm.report.node import Node
from hybridlm.report.page import picture_names
from hybridlm.report.svg import draw

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = "</script><script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp; ${x} $a_b$ \ud800\u202e"
VOID = {"meta", "link", "img", "br", "input", "base"}


class Page(HTMLParser):
    """Elements with their attributes and text, and whether all of them are closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.found, self.bad = [], [], []
        self.feed(text)
        self.bad += self.open

    def handle_starttag(self, tag, attrs):
        self.found.append({"tag": tag, "text": "", **dict(attrs)})
        if tag not in VOID:
            self.open.append((tag, len(self.found) - 1))

    def handle_startendtag(self, tag, attrs):
        self.found.append({"tag": tag, "text": "", **dict(attrs)})

    def handle_endtag(self, tag):
        if not self.open or self.open.pop()[0] != tag:
            self.bad.append(tag)

    def handle_data(self, data):
        for _, index in self.open:
            self.found[index]["text"] += data

    def all(self, tag, **attributes):
        return [e for e in self.found if e["tag"] == tag and attributes.items() <= e.items()]


def run(*arguments):
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    return make_report([write_all(tmp_path_factory.mktemp("results"))])


@pytest.fixture(scope="module")
def page(everything):
    return Page(render(everything))


def blocks(report, kind):
    found = [block for section in report.sections for block in section.blocks]
    return [block for block in found if isinstance(block, kind)]


def table(report, caption):
    (found,) = [block for block in blocks(report, Table) if block.caption == caption]
    return [[cell.text for cell in row] for row in found.rows]


def chart(report, title):
    (found,) = [found for found in report.charts if found.title == title]
    return found


# -- tables --------------------------------------------------------------------------------------------------------


def test_models_stand_side_by_side_with_standard_errors_chance_and_gold(everything):
    (found,) = [block for block in blocks(everything, Table) if block.caption == "Scores by likelihood"]
    assert found.titles == ["task", "length", "documents", "chance", "gold", "small", "other"]
    rows = table(everything, "Scores by likelihood")
    assert rows[0] == ["passkey", "256", "20", "0.1", "100 %", "0.900 ± 0.030", "0.700 ± 0.030"]
    assert table(everything, "Bits per byte by window")[0][4:] == ["1.500 ± 0.020", "1.700 ± 0.020"]


def test_tasks_above_chance_are_counted_by_suite_and_length(everything):
    assert table(everything, "Tasks above chance") == [
        ["Recall", "256", "1 of 1", "1 of 1"],
        ["Recall", "1,024", "0 of 1", "0 of 1"],
    ]


def test_a_chance_that_is_next_to_nothing_is_told_so(tmp_path):
    data = eval_file() | {"cells": [needle(256, score(0.9, chance=1e-51), {})]}
    row = table(make_report([write(tmp_path / "x.json", data)]), "Scores by likelihood")[0]
    assert row[3] == "< 0.0001"


def test_a_score_at_chance_says_so(everything):
    row = table(everything, "Scores by likelihood")[1]
    assert row[:2] == ["passkey", "1,024*"]
    assert row[5] == "at chance (0.125 ± 0.050)"


@pytest.mark.parametrize(
    ("found", "above"),
    [
        (score(0.20, 0.03, 0.1), True),
        (score(0.18, 0.03, 0.1), False),
        (score(0.18, 0.03, 0.1, above=True), False),  # its own figures say otherwise
        (score(0.90, 0.03, 0.1, above=False), False),  # the file knows more than its rounded figures
        (score(0.90, None, 0.1), False),  # one document
        (score(0.0, 0.0, 0.0, above=True), False),
    ],
)
def test_only_three_standard_errors_above_chance_are_above(found, above):
    read = read_score(Node("f", "", found))
    assert read.above == above
    assert read.text.startswith("at chance") != above


def test_bits_per_byte_are_above_chance_when_they_are_fewer():
    assert read_score(Node("f", "", score(2.0, 0.1, 8.0)), fewer=True).above
    assert not read_score(Node("f", "", score(7.9, 0.1, 8.0)), fewer=True).above
    assert not read_score(Node("f", "", score(9.0, 0.1, 8.0)), fewer=True).above


def test_files_of_one_model_with_the_same_settings_are_one_column(tmp_path):
    whole = eval_file()
    first, second = whole | {"cells": whole["cells"][:1]}, whole | {"cells": whole["cells"][1:]}
    second = second | {"settings": whole["settings"] | {"suite": "length", "lengths": None}}
    paths = [write(tmp_path / name / "x.json", data) for name, data in (("a", first), ("b", second))]
    (found,) = [b for b in blocks(make_report(paths), Table) if b.caption == "Scores by likelihood"]
    assert found.titles[5:] == ["small"]
    assert found.sources == [1, 2]


def test_models_of_one_name_are_told_apart_by_hash_and_runs_of_one_model_by_seed(tmp_path):
    files = [eval_file(), eval_file(digest="d" * 64), eval_file(seed=1)]
    paths = [write(tmp_path / f"{number}.json", data) for number, data in enumerate(files)]
    (found,) = [b for b in blocks(make_report(paths), Table) if b.caption == "Scores by likelihood"]
    names = found.titles[5:]
    assert len(set(names)) == 3
    assert names[1] == "small (dddddddd)"
    assert "seed 1" in names[2]


def test_a_race_tells_its_ordering_steps_and_recipe(everything, page):
    (row,) = [row for row in table(everything, "Arms and accuracy") if row[0] == "mamba2"]
    assert row[2:6] == ["5,000", "4,096", "10,000", "3"]
    assert row[6:] == ["at chance (0.035 ± 0.020)", "at chance (0.070 ± 0.010)", "160, –, 170"]
    text = page.all("main")[0]["text"]
    assert "The expected ordering shows: hybrid beats mamba2 hybrid has 0.99" in text
    assert "speed of learning under this recipe, not capacity" in text
    assert '"learning_rate": 0.004' in text
    assert "A sentence of the race." in text


def test_a_race_without_a_verdict_has_none_in_the_report(tmp_path):
    ordering = {"claim": "hybrid beats mamba2", "shows": None, "why": "a quick run"}
    data = race_file(alone=arm(0.9, 100)) | {"ordering": ordering}
    text = render(make_report([write(tmp_path / "race.json", data)]))
    assert "No verdict on the expected ordering, a quick run: hybrid beats mamba2" in text
    assert "ordering shows" not in text
    assert "ordering does not show" not in text
    for wrong in ({"claim": "no verdict key", "why": "?"}, 3):
        with pytest.raises(ValueError, match="race.json: ordering: (.shows. is missing|is no object)"):
            make_report([write(tmp_path / "race.json", data | {"ordering": wrong})])


def test_a_race_with_one_seed_has_no_standard_error_and_one_without_ordering_none(tmp_path):
    single = arm(0.9, 100) | {"at": {"200": accuracy(0.9, None, True)}, "lengths": {}, "steps_to": None, "curve": []}
    data = race_file(alone=single) | {"ordering": None, "summary": [], "matched": None}
    report = make_report([write(tmp_path / "race.json", data)])
    assert table(report, "Arms and accuracy")[0][6] == "0.900"
    assert "makes no claim" in render(report)


def test_training_tells_held_out_text_and_the_last_state_of_routers_and_spans(everything):
    assert ["small", "128", "3.2500", "3", "999"] in table(everything, "Held-out bits per byte")
    rows = table(everything, "At the end of training")
    assert ["small", "layer 1", "1.500", "0.750", "1", *"–––––"] in rows
    assert ["small", "mixture of depths, layer 2", *"–––", "0.250", "0.300", *"–––"] in rows


def test_a_run_that_has_not_ended_is_read_up_to_its_last_whole_line(tmp_path):
    folder = training_folder(tmp_path / "running")
    (folder / "results.json").unlink()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    assert [point.x for point in chart(make_report([folder]), "Loss in training").series[0].points] == [1, 2, 3, 4, 5]


def test_checks_tell_what_is_not_ok_and_why(everything):
    verdicts = {row[0]: row[2] for row in table(everything, "Verdicts")}
    assert verdicts == {"chunks": "ok", "packed": "differs (2.5e-01)", "beams": "raises (infinite)", "rows": "–"}
    assert ["small", "packed", "differs", "2.5e-01", "cannot"] in table(everything, "What is not ok")


def test_the_comparisons_of_this_repository_can_be_read():
    report = make_report([ROOT / "eval" / "results" / "isoflop.json"])
    stored = json.loads((ROOT / "eval" / "results" / "isoflop.json").read_text())["arms"]["plain"]["equal_flops"]
    assert table(report, "Arms")[0][4] == f"{stored['mean']:.3f} ± {stored['standard_error']:.3f}"
    assert len(chart(report, "Held-out bits per byte against FLOPs").series) == 8


def test_every_file_is_named_with_its_hash_versions_and_date(everything, page, tmp_path):
    rows = {row[1]: row for row in table(everything, "Files")}
    assert len(rows) == len(everything.sources) == 5
    for source in everything.sources:
        row = rows[source.name]
        assert not Path(source.name).is_absolute()
        assert source.digest in row[5]
        assert row[3] == DATE or row[3].startswith("file written 20")
        assert "torch 2.13.0" in row[4]
    path = write(tmp_path / "x.json", eval_file())
    (source,) = make_report([path]).sources
    assert source.digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_every_table_and_chart_refers_to_a_file_that_is_listed(everything, page):
    ids = {element["id"] for element in page.found if element.get("id")}
    for block in [*everything.charts, *blocks(everything, Table)]:
        if getattr(block, "caption", "") != "Files":
            assert block.sources, block
    targets = [element["href"] for element in page.all("a")]
    assert {target[1:] for target in targets if target.startswith("#")} <= ids
    assert "#source-1" in targets


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


# -- mistakes of the user ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.json", "{broken", "x.json: not JSON: Expecting property name"),
        ("x.json", "\x00\xff", "x.json: not JSON"),
        ("x.json", '{"kind": "poem"}', "x.json: kind: unknown 'poem', expected one of ['eval', 'race'"),
        ("x.json", "[]", "x.json: kind: there is none, expected one of"),
        ("x.json", '{"kind": "eval"}', "x.json: 'model' is missing"),
        ("x.json", '{"kind": "race", "name": "a", "chance": "high"}', "x.json: chance: 'high' is no finite number"),
        ("x.json", '{"kind": "race", "name": "a", "chance": NaN}', "x.json: chance: nan is no finite number"),
        ("x.json", '{"kind": "race", "name": "a", "chance": 0.5, "arms": {}}', "x.json: arms: there is none"),
        ("x.json", '{"kind": "race", "name": "a", "chance": 0.5, "arms": [1]}', "x.json: arms: is no object"),
        ("x.json", '{"kind": "race", "name": "a", "chance": 1' + "0" * 400 + "}", "is no finite number"),
        (
            "x.json",
            json.dumps(race_file() | {"arms": {"a": arm(0.5, 9) | {"lengths": {"long": accuracy(0.5, 0.1, True)}}}}),
            "x.json: arms.a.lengths: 'long' is no number",
        ),
        ("x.json", '{"kind": "check", "models": {}}', "x.json: models: is no list"),
        ("metrics.jsonl", '{"step"\n{}', "metrics.jsonl: line 1: not JSON"),
        ("metrics.jsonl", '{"step": 1, "loss": "low"}', "metrics.jsonl: line 1.loss: 'low' is no finite number"),
    ],
)
def test_a_broken_file_is_one_line_that_names_it_and_says_why(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text, encoding="latin-1")
    result = run(path, "--out", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out" / "report.html").exists()


def test_a_value_of_the_wrong_type_is_named_with_its_place(tmp_path):
    data = eval_file()
    data["cells"][0]["likelihood"]["score"] = "high"
    result = run(write(tmp_path / "x.json", data), "--out", tmp_path / "out")
    assert "x.json: cells[0].likelihood.score: 'high' is no finite number" in result.stderr


def test_nothing_to_report_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "model" / "config.json", {})
    write(tmp_path / "model" / "metrics.json", {})
    for folder in ("empty", "model"):
        result = run(tmp_path / folder, "--out", tmp_path / "out")
        assert result.exit_code == 2
        assert "there are no results to report; expected files of kind eval, race" in result.stderr
    assert "nowhere: no such file or folder" in run(tmp_path / "nowhere", "--out", tmp_path / "out").stderr


def test_broken_json_in_a_folder_is_not_passed_over(tmp_path):
    write_all(tmp_path / "in")
    (tmp_path / "in" / "eval" / "half.json").write_text('{"kind": "eval", ')
    result = run(tmp_path / "in", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "in/eval/half.json: not JSON" in result.stderr


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "file").write_text("kept")
    result = run(write(tmp_path / "x.json", eval_file()), "--out", tmp_path / "file")
    assert result.exit_code == 2
    assert "is no folder that can be written to" in result.stderr
    assert (tmp_path / "file").read_text() == "kept"


def test_files_of_a_model_are_not_looked_at_but_results_below_it_are(tmp_path):
    model = tmp_path / "model"
    write(model / "config.json", {})
    (model / "tokenizer.json").write_text("{broken")
    write(model / "scores" / "all.json", eval_file())
    assert [source.name for source in make_report([model]).sources] == ["model/scores/all.json"]


def test_the_copy_of_a_training_run_in_its_models_folder_is_no_second_run(tmp_path):
    folder = training_folder(tmp_path / "run")
    results = json.loads((folder / "results.json").read_text())
    write(folder / "model" / "config.json", {})
    write(folder / "model" / "results" / "training.json", results | {"kind": "training"})
    (source,) = make_report([folder]).sources
    assert (source.name, source.number, len(source.records)) == ("run/results.json", 1, 5)
    training_folder(tmp_path / "other", steps=4)
    assert len(make_report([folder, tmp_path / "other"]).sources) == 2


def test_a_training_record_that_says_something_else_is_no_copy(tmp_path):
    folder = training_folder(tmp_path / "run")
    results = json.loads((folder / "results.json").read_text())
    results["heldout"][0]["bits_per_byte"] = 1.0
    write(folder / "model" / "results" / "training.json", results)
    assert len(make_report([folder]).sources) == 2


def copied(folder):
    """A run, its scores, and their copies in the model's folder, as `hybridlm card` leaves them."""
    training_folder(folder)
    scores = write(folder / "eval" / "all.json", eval_file())
    copy = folder / "model" / "results" / "all.json"
    copy.parent.mkdir(parents=True)
    copy.write_bytes(scores.read_bytes())
    record = json.loads((folder / "results.json").read_text()) | {"kind": "training"}
    return folder, write(copy.with_name("training.json"), record)


def test_files_of_equal_content_count_once_and_the_others_are_named_behind_the_first(tmp_path):
    folder, record = copied(tmp_path / "run")
    report = make_report([folder])
    files = {row[0]: (row[1], row[5]) for row in table(report, "Files")}
    assert files["[1]"] == ("run/eval/all.json; copy: run/model/results/all.json", report.sources[0].digest)
    name, digests = files["[2]"]
    assert name == "run/results.json; copy: run/model/results/training.json"
    assert digests.startswith(f"{report.sources[1].digest}; its metrics.jsonl ")
    assert digests.endswith(f"; run/model/results/training.json {hashlib.sha256(record.read_bytes()).hexdigest()}")
    assert list(files) == ["[1]", "[2]"]
    (first, *_) = make_report([write(tmp_path / f"{name}/all.json", eval_file()) for name in "abc"]).sources
    assert [name for name, _ in first.copies] == ["all.json", "all.json"]
    assert [list(block.sources) for block in blocks(report, Table) if block.caption.startswith("Models")] == [[1]]
    said = run(folder, "--out", tmp_path / "out").output
    assert "read 2 files: 1 eval, 1 training; left out as copies: 2" in said


def test_the_record_with_losses_stands_first_whatever_the_order(tmp_path):
    folder, record = copied(tmp_path / "run")
    (source,) = make_report([record, folder / "results.json"]).sources
    assert (source.name, source.number, len(source.records)) == ("results.json", 1, 5)
    assert [name for name, _ in source.copies] == ["training.json"]


def test_a_file_named_twice_is_read_once(tmp_path):
    path = write(tmp_path / "x.json", eval_file())
    assert len(make_report([path, tmp_path, path]).sources) == 1


def test_a_score_has_as_many_digits_as_it_can_bear():
    assert Score(0.5, 0.01, 0.1, True).text == "0.500 ± 0.010"
    assert Score(0.5, None, 0.1, True).text == "0.500"
    assert Score(0.5, None, 0.6, False).text == "at chance (0.500)"


def test_small_charts_stand_together_under_a_heading(everything, page):
    titles = {grid.title for grid in blocks(everything, Grid)}
    assert titles <= {element["text"] for element in page.all("h3")}
