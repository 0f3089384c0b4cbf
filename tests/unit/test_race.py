"""Races: what a file may say, what is made equal, how arms begin and learn, and how results are read."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import yaml

from hybridlm.evaluation import runs as evaluation_runs
from hybridlm.evaluation.symbols import token_rows
from hybridlm.race import load_race, race_names, report, train
from hybridlm.race.arms import build_model, check_rows, enter
from hybridlm.race.race import check_free
from hybridlm.typed import convert, read_yaml

CONTENT = {
    "title": "a small race",
    "task": {
        "name": "mqar",
        "length": 16,
        "options": {"tokens_per_pair": 4, "num_keys": 8, "num_values": 8, "gap_power": 1.0, "show_answers": True},
    },
    "model": {"vocab_size": 16, "hidden_size": 16, "channel_mixer": {"name": "swiglu", "intermediate_size": 24}},
    "parts": {
        "A": {"name": "attention", "num_heads": 2, "position": {"name": "none"}},
        "M": {"name": "mamba2", "state_size": 8, "head_dim": 8},
        "none": {"mixer": None, "channel_mixer": {"name": "mlp", "intermediate_size": 24}},
    },
    "arms": {"attention": {"layers": "AA"}, "hybrid": {"layers": ["M", "A"]}, "mamba2": {"layers": "(M)x2"}},
    "training": {"steps": 20, "learning_rate": 0.01, "warmup_steps": 5, "batch_size": 4},
    "reading": {"steps": [10], "lengths": [32], "every": 5, "rows": 8},
    "ordering": {"claim": "Hybrids win.", "demands": [{"arm": "hybrid", "step": 10, "above": "mamba2"}]},
}


def written(tmp_path, **changes):
    """The path of a race file; keys of `changes` are paths with `__`, and `...` takes a key away."""
    content = copy.deepcopy(CONTENT)
    for path, value in changes.items():
        *parents, last = path.split("__")
        inside = content
        for parent in parents:
            inside = inside.setdefault(parent, {})
        if value is ...:
            del inside[last]
        else:
            inside[last] = value
    target = tmp_path / "race.yaml"
    target.write_text(yaml.safe_dump(content))
    return target


# -- the file ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 3}, "seed: unknown key, did you mean 'seeds'"),
        ({"title": ...}, "title: missing"),
        ({"task__length": "32"}, "task.length: expected int, got '32'"),
        ({"task__name": "mqr"}, "task.name: unknown 'mqr', did you mean 'mqar'"),
        ({"seeds": 0}, "seeds: 0, expected at least 1"),
        ({"task__rows": 0}, "task.rows: 0, expected at least 1"),
        ({"training__steps": 0}, "training.steps: 0, expected 1 to"),
        ({"training__warmup_steps": 21}, "training.warmup_steps: 21, expected 0 to steps=20"),
        ({"seeds": 1001}, "seeds: 1001, expected at most 1000"),
        ({"training__learning_rate": float("nan")}, "training.learning_rate: nan, expected a finite number"),
        ({"training__weight_decay": float("inf")}, "training.weight_decay: inf, expected a finite number"),
        ({"training__learning_rate": 0}, "training.learning_rate: 0.0, expected above 0"),
        ({"training__schedule": "linear"}, "training.schedule: unknown 'linear', expected one of"),
        ({"model__linear_init": "normal"}, "model.linear_init: unknown 'normal', expected one of"),
        ({"reading__steps": [21]}, "reading.steps: 21, expected 1 to training.steps=20"),
        ({"reading__steps": ["x"]}, r"reading.steps: expected list\[int\], got \['x'\]"),
        ({"reading__threshold": 1.5}, "reading.threshold: 1.5, expected 0 to 1"),
        ({"arms": {}}, "arms: empty"),
        ({"arms__a/b": {"layers": "AA"}}, "arms.a/b: expected letters"),
        ({"arms__hybrid__layers": []}, "arms.hybrid.layers: empty"),
        ({"arms__hybrid__layers": ["M", "B"]}, "arms.hybrid.layers: unknown part 'B'"),
        ({"arms__hybrid__layer": "MA"}, "arms.hybrid.layer: unknown key, did you mean 'layers'"),
        ({"parts__A": {"num_heads": 2}}, "parts.A: .*expected a mixer with its `name`"),
        ({"match": {"what": "size"}}, "match.what: unknown 'size', expected one of"),
        ({"match": {"what": "parameters", "by": "steps"}}, "match.by: 'steps' is for flops"),
        ({"match": {"what": "parameters", "of": "hybrd"}}, "match.of: unknown arm 'hybrd', did you mean 'hybrid'"),
        ({"match": {"what": "parameters", "of": "hybrid", "target": 9}}, "match.target: 9, but match.of"),
        ({"match": {"what": "parameters", "tolerance": 1}}, "match.tolerance: 1.0, expected at least 0"),
        ({"ordering__demands": [{"arm": "x", "least": 1}]}, "ordering.demands.0.arm: unknown arm 'x'"),
        ({"ordering__demands": [{"arm": "hybrid"}]}, "ordering.demands.0: demands nothing"),
        ({"ordering__demands": [{"arm": "hybrid", "step": 7, "least": 1}]}, "demands.0.step: 7 is not read"),
        ({"ordering__demands": [{"arm": "hybrid", "length": 7, "least": 1}]}, "demands.0.length: 7 is not tested"),
        ({"quick": True}, "quick: no key of a race file, give --quick"),
        ({"ordering__demands": []}, "ordering.demands: empty, expected at least one"),
        ({"ordering__demands": [3]}, "ordering.demands.0: expected keys and values, got 3"),
    ],
)
def test_a_wrong_file_is_an_error_that_names_the_place_and_what_is_allowed(tmp_path, changes, message):
    path = written(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as error:
        load_race(path)
    assert str(error.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms__hybrid__layers": "MB"}, "arms.hybrid: pattern 'MB', position 1: unknown 'B'"),
        ({"parts__M__name": "mamba3"}, "^parts.M.name: unknown 'mamba3'.*in arms.hybrid"),
        ({"parts__M__states": 3}, "^parts.M: unknown option 'states'.*in arms.hybrid"),
        (
            {"parts__none__channel_mixer__wide": 3, "arms__sole": {"layers": ["none"]}},
            "^parts.none.channel_mixer: unknown option 'wide'.*in arms.sole",
        ),
        ({"model__channel_mixer__wide": 3}, "^model.channel_mixer: unknown option 'wide'.*in arms.attention"),
        ({"arms__hybrid__fields": {"spanns": []}}, "arms.hybrid: spanns: unknown key"),
        ({"model__vocab_size": 15}, "model.vocab_size: 15, but mqar at 16 tokens has symbol 15, expected at least 16"),
        ({"task__options": {"pairs": 3}}, "task.options: mqar at 16 tokens: .*'pairs'"),
        ({"reading__lengths": [2]}, "task.options: mqar at 2 tokens: length=2 must be at least"),
    ],
)
def test_what_cannot_be_built_names_the_arm_or_the_task(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        enter(load_race(written(tmp_path, **changes)))


def test_a_race_that_does_not_exist_is_refused_with_the_nearest(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"defalt: no such race.*'default'"):
        load_race("defalt")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ValueError, match="expected keys and values, got list"):
        load_race(tmp_path / "list.yaml")


def test_a_key_that_stands_twice_is_refused_with_its_place(tmp_path):
    path = written(tmp_path)
    path.write_text(path.read_text().replace("  steps: 20\n", "  steps: 20\n  steps: 30\n"))
    lines = path.read_text().splitlines()
    first = lines.index("  steps: 20") + 1
    said = rf"race.yaml: training.steps: stands twice, in lines {first} and {first + 1}, expected once"
    with pytest.raises(ValueError, match=said):
        load_race(path)
    for text, place in (("a: 1\nb: 2\na: 1", "a"), ("a: [{b: 1, b: 2}]", "a.0.b"), ("a: {1: x, '1': y}", "a.1")):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"race.yaml: {place}: stands twice"):
            read_yaml(path)


def test_merged_keys_may_be_given_again(tmp_path):
    path = tmp_path / "merged.yaml"
    path.write_text(
        "base: &base {a: 1, b: 2}\n"
        "next: &next\n  <<: *base\n  b: 3\n"
        "last: {<<: [*next, *base], a: 4}\n"
        "again: [*next, *next]\n"
        "round: &round {self: *round}\n"
    )
    content = read_yaml(path)
    assert content.pop("round").keys() == {"self"}
    assert content == {
        "base": {"a": 1, "b": 2}, "next": {"a": 1, "b": 3}, "last": {"a": 4, "b": 3}, "again": [{"a": 1, "b": 3}] * 2,
    }  # fmt: skip


@pytest.mark.parametrize(("seeds", "allowed"), [(0, "at least 1"), (1001, "at most 1000")])
def test_a_wrong_number_of_seeds_is_of_the_command_and_not_of_the_file(seeds, allowed):
    with pytest.raises(ValueError, match=f"^--seeds: {seeds}, expected {allowed}"):
        load_race("default", seeds=seeds)


@pytest.mark.parametrize("before", ["[]", "{}", '{"recipe": [1]}', '{"recipe": null}', "half a"])
def test_a_file_that_is_no_result_of_a_race_is_not_written_over(tmp_path, before):
    (tmp_path / "race.json").write_text(before)
    with pytest.raises(FileExistsError, match="choose another folder"):
        check_free(tmp_path / "race.json", {"recipe": {"quick": False}})


def test_quick_is_the_same_race_with_few_steps_and_demands_that_can_be_read():
    race = load_race("default", quick=True)
    assert (race.training.steps, race.seeds, race.quick) == (20, 1, True)
    assert all(demand.step in race.steps_read for demand in race.ordering.demands)
    assert race.title == f"{load_race('default').title} (quick)"
    assert load_race("default", quick=True, seeds=2).seeds == 2
    assert all(entrant.steps < 30 for entrant in enter(load_race("routing", quick=True)).values())


def test_the_default_race_is_the_recipe_that_is_known():
    race, entrants = load_race("default"), enter(load_race("default"))
    training = race.training
    assert (training.steps, training.warmup_steps, training.learning_rate, training.batch_size) == (700, 50, 0.004, 32)
    assert (training.schedule, race.steps_read, race.seeds) == ("cosine", [200, 700], 3)
    rows = token_rows("mqar", 2, race.task.length, seed=0, **race.task.options)
    assert (race.task.length, race.model.vocab_size, rows.answers.sum().item()) == (32, 64, 16)
    assert race.task.rows is None
    for entrant in entrants.values():
        config = entrant.config
        assert (config["embedding_std"], config["tie_word_embeddings"]) == (0.4, True)
        mixers = [config["layer_specs"][name]["mixer"] for name in config["layer_layout"]]
        for mixer in mixers:
            assert mixer["name"] == "mamba2" or mixer["position"] == {"name": "none"}
            assert mixer.get("state_size", 16) == 16
        kernels = {mixer["conv_kernel"] for mixer in mixers}
        assert len(kernels - {None, 1}) <= 1
    kernels = {
        name: {entrant.config["layer_specs"][part]["mixer"]["conv_kernel"] for part in entrant.config["layer_layout"]}
        for name, entrant in entrants.items()
    }
    assert all(kernels[name] == {3} for name in kernels if name.endswith("_conv"))
    assert not any(3 in kernels[name] for name in kernels if not name.endswith("_conv"))


# -- what is made equal --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["parameters", "flops"])
def test_widths_make_parameters_or_flops_equal(tmp_path, what):
    race = load_race(written(tmp_path, match={"what": what, "tolerance": 0.02}))
    entrants = enter(race)
    values = [getattr(entrant, {"flops": "flops_per_token"}.get(what, what)) for entrant in entrants.values()]
    assert max(values) / min(values) < 1.04
    assert all(
        entrant.matched["target"] == max(e.matched["target"] for e in entrants.values())
        for entrant in entrants.values()
    )
    model = build_model(race, entrants["hybrid"], 0)
    assert model.num_parameters() == entrants["hybrid"].parameters
    plain = enter(replace(race, match=None))
    assert entrants["attention"].parameters > plain["attention"].parameters


def test_state_sizes_make_states_equal_and_an_arm_without_one_is_named(tmp_path):
    match = {"what": "state_bytes", "of": "hybrid", "tolerance": 0.05, "context": 64}
    layers = {"arms__attention": ...}
    entrants = enter(load_race(written(tmp_path, match=match, **layers)))
    assert entrants["mamba2"].state_bytes == pytest.approx(entrants["hybrid"].state_bytes, rel=0.05)
    sizes = [e.config["layer_specs"]["M"]["mixer"]["state_size"] for e in entrants.values()]
    assert sizes[0] == 8 < sizes[1]
    with pytest.raises(ValueError, match=r"arms.attention: cannot be matched to .* state_bytes by .*expected a diff"):
        enter(load_race(written(tmp_path, match=match)))


def test_steps_make_flops_equal_and_readings_move_with_them(tmp_path):
    race = load_race(written(tmp_path, match={"what": "flops", "by": "steps", "of": "attention", "tolerance": 0.05}))
    entrants = enter(race)
    assert entrants["attention"].steps == 20 > entrants["mamba2"].steps
    spent = {name: entrant.steps * entrant.flops_per_token for name, entrant in entrants.items()}
    assert spent["mamba2"] == pytest.approx(spent["attention"], rel=0.05)
    assert train.own_step(race, entrants["mamba2"], 20) == entrants["mamba2"].steps
    assert train.steps_of(race, entrants["mamba2"])[-1] == entrants["mamba2"].steps


def test_steps_that_would_run_into_the_rows_of_another_seed_are_refused(tmp_path):
    race = load_race(written(tmp_path, match={"what": "flops", "by": "steps", "target": 10**12}))
    with pytest.raises(ValueError, match=r"arms.attention: \d+ steps at equal FLOPs, expected below 1000000"):
        enter(race)


def test_whole_numbers_serve_as_fractions_in_lists_too():
    assert convert(list[float], [1, 0.5], "path") == [1.0, 0.5]
    with pytest.raises(ValueError, match="path: expected list"):
        convert(list[int], [1, 0.5], "path")


# -- how arms begin and learn --------------------------------------------------------------------------------------


def test_linear_layers_and_experts_begin_uniform_by_fan_in_and_embeddings_normal(tmp_path):
    channel = {"name": "moe", "num_experts": 4, "top_k": 2, "intermediate_size": 64}
    part = {"mixer": {"name": "attention", "num_heads": 2}, "channel_mixer": channel}
    changes = {"parts__E": part, "arms__moe": {"layers": "EM"}, "model__hidden_size": 64}
    changes["model__fields"] = {"embedding_std": 0.4}
    race = load_race(written(tmp_path, **changes))
    entrant = enter(race)["moe"]
    model = build_model(race, entrant, 0)
    layers = model.model.layers
    weights = [layers[0].mixer.q_proj.weight, layers[1].mixer.in_proj.weight, layers[0].channel_mixer.experts.down_proj]
    for weight in weights:
        bound = weight.shape[-1] ** -0.5
        assert bound * 0.98 < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.std().item() == pytest.approx(0.4, rel=0.1)
    again = build_model(race, entrant, 0).state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in model.state_dict().items())
    other = build_model(replace(race, model=replace(race.model, linear_init="config")), entrant, 0)
    assert other.model.layers[0].mixer.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_the_learning_rate_rises_in_a_line_and_falls_by_a_cosine_to_its_share(tmp_path):
    training = load_race(written(tmp_path)).training
    rates = [train.learning_rate(training, step, 20) for step in range(20)]
    assert rates[:5] == pytest.approx([0.002, 0.004, 0.006, 0.008, 0.01])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[-1] == pytest.approx(0.001)
    assert rates[12] == pytest.approx(0.001 + 0.009 * 0.5 * (1 + math.cos(math.pi * 8 / 15)))
    constant = replace(training, schedule="constant")
    assert {train.learning_rate(constant, step, 20) for step in range(4, 20)} == {0.01}


def test_rows_are_new_every_step_or_those_that_were_drawn_once(tmp_path):
    race = load_race(written(tmp_path))
    fresh = [train.training_rows(race, 0, step).input_ids for step in range(5)]
    assert not torch.equal(fresh[0], fresh[1])
    assert not torch.equal(fresh[0], train.training_rows(race, 1, 0).input_ids)
    fixed = load_race(written(tmp_path, task__rows=10))
    seen = torch.cat([train.training_rows(fixed, 0, step).input_ids for step in range(5)])
    assert len(seen[:10].unique(dim=0)) == 10
    assert torch.equal(seen[:10].unique(dim=0), seen[10:].unique(dim=0))
    assert not torch.equal(seen[:10], seen[10:])


def test_a_score_counts_the_answers_that_the_tokens_before_predict(tmp_path):
    race = load_race(written(tmp_path))
    rows = token_rows("mqar", race.reading.rows, 16, seed=train.TEST_SEED, **race.task.options)

    class Gold(torch.nn.Module):
        def forward(self, input_ids, use_cache):
            wanted = rows.labels.clamp(min=0).roll(-1, dims=1)
            wanted[:2] = 15 - wanted[:2]  # two rows are wrong
            return type("Output", (), {"logits": torch.nn.functional.one_hot(wanted, 16).float()})

    assert train.score(Gold(), race, 16) == {"right": 6 * 4, "answers": 8 * 4}


def test_a_run_is_kept_with_its_weights_and_run_again_without_them(tmp_path, monkeypatch):
    demands = [{"arm": "hybrid", "least": 0.5}]
    race = load_race(written(tmp_path, training__steps=5, reading__steps=[2], ordering__demands=demands))
    entrants = enter(race)
    first = train.finish(race, entrants, tmp_path, "hybrid", 0)
    assert [point["step"] for point in first["curve"]] == [2, 5]
    assert {length: score["answers"] for length, score in first["lengths"].items()} == {"16": 32, "32": 64}
    weights = tmp_path / "hybrid-0.safetensors"
    model = build_model(race, entrants["hybrid"], 0)
    train.load_weights(model, weights)
    assert train.score(model, race, 16) == first["lengths"]["16"]
    again = train.finish(race, entrants, tmp_path, "hybrid", 0)
    assert again == first
    for damage in (weights.unlink, lambda: weights.write_bytes(b"half")):
        damage()
        again = train.finish(race, entrants, tmp_path, "hybrid", 0)
        assert (again["weights"], again["curve"]) == (first["weights"], first["curve"])
        assert train.file_hash(weights) == first["weights"]
    monkeypatch.setattr(train, "run", lambda *_: pytest.fail("ran again"))
    with pytest.raises(pytest.fail.Exception, match="ran again"):
        train.finish(replace(race, training=replace(race.training, learning_rate=0.1)), entrants, tmp_path, "hybrid", 0)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in ("attention_ratio", "mixers"))) for name in race_names()],
)
def test_every_race_of_the_package_runs_a_step_of_every_arm(name, tmp_path):
    race = load_race(name)
    entrants = enter(race)
    race.training = replace(race.training, steps=1, warmup_steps=1, batch_size=2)
    race.reading = replace(race.reading, rows=2, steps=[], lengths=race.reading.lengths[:1])
    for arm, entrant in entrants.items():
        model, curve = train.train(race, replace(entrant, steps=1), 0)
        assert [point["step"] for point in curve] == [1], arm
        assert math.isfinite(curve[0]["loss"]), arm
        for length in race.lengths:
            assert train.score(model, race, length)["answers"] > 0, arm


# -- how results are read ------------------------------------------------------------------------------------------


def results(race, **shares):
    """Runs of the arms with shares of right answers by seed, the same at all steps and lengths, out of 1000."""
    entrants = enter(race)
    runs = []
    for arm, of_seeds in shares.items():
        for seed, share in enumerate(of_seeds):
            count = {"right": round(1000 * share), "answers": 1000}
            curve = [{"step": step} | count for step in train.steps_of(race, entrants[arm])]
            runs.append({"arm": arm, "seed": seed, "curve": curve, "lengths": {"16": count, "32": count},
                         "process_seconds": 1.0})  # fmt: skip
    return entrants, report.summarize(race, entrants, runs)


def test_the_ordering_shows_or_not_and_says_why(tmp_path):
    race = load_race(written(tmp_path))
    _, arms = results(race, attention=[0.1, 0.2], hybrid=[0.9, 1.0], mamba2=[0.3, 0.4])
    assert arms["hybrid"]["at"]["10"] | {"above_chance": 1} == {
        "mean": 0.95, "standard_error": 0.05, "seeds": [0.9, 1.0], "above_chance": 1,
    }  # fmt: skip
    assert arms["hybrid"]["steps_to"] == {"threshold": 0.95, "seeds": [None, 5]}
    assert arms["hybrid"]["curve"][0] == [5, 0.95, 0.05]
    found = report.judge(race, arms)
    assert found["shows"]
    assert found["why"] == "hybrid at step 10 has 0.950 ± 0.050, above mamba2 with 0.350 ± 0.050 (at chance): holds"
    assert report.winner(race, arms) == ("hybrid", 1)
    text = report.sentences(race, arms, found)
    assert any("speed of learning under this recipe, not capacity" in line for line in text)
    assert text[-1].startswith("The known ordering shows: Hybrids win.")
    assert any(line.endswith("steps to 0.95 by seed: not reached, 5 (read every 5).") for line in text)
    _, arms = results(race, attention=[0.1, 0.2], hybrid=[0.3, 0.3], mamba2=[0.3, 0.4])
    found = report.judge(race, arms)
    assert not found["shows"]
    assert report.sentences(race, arms, found)[-1].startswith("The known ordering DOES NOT SHOW")


def test_a_quick_run_gives_no_verdict(tmp_path):
    race = load_race(written(tmp_path), quick=True)
    _, arms = results(race, attention=[0.1], hybrid=[0.9], mamba2=[0.3])
    found = report.judge(race, arms)
    assert found == {"claim": "Hybrids win.", "shows": None, "why": "a quick run"}
    text = report.sentences(race, arms, found)
    assert text[-1] == "The known ordering: no verdict, a quick run."
    assert not any("shows: " in line or "DOES NOT" in line for line in text)


@pytest.mark.parametrize(
    ("demand", "holds"),
    [
        ({"least": 0.95}, True), ({"least": 0.96}, False), ({"most": 0.95}, True), ({"most": 0.94}, False),
        ({"above": "mamba2", "by": 0.59}, True), ({"above": "mamba2", "by": 0.6}, False),
        ({"length": 32, "least": 0.9, "most": 0.96}, True), ({"above": "hybrid"}, False),
    ],
)  # fmt: skip
def test_demands_hold_at_their_bounds(tmp_path, demand, holds):
    race = load_race(written(tmp_path, ordering__demands=[{"arm": "hybrid"} | demand]))
    _, arms = results(race, attention=[0.1, 0.1], hybrid=[0.95, 0.95], mamba2=[0.35, 0.35])
    assert report.judge(race, arms)["shows"] is holds


def test_of_equally_good_arms_the_faster_wins(tmp_path):
    race = load_race(written(tmp_path))
    _, arms = results(race, attention=[1.0], hybrid=[1.0], mamba2=[0.5])
    arms["attention"]["steps_to"]["seeds"] = [10]
    assert report.winner(race, arms) == ("hybrid", 0)


def test_recipe_and_table_hold_what_the_figures_depend_on(tmp_path):
    race = load_race(
        written(tmp_path, match={"what": "parameters", "tolerance": 0.02}, model__fields={"embedding_std": 0.4})
    )
    entrants, arms = results(race, attention=[0.1, 0.2], hybrid=[0.9, 1.0], mamba2=[0.3, 0.4])
    text = "\n".join(report.recipe_lines(race, entrants))
    for said in (
        "mqar, 16 tokens", "U(+-1/sqrt(fan_in))", "embedding_std=0.4", "rate 0.01 after 5 steps of warm-up",
        "cosine down to 0.1", "seeds: 0, 1, 2", "matched: parameters, at", "state_size 8",
    ):  # fmt: skip
        assert said in text
    lines = report.table(race, arms).splitlines()
    assert "0.950 ± 0.050 " in next(line for line in lines if line.startswith("hybrid"))
    assert "0.350 ± 0.050*" in next(line for line in lines if line.startswith("mamba2"))


def test_chance_is_that_of_the_candidates_in_a_row(tmp_path):
    race = load_race(written(tmp_path))
    check_rows(race)
    assert report.chance_at(race, 16) == pytest.approx(1 / 4 + 3 / 4 / 8)
    assert evaluation_runs.read_out([{"right": 40, "answers": 100}], 0.34375)["above_chance"] is False
