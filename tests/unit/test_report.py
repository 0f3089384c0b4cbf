"""`hybridlm report`: what its tables say, and which files it reads and refuses."""

import hashlib
import json
from pathlib import Path

import pytest
from report_cases import blocks, chart, run, table
from report_files import (
    DATE,
    accuracy,
    arm,
    eval_file,
    needle,
    race_file,
    score,
    training_folder,
    write,
    write_all,
)

from hybridlm.report import make_report, render
from hybridlm.report.blocks import Score, Table, read_score
from hybridlm.report.node import Node

ROOT = Path(__file__).resolve().parents[2]


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
