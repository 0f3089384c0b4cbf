"""The isoFLOP comparison: what it counts, and how its curves are read."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hybridlm.analysis.flops import product_flops

sys.path.insert(0, str(Path(__file__).parents[2] / "eval"))
import isoflop_arms as arms  # noqa: E402
import isoflop_count as count  # noqa: E402
import isoflop_report as report  # noqa: E402

SETTINGS = replace(arms.QUICK, batch_size=2, length=32)


def counted_forward(model, tokens):
    totals = []
    with torch.no_grad(), count.counted(totals):
        model(input_ids=tokens)
    return totals[0]


def test_the_count_is_the_planners_products_and_the_full_square_of_attention():
    model = arms.build_model("plain", SETTINGS, seed=0)
    tokens = torch.randint(256, (2, 32))
    square = 4 * SETTINGS.hidden_size * 32 * tokens.numel() * SETTINGS.num_layers
    assert counted_forward(model, tokens) == product_flops(model) * tokens.numel() + square
    assert count.flops_of_plain_step(SETTINGS) == 3 * counted_forward(model, tokens)


@pytest.mark.parametrize("arm", ["mod", "moe_mod", "merge_learned"])
def test_without_the_cost_of_pads_a_batch_costs_what_its_rows_cost_alone(arm):
    model = arms.build_model(arm, SETTINGS, seed=0).eval()
    tokens = torch.randint(256, (4, 32))
    watch = count.LayerWatch(model)
    together = counted_forward(model, tokens)
    pads, shares = watch.pad_flops, watch.shares()
    alone = sum(counted_forward(model, row[None]) for row in tokens)
    watch.close()
    assert 0 < pads < together
    assert shares["real"][1] < shares["computed"][1] < shares["computed"][0] == 1
    assert together - pads == alone


def test_arms_begin_with_the_plain_models_weights():
    plain = arms.build_model("plain", SETTINGS, seed=3).state_dict()
    routed = arms.build_model("mod", SETTINGS, seed=3).state_dict()
    assert all(torch.equal(routed[name], tensor) for name, tensor in plain.items())
    fewer = arms.build_model("fewer", SETTINGS, seed=3).state_dict()
    name = "mixer.q_proj.weight"
    assert torch.equal(fewer[f"model.layers.1.{name}"], plain[f"model.layers.2.{name}"])


def curve(*losses):
    return [
        {"step": 10 * i, "flops": 100 * i, "unpadded_flops": 80 * i, "heldout": loss}
        for i, loss in enumerate(losses, start=1)
    ]


def test_curves_are_read_between_their_points_and_never_outside():
    points = curve(4.0, 3.0, 2.5)
    assert report.at_step(points, 20) == 3.0
    assert report.at_flops(points, 250) == 2.75
    assert report.at_flops(points, 200, "unpadded_flops") == 2.75
    with pytest.raises(ValueError, match="does not reach"):
        report.at_flops(points, 301)


@pytest.mark.parametrize(
    ("losses", "verdict"),
    [
        ([2.00, 2.01, 2.02], "shows"),
        ([2.00, 2.50, 2.30], "does not show at this size"),
        ([2.40, 2.41, 2.42], "does not show at this size (the opposite shows)"),
    ],
)
def test_a_claim_shows_only_beyond_the_noise_of_the_seeds(losses, verdict):
    readings = {"a": {"equal_steps": dict(enumerate(losses))}, "b": {"equal_steps": {0: 2.2, 1: 2.21, 2: 2.215}}}
    assert report._judge("a", "b", "equal_steps", "a claim", readings=readings)["verdict"] == verdict
