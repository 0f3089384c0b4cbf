"""What has to be learned, learned: minutes each."""

import sysconfig
from pathlib import Path

import pytest
import torch

from hybridlm import HybridLMConfig, HybridLMForCausalLM
from hybridlm.modeling.loads import SpanLoad
from hybridlm.modeling.losses import update_selection_bias

STEPS, LAST = 400, 100


@pytest.fixture(scope="module")
def text():
    """Bytes of Python's standard library."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:60]
    return torch.tensor(list(b"".join(path.read_bytes() for path in files)))


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["auxiliary_loss", "predictor"])
def test_the_causal_decision_of_top_k_routing_beats_always_skipping(rule, text):
    torch.manual_seed(0)
    mixer = {"name": "attention", "num_heads": 4, "position": {"name": "rope"}}
    recipe = {"mixer": mixer, "channel_mixer": {"name": "swiglu"}}
    span = {"name": "mixture_of_depths", "start": 1, "every": 2, "rule": rule, "loss_coef": 0.1}
    shape = {"hidden_size": 64, "vocab_size": 256, "num_hidden_layers": 4}
    model = HybridLMForCausalLM(HybridLMConfig(layer_specs={"a": recipe}, spans=[span], **shape)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(STEPS):
        begins = torch.randint(0, len(text) - 128, (4,)).tolist()
        ids = torch.stack([text[b : b + 128] for b in begins])
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        update_selection_bias(model)
        if step == STEPS - LAST:
            for span in model.model.spans:
                span.load_record = None
    for span in model.model.spans:
        load = SpanLoad.from_counts(span.load_record)
        accuracy, skipping = float(load.correct / load.reached), 1 - float(load.taken / load.reached)
        print(f"{rule}, span {span.number}: accuracy {accuracy:.3f}, always skipping {skipping:.3f}")
        assert accuracy > skipping
