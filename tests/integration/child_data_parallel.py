"""Run by test_data_parallel.py, once a rank: train with two processes and write the weights of the first.

Usage: RANK=... WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... python child_data_parallel.py FOLDER
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from stacks import MIXERS, MOE, prompt
from test_trainer import train
from torch.nn.parallel import DistributedDataParallel

from hybridlm import HybridLMConfig, HybridLMForCausalLM

TRAINING = {"max_steps": 3, "optim": "sgd", "max_grad_norm": 0.0, "gradient_accumulation_steps": 2}


def sparse_model():
    """More experts than two rows of tokens can reach."""
    experts = MOE | {"num_experts": 64, "top_k": 1, "selection_bias": False, "num_shared_experts": 0}
    specs = {"a": {"mixer": MIXERS["mamba"], "channel_mixer": experts}}
    torch.manual_seed(0)
    return HybridLMForCausalLM(HybridLMConfig(layer_specs=specs, num_hidden_layers=1, hidden_size=32, vocab_size=48))


def sparse_gradients(model, ids):
    """Gradients of a loss over rows `[B, 6]`."""
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad for name, p in getattr(model, "module", model).named_parameters()}


def main(folder):
    """Train by the Trainer, then one step of plain DDP."""
    trainer = train(folder / "run", per_device_train_batch_size=2, ddp_backend="gloo", **TRAINING)
    assert trainer.args.world_size == 2
    weights = {name: tensor.contiguous() for name, tensor in trainer.model.state_dict().items()}
    rank = dist.get_rank()
    model = DistributedDataParallel(sparse_model().train())
    gradients = sparse_gradients(model, prompt(2, 6)[rank : rank + 1])
    if rank == 0:
        save_file(weights, folder / "weights.safetensors")
        save_file({name: gradient.contiguous() for name, gradient in gradients.items()}, folder / "grads.safetensors")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
