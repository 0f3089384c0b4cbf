"""The promises, on whole models: every option of every registered part, and every pair of parts.

A test's id is the promise and the part that keeps it, e.g. `step_is_scan-mamba`.
"""

import pytest
import torch
from promises import CHECKS_OF_STREAMS, EXACT, FLOAT32, holds, holds_every_pair
from transformers import DataCollatorWithFlattening
from variants import (
    CHANNEL_VARIANTS,
    FACTORS,
    IMPOSSIBLE,
    MAMBA,
    MAMBA2,
    MIXER_VARIANTS,
    PAIRWISE,
    STREAMS,
    STRUCTURES,
    TRIOS,
    build,
    channel_subject,
    hybrid_subject,
    mixer_subject,
    pairwise_subject,
    small,
    structure_subject,
)

from hybridlm import MIXERS
from hybridlm.testing import CHECKS, Subject, state_influence
from hybridlm.testing.base import NotApplicable

SLOW = {"compiled_decode", "long_input"}  # run apart, on fewer models
# bigger cases of these run apart
THOROUGH = [name for name in CHECKS if name not in SLOW]
FORGETFUL = "attention-window_of_one"
BASES = [*MIXERS, "attention-window_and_sinks", "attention-convolution"]

# what an option of a mixer, of a channel mixer, of the structure, or a pair of parts could break
MIXER_CHECKS = [
    "step_is_scan",
    "causal_by_gradient",
    "pads_in_stream",
    "packed_with_pads",
    "packed_by_cu_seq_lens",
    "packed_gradients",
    "caching_does_not_change_gradients",
    "anything_goes",
    "static_with_pads",
    "missing_keys",
    "float32_islands",
    "bf16_is_close",
]
CHANNEL_CHECKS = [
    "step_is_scan",
    "causal_by_gradient",
    "pads_in_stream",
    "packed_gradients",
    "padded_gradients",
    "rows_are_independent",
    "gradient_checkpointing",
    "losses_add_up",
    "packed_losses_add_up",
    "saved_is_loaded",
    "missing_keys",
    "float32_islands",
    "greedy_with_cache",
]
STRUCTURE_CHECKS = [
    "step_is_scan",
    "causal_by_perturbation",
    "packed_with_pads",
    "gradient_checkpointing",
    "losses_add_up",
    "saved_is_loaded",
    "missing_keys",
    "bf16_is_close",
]
# streams keep nothing between tokens: the longest rollbacks can tell nothing new of them
EXACT_CHECKS = [name for name in THOROUGH if name != "bf16_is_close"]
STREAM_CHECKS = [name for name in EXACT_CHECKS if name not in ("rollback_across_documents", "rollback_again_and_again")]
PAIR_CHECKS = [
    "chunked_continuation",
    "step_is_scan",
    "left_padding",
    "right_padding",
    "packed_by_position_ids",
    "packed_with_pads",
    "packed_gradients",
    "anything_goes",
    "static_with_pads",
    "gradient_checkpointing",
    "saved_is_loaded",
    "missing_keys",
]


REFUSED = {
    **{
        (variant, check): "the tokens of a batch depend on one another"
        for variant in ("moe-switch", "moe-gshard")
        for check in ("losses_add_up", "packed_losses_add_up")
    },
    ("moe-hash", "causal_by_gradient"): "inputs_embeds: routing='hash'",
}


@pytest.mark.parametrize("variant", BASES)
@pytest.mark.parametrize("check", THOROUGH)
def test_a_stack_of_one_mixer_keeps_every_promise(check, variant):
    holds(check, mixer_subject(variant))


@pytest.mark.parametrize("check", EXACT_CHECKS)
def test_a_hybrid_of_all_mixers_keeps_every_promise(check):
    holds(check, hybrid_subject())


@pytest.mark.parametrize("check", STREAM_CHECKS)
@pytest.mark.parametrize("residual", STREAMS)
def test_a_hybrid_of_all_mixers_with_several_streams_keeps_every_promise(residual, check):
    holds(check, hybrid_subject(residual=residual))


@pytest.mark.parametrize("residual", ["plain", *STREAMS])
@pytest.mark.parametrize("trio", TRIOS)
def test_a_hybrid_in_bfloat16_is_close_to_float32(trio, residual):
    holds("bf16_is_close", hybrid_subject(residual=residual, trio=trio))


@pytest.mark.parametrize("check", MIXER_CHECKS)
@pytest.mark.parametrize("variant", [name for name in MIXER_VARIANTS if name not in BASES])
def test_every_option_of_a_mixer_keeps_the_promises(variant, check):
    if (variant, check) == (FORGETFUL, "causal_by_gradient"):
        pytest.skip("no token depends on another")
    holds(check, mixer_subject(variant))


@pytest.mark.parametrize("check", CHANNEL_CHECKS)
@pytest.mark.parametrize("variant", CHANNEL_VARIANTS)
def test_every_option_of_a_channel_mixer_keeps_the_promises(variant, check):
    if (variant, check) in REFUSED:
        with pytest.raises((NotApplicable, ValueError), match=REFUSED[variant, check]):
            holds(check, channel_subject(variant))
    else:
        holds(check, channel_subject(variant))


