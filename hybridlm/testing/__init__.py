"""The promises as checks that can be pointed at any causal language model.

    subject = Subject(model)
    error = CHECKS["chunked_continuation"](subject)  # largest error, relative to the largest logit

A check raises `NotApplicable` when the model does not offer what it is about.

    report = check_model("path/or/hub-id")  # any causal language model; a verdict and a reason for every check
"""

from . import (
    check_generation,
    check_loading,
    check_packing,
    check_padding,
    check_precision,
    check_rows,
    check_saving,
    check_stream,
    check_training,
)
from .base import Check, NotApplicable, Subject, relative_error
from .report import Report, Result
from .runner import check_model
from .stream import Stream
from .weights import scale_weights, state_influence

_FUNCTIONS = (
    check_stream.chunked_continuation,
    check_stream.step_is_scan,
    check_stream.last_logits_only,
    check_stream.embeddings_are_tokens,
    check_stream.causal_by_perturbation,
    check_stream.causal_by_gradient,
    check_stream.repeatable,
    check_stream.snapshots,
    check_stream.static_is_dynamic,
    check_stream.compiled_decode,
    check_padding.left_padding,
    check_padding.right_padding,
    check_padding.pads_in_stream,
    check_padding.chunks_of_pads,
    check_padding.mask_of_ones,
    check_padding.static_with_pads,
    check_packing.packed_by_position_ids,
    check_packing.packed_by_seq_idx,
    check_packing.packed_by_cu_seq_lens,
    check_packing.packed_with_pads,
    check_packing.packed_gradients,
    check_packing.padded_gradients,
    check_packing.caching_does_not_change_gradients,
    check_rows.rows_are_independent,
    check_rows.rows_move_with_the_cache,
    check_rows.rollback,
    check_rows.rollback_beyond_the_record,
    check_rows.rollback_again_and_again,
    check_rows.rollback_across_documents,
    check_rows.anything_goes,
    check_training.gradient_checkpointing,
    check_training.losses_add_up,
    check_training.packed_losses_add_up,
    check_saving.saved_is_loaded,
    check_loading.missing_keys,
    check_saving.float32_islands,
    check_precision.bf16_is_close,
    check_precision.recurrent_states_are_wide,
    check_precision.long_input,
    check_generation.greedy_with_cache,
    check_generation.left_padded_generation,
    check_generation.beams_with_cache,
    check_generation.prompt_lookup,
    check_generation.assisted,
    check_generation.prefill_in_chunks,
    check_generation.generation_goes_on,
    check_generation.generation_with_static_cache,
)

CHECKS: dict[str, Check] = {function.__name__: Check.of(function) for function in _FUNCTIONS}

__all__ = [
    "CHECKS",
    "Check",
    "NotApplicable",
    "Report",
    "Result",
    "Stream",
    "Subject",
    "check_model",
    "relative_error",
    "scale_weights",
    "state_influence",
]
