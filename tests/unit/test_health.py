"""The routers' health in the training metrics."""

import copy
import math

import pytest
import torch

from hybridlm.modeling.channel_moe import MoE
from hybridlm.modeling.losses import update_selection_bias
from hybridlm.training.health import router_health


def test_health_tells_even_load_from_uneven_and_dead_experts():
    moe = MoE(8, num_experts=4, intermediate_size=8, num_zero_experts=1)
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.ModuleDict({"moe": moe})])})
    assert router_health(model) == {}
    moe.router.add_load(torch.full((5,), 20), torch.full((5,), 10.0))
    update_selection_bias(model)
    moe.router.add_load(torch.tensor([100, 60, 39, 1, 0]), torch.tensor([50.0, 50.0, 0.0, 0.0, 0.0]))
    halfway = copy.deepcopy(model)
    update_selection_bias(model)  # two steps make one record
    assert router_health(model) == pytest.approx(
        {
            "layer_0/expert_max_load": 120 / 60,
            "layer_0/router_entropy": -(0.8 * math.log(0.4) + 0.2 * math.log(1 / 15)) / math.log(5),
            "layer_0/dead_experts": 0,
        }
    )
    assert router_health(model) == {}
    halfway["layers"][0]["moe"].router.load_record = None
    update_selection_bias(halfway)
    health = router_health(halfway)
    assert health["layer_0/dead_experts"] == 1  # 1 of 40 is more than a hundredth, 0 is not
    assert health["layer_0/expert_max_load"] == pytest.approx(2.5)
    assert health["layer_0/router_entropy"] == pytest.approx(math.log(2) / math.log(5))
