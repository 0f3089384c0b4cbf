"""The surveys' memory: a decaying sum of inputs, each weighed by how surprising it is."""

import pytest
import torch
from torch.testing import assert_close

from hybridlm.analysis.flops import OperationCounter, mixing_flops
from hybridlm.modeling import mixer_ema_memory
from hybridlm.modeling.mixer_ema_memory import EMAMemoryMixer

HIDDEN = 12


@pytest.fixture
def mixer():
    mixer = EMAMemoryMixer(HIDDEN, decay_min=0.5, decay_max=0.99).double()
    with torch.no_grad():
        mixer.surprise_proj.weight.normal_()
    return mixer


def test_the_memory_is_the_formula_of_the_surveys(mixer):
    tokens = torch.randn(2, 37, HIDDEN, dtype=torch.float64)
    output, state = mixer(tokens)
    decay, memory = torch.exp(-mixer.A_log.exp()), torch.zeros(2, HIDDEN, dtype=torch.float64)
    for t in range(37):
        surprise = torch.sigmoid(tokens[:, t] @ mixer.surprise_proj.weight[0] + mixer.surprise_proj.bias)
        memory = decay * memory + surprise[:, None] * tokens[:, t]
        assert_close(output[:, t], memory @ mixer.out_proj.weight.T, rtol=1e-9, atol=1e-10)
    assert_close(state.recurrent_states, memory, rtol=1e-9, atol=1e-10)


def test_a_new_memory_reaches_as_far_as_asked():
    decay = torch.exp(-EMAMemoryMixer(HIDDEN, decay_min=0.5, decay_max=0.99).A_log.detach().exp())
    assert_close((decay[0], decay[-1]), (torch.tensor(0.5), torch.tensor(0.99)))
    assert bool((decay.diff() > 0).all())


def test_the_planner_counts_its_recurrence(mixer, monkeypatch):
    counter, scan = OperationCounter(), mixer_ema_memory.selective_scan_reference

    def counted(*inputs):
        with counter:
            return scan(*inputs)

    monkeypatch.setattr(mixer_ema_memory, "selective_scan_reference", counted)
    mixer.forward_reference(torch.randn(1, 7, HIDDEN, dtype=torch.float64))
    assert counter.products + counter.others == 7 * mixing_flops("ema_memory", mixer, 0)


@pytest.mark.parametrize("decays", [(0.0, 0.5), (0.9, 0.8), (0.9, 1.0)])
def test_decays_outside_their_range_are_refused(decays):
    with pytest.raises(ValueError, match=f"decay_min={decays[0]} must be above 0 and at most decay_max={decays[1]}"):
        EMAMemoryMixer(HIDDEN, decay_min=decays[0], decay_max=decays[1])
