"""Run by test_data_parallel.py, once a rank: train with two processes and write the weights of the first.

Usage: RANK=... WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... python child_data_parallel.py FOLDER
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from stacks import MIXERS, MOE, prompt
from test_trainer import Rows, arguments, train
from torch.nn.parallel import DistributedDataParallel

from hybridlm import HybridLMConfig, HybridLMForCausalLM
from hybridlm.training import HybridTrainer

TRAINING = {"max_steps": 3, "optim": "sgd", "max_grad_norm": 0.0, "gradient_accumulation_steps": 2}


def sparse_model():
    """More experts than two rows of tokens can reach, and a layer that no token enters."""
    experts = MOE | {"num_experts": 64, "top_k": 1, "selection_bias": False, "num_shared_experts": 0}
    specs = {"a": {"mixer": MIXERS["mamba"], "channel_mixer": experts}}
    torch.manual_seed(0)
    spans = [{"name": "mixture_of_depths", "start": 1}]
    shape = {"num_hidden_layers": 2, "hidden_size": 32, "vocab_size": 48}
    model = HybridLMForCausalLM(HybridLMConfig(layer_specs=specs, spans=spans, **shape))
    model.model.spans[0].threshold_bias.fill_(-1e9)
    return model


def sparse_gradients(model, ids):
    """Gradients of a loss over rows `[B, 6]`."""
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad for name, p in getattr(model, "module", model).named_parameters()}


def balanced_run(folder, **options):
    """Train experts with a selection bias by our Trainer; the biases of both layers, and the records.

    In float64 and with weights that hardly move, so that no near tie between two experts decides.
    """
    experts = MOE | {"num_experts": 8, "top_k": 2, "scores": "sigmoid", "num_groups": 4, "top_k_groups": 2}
    model, records = _our_run(folder, experts, [], **options)
    return torch.stack([moe.router.selection_bias for moe in model.model.moe_layers]), records


def depths_run(folder, **options):
    """The same with mixtures of depths instead of experts; the bias of the outer one, and the records."""
    depths = {"name": "mixture_of_depths", "capacity": 0.4}
    spans = [depths | {"start": 0, "stop": 2, "ceiling": 0.6}, depths | {"start": 1, "rule": "predictor"}]
    model, records = _our_run(folder, None, spans, **options)
    return model.model.spans[0].threshold_bias, records


def _our_run(folder, channel_mixer, spans, **options):
    specs = {"a": {"mixer": MIXERS["mamba"], "channel_mixer": channel_mixer}}
    torch.manual_seed(0)
    config = HybridLMConfig(layer_specs=specs, num_hidden_layers=2, hidden_size=32, vocab_size=48, spans=spans)
    model = HybridLMForCausalLM(config).double()
    settings = {"max_steps": 4, "optim": "sgd", "learning_rate": 1e-3, "max_grad_norm": 0.0, "logging_steps": 2}
    args = arguments(folder, remove_unused_columns=False, **settings | options)
    trainer = HybridTrainer(model=model, args=args, train_dataset=Rows(64))
    trainer.train()
    return model, [record for record in trainer.state.log_history if "loss" in record]


def main(folder):
    """Train by the Trainer, balance experts by ours, then one step of plain DDP."""
    trainer = train(folder / "run", per_device_train_batch_size=2, ddp_backend="gloo", **TRAINING)
    assert trainer.args.world_size == 2
    weights = {name: tensor.contiguous() for name, tensor in trainer.model.state_dict().items()}
    rank = dist.get_rank()
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    biases, records = balanced_run(folder / "balanced", ddp_backend="gloo", **options)
    torch.save((biases, records), folder / f"balanced_{rank}.pt")
    torch.save(depths_run(folder / "depths", ddp_backend="gloo", **options), folder / f"depths_{rank}.pt")
    model = DistributedDataParallel(sparse_model().train())
    gradients = sparse_gradients(model, prompt(2, 6)[rank : rank + 1])
    if rank == 0:
        save_file(weights, folder / "weights.safetensors")
        save_file({name: gradient.contiguous() for name, gradient in gradients.items()}, folder / "grads.safetensors")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
