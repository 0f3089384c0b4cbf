"""Two processes with gloo train the same model as one."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from child_data_parallel import TRAINING, balanced_run, depths_run, sparse_gradients, sparse_model
from safetensors.torch import load_file
from stacks import prompt
from test_trainer import train

import hybridlm

HERE = Path(__file__).parent


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The folder that the two ranks wrote to."""
    folder = tmp_path_factory.mktemp("parallel")
    common = {
        **os.environ,
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"},
        "PYTHONPATH": os.pathsep.join([str(Path(hybridlm.__file__).parents[1]), str(HERE)]),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(HERE / "child_data_parallel.py"), str(folder)],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    for process, output in zip(ranks, outputs, strict=True):
        assert process.returncode == 0, output
    return folder


def test_the_trainer_in_two_processes_is_the_trainer_in_one(two_processes, tmp_path):
    alone = train(tmp_path, per_device_train_batch_size=4, **TRAINING).model.state_dict()
    together = load_file(two_processes / "weights.safetensors")
    assert together.keys() == alone.keys()
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


HEALTH = {"layer_0/expert_max_load", "layer_0/router_entropy", "layer_0/dead_experts"}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(("rows", "accumulation", "checkpointing"), [(8, 1, False), (2, 4, False), (4, 2, True)])
def test_the_selection_bias_moves_once_a_step_by_the_load_of_all(
    two_processes, tmp_path, rows, accumulation, checkpointing
):
    options = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulation}
    alone, records = balanced_run(tmp_path, gradient_checkpointing=checkpointing, **options)
    steps = (alone.abs() / 1e-3).round()
    torch.testing.assert_close(alone.abs(), 1e-3 * steps)  # a whole number of steps of the rate, at most one a step
    assert steps.max() == 4
    for rank in range(2):
        biases, recorded = torch.load(two_processes / f"balanced_{rank}.pt")
        assert torch.equal(biases, alone)
        assert len(recorded) == len(records) == 2
        for record, expected in zip(recorded, records, strict=True):
            assert record.keys() >= HEALTH
            for name in HEALTH:
                assert record[name] == pytest.approx(expected[name], rel=1e-6), name


def test_spans_tell_what_the_rows_of_all_processes_chose(two_processes, tmp_path):
    bias, records = depths_run(tmp_path, per_device_train_batch_size=8)
    assert bias != 0
    told = {name for name in records[0] if name.startswith("span_")}
    figures = {(name.split("_")[1], name.split("/")[1]) for name in told}
    assert {("0", "row_share_p95"), ("0", "threshold_bias"), ("1", "share"), ("1", "predictor_accuracy")} <= figures
    for rank in range(2):
        other_bias, recorded = torch.load(two_processes / f"depths_{rank}.pt")
        torch.testing.assert_close(other_bias, bias)
        assert len(recorded) == len(records) == 2
        for record, expected in zip(recorded, records, strict=True):
            for name in told:
                assert record[name] == pytest.approx(expected[name], rel=1e-6), name


def test_experts_that_no_token_reached_hold_nothing_up(two_processes):
    model = sparse_model().train()
    alone = sparse_gradients(model, prompt(2, 6))
    together = load_file(two_processes / "grads.safetensors")
    unused = alone["model.layers.0.channel_mixer.experts.down_proj"].flatten(1).abs().sum(1) == 0
    assert unused.sum() > 32
    assert not any(gradient.any() for name, gradient in alone.items() if name.startswith("model.layers.1."))
    for name, gradient in alone.items():
        torch.testing.assert_close(together[name], gradient, rtol=1e-3, atol=1e-6, msg=name)
