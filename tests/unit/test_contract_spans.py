"""The promises, on models with spans: every rule, and every span around every mixer, channel mixer and residual."""

import pytest
import torch
from promises import CHECKS_OF_STREAMS, EXACT, FLOAT32, holds, holds_every_pair
from span_variants import (
    SPAN_FACTORS,
    SPAN_PAIRS,
    SPAN_VARIANTS,
    recurrent_span_subject,
    span_pair_subject,
    span_subject,
)

from hybridlm.testing import CHECKS, relative_error, state_influence

# bfloat16 may route a token otherwise
APART = {"compiled_decode", "long_input", "bf16_is_close"}
EVERY = [name for name in CHECKS if name not in APART]
THOROUGH = ["mod-nested", "merge-nested"]
CHECKS_OF_A_RULE = [
    "chunked_continuation",
    "step_is_scan",
    "causal_by_gradient",
    "pads_in_stream",
    "packed_with_pads",
    "packed_gradients",
    "rows_move_with_the_cache",
    "rollback_across_documents",
    "anything_goes",
    "static_with_pads",
    "gradient_checkpointing",
    "losses_add_up",
    "packed_losses_add_up",
    "missing_keys",
    "float32_islands",
    "prompt_lookup",
]
CHECKS_OF_A_PAIR = [
    "step_is_scan",
    "left_padding",
    "right_padding",
    "packed_with_pads",
    "packed_gradients",
    "anything_goes",
    "static_with_pads",
    "gradient_checkpointing",
    "saved_is_loaded",
    "missing_keys",
]


@pytest.mark.parametrize("check", EVERY)
@pytest.mark.parametrize("variant", THOROUGH)
def test_nested_spans_keep_every_promise(variant, check):
    holds(check, span_subject(variant))


@pytest.mark.parametrize("check", CHECKS_OF_A_RULE)
@pytest.mark.parametrize("variant", [name for name in SPAN_VARIANTS if name not in THOROUGH])
def test_every_rule_of_a_span_keeps_the_promises(variant, check):
    holds(check, span_subject(variant))


@pytest.mark.parametrize("check", CHECKS_OF_A_PAIR)
@pytest.mark.parametrize("name", SPAN_PAIRS)
def test_every_span_around_every_part_keeps_the_promises(name, check):
    holds(check, span_pair_subject(name))


def test_the_pairs_of_spans_hold_every_pair():
    holds_every_pair(SPAN_FACTORS, SPAN_PAIRS.values())


@pytest.mark.parametrize("variant", SPAN_VARIANTS)
def test_some_tokens_enter_a_span_and_some_do_not(variant):
    subject = span_subject(variant)
    taken = subject.model(subject.input_ids, output_router_logits=True).span_taken
    for number, mask in enumerate(taken):
        assert 0.05 < mask.double().mean() < 0.95, f"span {number}"


@pytest.mark.parametrize("variant", SPAN_VARIANTS)
def test_dropping_any_part_of_the_state_moves_the_logits_by_a_hundredth_of_their_scale(variant):
    influence = state_influence(span_subject(variant))
    assert min(influence.values()) >= 0.01, influence


@pytest.mark.parametrize("check", CHECKS_OF_STREAMS)
@pytest.mark.parametrize("variant", ["mod-random", "mod-ceiling", "merge-stride-mean"])  # no scores, no near ties
def test_the_promises_hold_in_float32(variant, check):
    holds(check, span_subject(variant, torch.float32), FLOAT32)


@pytest.mark.parametrize(
    "variant",
    ["mod-threshold", "mod-ceiling", "mod-nested", "merge-learned-mean", "merge-around_depths", "merge-nested"],
)
def test_long_inputs_give_no_nan(variant):
    holds("long_input", recurrent_span_subject(variant))


@pytest.mark.parametrize(
    "variant", ["mod-threshold", "mod-ceiling", "mod-nested", "merge-learned-mean", "merge-nested"]
)
def test_a_compiled_decoding_step_gives_the_eager_logits(variant):
    holds("compiled_decode", span_subject(variant))


@pytest.mark.parametrize("variant", ["mod-threshold", "mod-nested", "merge-learned-mean", "merge-nested"])
def test_spans_run_in_bfloat16_without_nan(variant):
    model = span_subject(variant).copy_of_model().to(torch.bfloat16)
    logits = model(span_subject(variant).input_ids).logits
    assert logits.dtype == torch.bfloat16
    assert bool(logits.isfinite().all())


@pytest.mark.parametrize("name", SPAN_PAIRS)
def test_recorded_hidden_states_are_those_of_all_tokens_whatever_the_calls(name):
    subject, ids = span_pair_subject(name), span_pair_subject(name).input_ids
    with torch.no_grad():
        whole = subject.model(ids, output_hidden_states=True).hidden_states
        cache = subject.new_cache()
        parts = [
            subject.model(x, past_key_values=cache, output_hidden_states=True).hidden_states for x in ids.split(9, 1)
        ]
    assert len(whole) == subject.model.config.num_hidden_layers + 1
    for depth, state in enumerate(whole):
        assert state.shape == (*ids.shape, subject.model.config.hidden_size)
        assert relative_error(torch.cat([part[depth] for part in parts], dim=1), state) <= EXACT
