"""The models that the contract tests of spans run on: every rule, and every span around every kind of layer."""

from functools import lru_cache
from itertools import cycle, product

import torch
from variants import CHANNEL_VARIANTS, CONVOLVED, MAMBA, MAMBA2, WINDOW, build, pairwise, small

from hybridlm import CHANNEL_MIXERS, MIXERS
from hybridlm.modeling.registry import RESIDUALS, SPANS
from hybridlm.testing import Subject

MOD = {"name": "mixture_of_depths", "capacity": 0.4}
MERGING = {"name": "token_merging", "loss_coef": 0.5}
STACK = [(MAMBA, small("mlp")), (CONVOLVED, CHANNEL_VARIANTS["moe-losses"]), (MAMBA2, None), (WINDOW, small("swiglu"))]
RECURRENT = [(MAMBA, small("mlp")), (MAMBA2, None), (MAMBA, small("swiglu")), (MAMBA2, None)]
MIDDLE = {"start": 1, "stop": 3}


def mod(**options):
    return MOD | MIDDLE | options


def merge(boundary, representative, **options):
    where = {"stride": 5} if boundary == "stride" else {"threshold": 0.2}
    return MERGING | MIDDLE | where | {"boundary": boundary, "representative": representative} | options


SPAN_VARIANTS = {
    "mod-threshold": [mod()],
    "mod-auxiliary_loss": [mod(rule="auxiliary_loss", loss_coef=0.5)],
    "mod-predictor": [mod(rule="predictor", loss_coef=0.5, predictor_size=3)],
    "mod-random": [mod(rule="random")],
    "mod-raw_weight": [mod(weight="raw")],
    "mod-ceiling": [mod(rule="random", capacity=0.35, ceiling=0.35)],
    "mod-whole_stack": [mod(start=0, stop=4)],
    "mod-every_layer": [mod(start=0, stop=1, every=1)],
    "mod-nested": [mod(start=0, stop=4, capacity=0.7, rule="random"), mod(rule="random"), mod(start=2)],
    **{
        f"merge-{boundary}-{representative}": [merge(boundary, representative)]
        for boundary, representative in product(("cosine", "learned", "stride"), ("first", "mean"))
    },
    "merge-ceiling": [merge("learned", "first", ceiling=0.5)],
    "merge-whole_stack": [merge("learned", "mean", start=0, stop=4, threshold=0.0)],
    "merge-around_depths": [merge("cosine", "mean", start=0, stop=4), mod(rule="random")],
    "merge-inside_depths": [mod(start=0, stop=4, capacity=0.7, rule="random"), merge("learned", "mean", threshold=0.1)],
    "merge-nested": [
        merge("learned", "first", start=0, stop=4),
        merge("stride", "mean", stride=2),
        merge("cosine", "first", start=2),
    ],
}

# the smallest entry of every registered span; one that is not named here runs with its defaults
SMALL_SPANS = {name: {"name": name} for name in SPANS}
SMALL_SPANS |= {"mixture_of_depths": MOD | {"rule": "random"}, "token_merging": MERGING}
SPAN_FACTORS = {
    "span 1": list(SPANS),
    "inside": [*MIXERS, "attention-window"],
    "channel": [*CHANNEL_MIXERS, "moe-losses"],
    "residual": list(RESIDUALS),
    "span 2": list(SPANS),
    "nested": [True, False],
}
SPAN_PAIRS = {"-".join(str(value) for value in row.values()): row for row in pairwise(SPAN_FACTORS)}


@lru_cache(maxsize=4)
def span_subject(name, dtype=torch.float64):
    """Mamba, convolved attention with experts, Mamba-2 and windowed attention, with the spans of an entry."""
    return Subject(build(STACK, spans=SPAN_VARIANTS[name]).to(dtype))


@lru_cache(maxsize=4)
def recurrent_span_subject(name):
    """Mamba and Mamba-2 by turns, which read long inputs quickly, with the spans of an entry."""
    return Subject(build(RECURRENT, spans=SPAN_VARIANTS[name]))


@lru_cache(maxsize=4)
def span_pair_subject(name):
    """A span around a mixer with a channel mixer, and another span inside it or behind it."""
    row = SPAN_PAIRS[name]
    mixer = WINDOW if row["inside"] == "attention-window" else small(row["inside"])
    others = cycle(layer for layer in STACK if layer[0]["name"] != mixer["name"])
    layers = [next(others), (mixer, CHANNEL_VARIANTS[row["channel"]]), next(others), next(others)]
    second = {"start": 2, "stop": 3} if row["nested"] else {"start": 3, "stop": 4}
    spans = [SMALL_SPANS[row["span 1"]] | {"start": 1, "stop": 3}, SMALL_SPANS[row["span 2"]] | second]
    return Subject(build(layers, spans=spans, residual={"name": row["residual"]}))
