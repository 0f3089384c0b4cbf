"""The command line prints what the library computes, and turns mistakes of the user into one line and exit code 2."""

import json

import pytest
from typer.testing import CliRunner

from hybridlm import presets
from hybridlm.analysis import plan
from hybridlm.cli import app


@pytest.fixture
def cli():
    runner = CliRunner()
    return lambda *arguments: runner.invoke(app, [str(argument) for argument in arguments])


def test_list_names_every_preset(cli):
    result = cli("list")
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.stdout.splitlines()] == presets.preset_names()


def test_describe_prints_the_stack_layer_by_layer_with_the_planned_figures(cli):
    result = cli("describe", "tiny_jamba", "--context", 64)
    assert result.exit_code == 0
    planned = plan(presets.load_config("tiny_jamba"), context=64)
    rows = [line for line in result.stdout.splitlines() if "│" in line]
    assert len(rows) == len(planned.layers) + 2
    for layer, row in zip(planned.layers, rows, strict=False):
        for figure in (layer.mixer, f"{layer.num_parameters:,}", f"{layer.state_bytes:,}", f"{layer.step_flops:,}"):
            assert figure in row
    assert f"{planned.total.num_active_parameters:,}" in rows[-1]


def test_describe_has_expected_figures_only_where_the_data_decide(cli):
    assert "expected" not in cli("describe", "tiny_jamba").stdout
    assert "expected at the target" in cli("describe", "tiny_mode").stdout


def test_describe_counts_one_token_as_one(cli):
    said = cli("describe", "tiny_llama", "--context", 1, "--rollback", 1).stdout
    assert "prefill of 1 token:" in said
    assert "recording 1 token for rollback" in said


def test_describe_prints_json(cli):
    result = cli("describe", "tiny_jamba", "--context", 64, "--dtype", "fp32", "--rollback", 8, "--json")
    planned = plan(presets.load_config("tiny_jamba"), context=64, dtype="fp32", rollback_window=8)
    assert json.loads(result.stdout) == json.loads(json.dumps(planned.to_dict()))


def test_describe_reads_a_file_and_a_model_folder(cli, tmp_path):
    (tmp_path / "config.json").write_text(presets.find_config("tiny_llama").read_text())
    results = [cli("describe", target, "--json") for target in ("tiny_llama", tmp_path, tmp_path / "config.json")]
    assert len({result.stdout for result in results}) == 1
    assert results[0].exit_code == 0


def broken(tmp_path, change):
    config = json.loads(presets.find_config("tiny_llama").read_text())
    change(config)
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["layer_specs"]["attention"]["mixer"].update(name="atention"), "mixer.name: unknown 'atention'"),
        (lambda c: c["layer_specs"]["attention"]["mixer"].update(windo=4), "mixer: unknown option 'windo'"),
        (lambda c: c["layer_specs"]["attention"]["mixer"].update(window="4"), "mixer.window: expected"),
        (lambda c: c["layer_specs"]["attention"]["mixer"].update(num_kv_heads=3), "mixer.num_kv_heads=3 must divide"),
        (lambda c: c["layer_layout"].append("attention"), "layer_layout: names 3 layers"),
        (lambda c: c.update(hiden_size=32), "hiden_size: unknown key"),
        (lambda c: c.update(schema_version=99), "schema_version: 99 is newer"),
    ],
)
def test_a_wrong_config_is_one_line_with_the_path_of_what_is_wrong(cli, tmp_path, change, message):
    result = cli("describe", broken(tmp_path, change))
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("describe", "jambo"), "jambo: no such model config"),
        (("describe", "nosuch"), "nosuch: no such model config, file or folder; see `hybridlm list`"),
        (("upcycle", "tiny_llama", "out"), "save_pretrained first"),
        (("upcycle", "nowhere", "out"), "nowhere: no such folder"),
        (("describe", "tiny_llama", "--dtype", "int4"), "dtype: unknown 'int4'"),
        (("train", "nowhere.yaml"), "nowhere.yaml: no such run file"),
        (("import", "nowhere", "out"), "nowhere"),
        (("export", "nowhere", "out"), "nowhere"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(cli, arguments, message):
    result = cli(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_at_most_the_five_nearest_presets_are_named(cli):
    said = cli("describe", "tiny_lama").stderr
    assert "'tiny_llama'" in said
    assert said.count("'") <= 10


def test_the_traceback_is_there_on_request(cli, monkeypatch):
    monkeypatch.setenv("HYBRIDLM_DEBUG", "1")
    assert isinstance(cli("describe", "jambo").exception, FileNotFoundError)


def test_doctor_names_versions_and_the_backend_of_every_mixer(cli):
    from hybridlm.modeling.registry import MIXERS

    result = cli("doctor")
    assert result.exit_code == 0
    for name in (*MIXERS, "torch", "transformers", "mamba-ssm"):
        assert name in result.stdout
