"""What training tells about spans equals a count of what the model says it did."""

import json
import re

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate
from transformers import TrainingArguments

from hybridlm import HybridLMConfig
from hybridlm.data import PackedRows
from hybridlm.modeling.losses import update_selection_bias
from hybridlm.modeling.modeling_hybridlm import HybridLMForCausalLM
from hybridlm.modeling.registry import SPANS
from hybridlm.training import HybridTrainer
from hybridlm.training.span_metrics import percentile, span_metrics

ATTENTION = {"mixer": {"name": "attention", "num_heads": 2}, "channel_mixer": {"name": "mlp"}}


def build(*spans):
    torch.manual_seed(0)
    sizes = {"vocab_size": 258, "hidden_size": 16, "num_hidden_layers": 4}
    spans = [{"name": "mixture_of_depths"} | span for span in spans]
    config = HybridLMConfig(layer_specs={"a": ATTENTION}, layer_layout=["a"] * 4, spans=spans, **sizes)
    return HybridLMForCausalLM(config).double().train()


def by_number(found):
    """The figures without the kind and the layers in the names of spans."""
    return {re.sub(r"^(span_\d+)_[a-z_0-9]+/", r"\1/", name): value for name, value in found.items()}


def learn(model, batches):
    """Forward all micro-batches of one optimizer step; what the model says of them."""
    outputs = [model(ids, attention_mask=mask, output_router_logits=True) for ids, mask in batches]
    update_selection_bias(model)
    return outputs


def batches(seed=0):
    """Two micro-batches of several rows, the second with pads."""
    ids = torch.randint(0, 258, (2, 3, 40), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(3, 40, dtype=torch.long)
    mask[0, :11], mask[2, 30:] = 0, 0
    return [(ids[0], torch.ones_like(mask)), (ids[1], mask)]


@pytest.mark.parametrize("rule", ["threshold", "auxiliary_loss", "predictor", "random"])
def test_figures_equal_a_count_over_micro_batches_and_steps(rule):
    model = build({"start": 1, "stop": 3, "capacity": 0.3, "rule": rule, "bias_update_rate": 0.0})
    steps = [batches(0), batches(1)]
    outputs = [output for step in steps for output in learn(model, step)]
    taken = [output.span_taken[0] for output in outputs]
    real = [mask.bool() for step in steps for _, mask in step]
    shares = np.concatenate([(t.sum(1) / r.sum(1)).numpy() for t, r in zip(taken, real, strict=True)])
    said = torch.cat([(output.span_scores[0] > 0)[r] for output, r in zip(outputs, real, strict=True)])
    entered = torch.cat([t[r] for t, r in zip(taken, real, strict=True)])
    found = by_number(span_metrics(model))
    share = entered.double().mean().item()
    assert found["span_0/share"] == found["span_0/wished_share"] == pytest.approx(share)
    assert found["layer_1/token_share"] == found["layer_2/token_share"] == pytest.approx(share)
    assert found["span_0/row_share_mean"] == pytest.approx(shares.mean())
    expected = np.quantile(shares, 0.95, method="inverted_cdf")
    assert found["span_0/row_share_p95"] == pytest.approx(expected, abs=0.0006)
    assert ("span_0/threshold_bias" in found) == (rule == "threshold")
    assert ("span_0/predictor_accuracy" in found) == (rule in ("auxiliary_loss", "predictor"))
    if rule in ("auxiliary_loss", "predictor"):
        hits = (said & entered).sum().item()
        assert found["span_0/predictor_precision"] == pytest.approx(hits / said.sum().item())
        assert found["span_0/predictor_recall"] == pytest.approx(hits / entered.sum().item())
        assert found["span_0/predictor_accuracy"] == pytest.approx((said == entered).double().mean().item())
        assert found["span_0/always_skip_accuracy"] == pytest.approx(1 - share)
    assert span_metrics(model) == {}


def test_nested_spans_count_among_the_tokens_that_reached_them():
    model = build(
        {"start": 0, "stop": 4, "capacity": 0.6, "rule": "random"},
        {"start": 1, "stop": 3, "capacity": 0.5, "rule": "random", "ceiling": 0.5},
    )
    outputs = learn(model, batches())
    outer, inner = (sum(int(output.span_taken[n].sum()) for output in outputs) for n in (0, 1))
    total = sum(int(mask.sum()) for _, mask in batches())
    found = by_number(span_metrics(model))
    assert found["span_0/share"] == pytest.approx(outer / total)
    assert found["span_1/share"] == pytest.approx(inner / outer)
    assert found["span_1/wished_share"] > found["span_1/share"]
    assert found["layer_3/token_share"] == pytest.approx(outer / total)
    assert found["layer_2/token_share"] == pytest.approx(inner / total)


def test_evaluation_counts_nothing_and_gradient_checkpointing_nothing_twice():
    model = build({"start": 1, "stop": 3, "rule": "random"})
    model.gradient_checkpointing_enable({"use_reentrant": False})
    (ids, _), _ = batches()
    model(ids, labels=ids).loss.backward()
    assert model.model.spans[0].load_counts()[1] == ids.numel()
    model.eval()
    model(ids, labels=ids)
    assert model.model.spans[0].load_counts()[1] == ids.numel()


def test_the_name_of_a_figure_says_kind_and_layers_of_the_span():
    spans = [{"start": 0, "rule": "random"}, {"start": 1, "stop": 4, "name": "token_merging"}]
    model = build(*spans)
    learn(model, batches())
    labels = {name.split("/")[0] for name in span_metrics(model) if name.startswith("span_")}
    assert labels == {"span_0_mixture_of_depths_layer_0", "span_1_token_merging_layers_1_to_3"}
    kinds = {label.partition("_layer")[0].split("_", 2)[2] for label in labels}
    assert kinds == set(SPANS)


def test_a_percentile_is_a_share_that_so_many_rows_do_not_exceed():
    histogram = torch.zeros(1001)
    histogram[100], histogram[400], histogram[900] = 90, 5, 5
    assert [percentile(histogram, f) for f in (0.5, 0.9, 0.95, 0.96)] == [0.1, 0.1, 0.4, 0.9]


def test_the_trainer_writes_them_beside_the_loss(tmp_path):
    model = build({"start": 1, "stop": 2, "rule": "predictor"}, {"start": 2, "name": "token_merging"}).float()
    settings = {"max_steps": 4, "logging_steps": 2, "per_device_train_batch_size": 2, "use_cpu": True}
    settings |= {"report_to": "none", "disable_tqdm": True, "remove_unused_columns": False, "save_strategy": "no"}
    args = TrainingArguments(output_dir=str(tmp_path), gradient_accumulation_steps=2, **settings)
    data = PackedRows([np.random.default_rng(0).integers(0, 256, 23 * 16)], 16)
    HybridTrainer(model=model, args=args, train_dataset=data, data_collator=default_collate).train()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    records = [record for record in records if "loss" in record]
    assert len(records) == 2
    assert "span_0_mixture_of_depths_layer_1/share" in records[0]
    assert "span_1_token_merging_layer_2/share" in records[0]
    for record in map(by_number, records):
        assert record["span_0/share"] == record["span_0/row_share_p95"] == 2 / 16  # the top k of every row
        assert record["span_0/always_skip_accuracy"] == 14 / 16
        assert 0 <= record["span_0/predictor_recall"] <= 1
        assert record["span_1/threshold_bias"] != 0
