"""Two processes with gloo train the same model as one."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from child_data_parallel import TRAINING, sparse_gradients, sparse_model
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


def test_experts_that_no_token_reached_hold_nothing_up(two_processes):
    model = sparse_model().train()
    alone = sparse_gradients(model, prompt(2, 6))
    together = load_file(two_processes / "grads.safetensors")
    unused = alone["model.layers.0.channel_mixer.experts.down_proj"].flatten(1).abs().sum(1) == 0
    assert unused.sum() > 32
    for name, gradient in alone.items():
        torch.testing.assert_close(together[name], gradient, rtol=1e-3, atol=1e-6, msg=name)