@pytest.mark.parametrize("check", STRUCTURE_CHECKS)
@pytest.mark.parametrize("variant", STRUCTURES)
def test_every_norm_residual_and_multiplier_keeps_the_promises(variant, check):
    holds(check, structure_subject(variant))


@pytest.mark.parametrize("check", PAIR_CHECKS)
@pytest.mark.parametrize("name", PAIRWISE)
def test_every_pair_of_parts_keeps_the_promises(name, check):
    holds(check, pairwise_subject(name))


def test_the_pairwise_models_hold_every_pair():
    holds_every_pair(FACTORS, PAIRWISE.values(), IMPOSSIBLE)


@pytest.mark.parametrize("variant", [name for name in MIXER_VARIANTS if name != FORGETFUL])
def test_dropping_any_part_of_the_state_moves_the_logits_by_a_hundredth_of_their_scale(variant):
    influence = state_influence(mixer_subject(variant))
    for name, moved in influence.items():
        assert moved >= 0.01, f"{name} moves the logits by {moved:.1e} of their scale only"


@pytest.mark.parametrize("name", PAIRWISE)
def test_dropping_any_part_of_the_state_of_a_pairwise_model_moves_the_logits(name):
    assert min(state_influence(pairwise_subject(name)).values()) >= 0.01


@pytest.mark.parametrize("check", CHECKS_OF_STREAMS)
@pytest.mark.parametrize("variant", BASES)
def test_the_promises_hold_in_float32(variant, check):
    holds(check, mixer_subject(variant, torch.float32), FLOAT32)


@pytest.mark.parametrize("variant", BASES)
@pytest.mark.parametrize("style", ["steps", "one call"])
def test_rollback_takes_back_any_number_up_to_the_default_window(style, variant):
    holds("rollback", mixer_subject(variant), window=64, lengths=(90,), styles=(style,), batch_sizes=(1,))


@pytest.mark.parametrize("variant", BASES)
def test_rollback_takes_back_any_number_up_to_the_default_window_in_padded_rows(variant):
    options = {"window": 64, "lengths": (150,), "styles": ("calls",), "batch_sizes": (3,)}
    holds("rollback", mixer_subject(variant), depths=(1, 2, 31, 63, 64), **options)


@pytest.mark.parametrize(
    "subject",
    [
        hybrid_subject,
        *(lambda v=v: mixer_subject(v) for v in BASES),
        *(lambda v=v: hybrid_subject(residual=v) for v in STREAMS),
    ],
    ids=["hybrid", *BASES, *STREAMS],
)
def test_a_compiled_decoding_step_gives_the_eager_logits(subject):
    holds("compiled_decode", subject())


@pytest.mark.parametrize("variant", [name for name in MIXERS if name != "attention"])
def test_long_inputs_give_no_nan(variant):
    holds("long_input", mixer_subject(variant))


@pytest.mark.parametrize("residual", STREAMS)
def test_long_inputs_along_several_streams_give_no_nan(residual):
    layers = [(MAMBA, small("mlp")), (MAMBA2, small("swiglu"))]
    holds("long_input", Subject(build(layers, residual=STREAMS[residual])))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["attention", "attention-window_and_sinks"])
def test_long_inputs_to_attention_give_no_nan(variant):
    holds("long_input", mixer_subject(variant))


@pytest.mark.parametrize(
    "check", ["step_is_scan", "pads_in_stream", "packed_with_pads", "anything_goes", "static_with_pads"]
)
@pytest.mark.parametrize("variant", ["attention", "attention-window_and_sinks", "attention-everything"])
def test_eager_attention_keeps_the_promises(variant, check):
    model = mixer_subject(variant).copy_of_model()
    model.set_attn_implementation("eager")
    holds(check, Subject(model))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int32, torch.int64])
def test_a_mask_may_be_of_any_type(dtype):
    subject = hybrid_subject()
    mask = torch.ones_like(subject.input_ids)
    mask[1, :5] = mask[2, -3:] = 0
    logits = subject.forward(subject.input_ids, attention_mask=mask.to(dtype))
    assert torch.equal(logits, subject.forward(subject.input_ids, attention_mask=mask))


def test_the_flattening_collator_of_transformers_packs_documents_apart():
    subject = hybrid_subject()
    documents = [row[:length].tolist() for row, length in zip(subject.input_ids, (11, 1, 20), strict=True)]
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    batch = collate([{"input_ids": document} for document in documents])
    apart = [subject.forward(torch.tensor([document])) for document in documents]
    arguments = {name: value for name, value in batch.items() if name not in ("input_ids", "labels")}
    assert {"position_ids", "seq_idx", "cu_seq_lens_q", "max_length_q"} <= set(arguments)
    logits = subject.forward(batch["input_ids"], **arguments)
    assert subject.error(logits, torch.cat(apart, dim=1)) <= EXACT
    items = int((batch["labels"] != -100).sum())
    assert items == sum(len(document) - 1 for document in documents)
    model = subject.model
    with torch.no_grad():
        together = model(**batch, num_items_in_batch=items).loss
        rows = [torch.tensor([document]) for document in documents]
        losses = [model(input_ids=row, labels=row, num_items_in_batch=items).loss for row in rows]
    assert abs(float(together - sum(losses))) <= 1e-6 * float(together)
