"""Which checks `hybridlm check` runs, on what, and how each is judged.

The rows of `EVERY` are for any causal language model; those of `OURS` hold models with `new_cache()` to the rest of
what they promise.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from . import (
    check_accumulation,
    check_any,
    check_documents,
    check_generation,
    check_loading,
    check_packing,
    check_padding,
    check_precision,
    check_processes,
    check_rows,
    check_saving,
    check_stream,
    check_training,
)
from .base import Differs, NotApplicable, Subject
from .foreign import ForeignSubject, names

_PROMISED = {torch.float64: 1e-9, torch.float32: 1e-4}


def tolerance(dtype: torch.dtype) -> float:
    """Largest relative error of two results that should be equal: what the project promises, or 16 roundings."""
    return _PROMISED.get(dtype, 16 * torch.finfo(dtype).eps)


@dataclass(frozen=True)
class Row:
    """One line of a report.

    Attributes:
        name: How it is selected.
        function: Measures the error, see `base.Check`.
        compared: What is compared with what.
        kind: "logits", "gradient", "loss", "bits" or "bf16": how the tolerance follows from the dtype.
        needs: "generate", "compile" or "workers": what the model, or the check, must have.
        ours: Options for models with `new_cache()`.
        foreign: Options for all others.
        within_window: Whether the text is cut to the attention window of a model that is not ours, see `narrowed`.
        bare: Whether positions are left to a model that is not ours.
        in_float32: Whether one that is not ours is held in float32: it may keep some weights in that whatever it is
            loaded in.
    """

    name: str
    function: Callable[..., float]
    compared: str
    kind: str = "logits"
    needs: str = ""
    ours: Mapping[str, Any] = field(default_factory=dict)
    foreign: Mapping[str, Any] = field(default_factory=dict)
    within_window: bool = False
    bare: bool = False
    in_float32: bool = False

    @property
    def promise(self) -> str:
        """One line, from the docstring of the function."""
        return inspect.getdoc(self.function).splitlines()[0].rstrip(".")

    def tolerance(self, dtype: torch.dtype) -> float:
        """Largest error that is ok when the model computes in `dtype`."""
        if self.kind == "bits":
            return 0.0
        if self.kind == "bf16":
            return tolerance(torch.bfloat16)
        if self.kind == "loss" and dtype == torch.float64:
            dtype = torch.float32  # transformers' cross entropy computes in float32
        return tolerance(dtype) * (10 if self.kind in ("gradient", "loss") else 1)

    def run(self, subject: Subject, **options: Any) -> float:
        """Measure the largest relative error.

        Raises:
            NotApplicable: The model does not offer what the row is about.
        """
        self._check_needs(subject)
        if not isinstance(subject, ForeignSubject):
            return self.function(subject, **{**self.ours, **options})
        if self.within_window:
            subject = narrowed(subject)
        if self.bare:
            return self._run_bare(subject)
        return self.function(subject, **{**self.foreign, **options})

    def _run_bare(self, subject: ForeignSubject) -> float:
        error = self.function(subject.without_positions())
        if error > 1e-3 and names(subject.model, "position_ids"):
            told = self.function(subject)
            effect = "right" if told < 1e-3 else f"wrong too (error {told:.1e})"
            raise Differs(error, f"without position_ids; with them it is {effect}")
        return error

    def _check_needs(self, subject: Subject) -> None:
        if self.needs == "generate" and not hasattr(subject.model, "generate"):
            raise NotApplicable("the model has no generate()")
        if self.needs == "compile" and not getattr(subject.model, "_can_compile_fullgraph", True):
            raise NotApplicable("the class says _can_compile_fullgraph = False")


def narrowed(subject: ForeignSubject, shortest: int = 14) -> ForeignSubject:
    """The same model with a text that fits into its attention window.

    transformers' windows count columns of the cache. Pads inside a row use them up, which no model claims to mend.

    Raises:
        NotApplicable: The window is too short for any text.
    """
    window = subject.window
    if window is None or window >= subject.input_ids.shape[1] + 1:
        return subject
    if window < shortest:
        raise NotApplicable(f"the attention window of {window} columns counts pads, and no text fits into it")
    return subject.like(subject.model, subject.input_ids[:, : window - 1])


EVERY = (
    Row("state_matters", check_any.state_matters, "next logits with one state tensor zeroed, and without", "bits"),
    Row("repeatable", check_stream.repeatable, "two calls", "bits"),
    Row("chunked_continuation", check_stream.chunked_continuation, "4 random splits, full forward", bare=True),
    Row("step_is_scan", check_stream.step_is_scan, "single tokens, full forward", bare=True),
    Row("left_padding", check_padding.left_padding, "widths 1, 3 and 17, whole and decoded, rows without pads"),
    Row(
        "left_padded_generation",
        check_generation.left_padded_generation,
        "a padded batch by generate(), each row alone",
        needs="generate",
    ),
    Row(
        "right_padding",
        check_padding.right_padding,
        "right-padded prompts, then decoding by forward, rows without pads",
        within_window=True,
    ),
    Row("packed_position_ids", check_documents.packed_by_positions, "packed row, documents apart", "gradient"),
    Row(
        "packed_position_ids_default_cache",
        check_documents.packed_by_positions_with_default_cache,
        "packed row without use_cache=False, documents apart",
        "gradient",
    ),
    Row("packed_seq_idx", check_documents.packed_by_seq_idx, "packed row, documents apart", "gradient"),
    Row("packed_cu_seq_lens", check_documents.packed_by_cu_seq_lens, "packed row, documents apart", "gradient"),
    Row("packed_seq_idx_alone", check_documents.packed_by_seq_idx_alone, "packed row, documents apart", "gradient"),
    Row(
        "packed_cu_seq_lens_alone",
        check_documents.packed_by_cu_seq_lens_alone,
        "packed row, documents apart",
        "gradient",
    ),
    Row("causal_by_perturbation", check_stream.causal_by_perturbation, "4 edited tokens, logits before them"),
    Row("causal_by_gradient", check_stream.causal_by_gradient, "gradient of a logit at later inputs, zero", "gradient"),
    Row("rows_are_independent", check_rows.rows_are_independent, "each row alone, batch, reversed batch"),
    Row("reordered_rows", check_any.reordered_rows, "decoding after reorder_cache, full forward"),
    Row("repeated_and_selected_rows", check_any.repeated_and_selected_rows, "decoding after moves, full forward"),
    Row("greedy_with_cache", check_generation.greedy_with_cache, "generate() with cache, without", needs="generate"),
    Row("beams_with_cache", check_generation.beams_with_cache, "3 beams with cache, without", needs="generate"),
    Row("rollback", check_any.cropped, "decoding after crop(-1), (-3) and (-6), full forward"),
    Row("prompt_lookup", check_generation.prompt_lookup, "prompt look-up, greedy text", needs="generate"),
    Row("assisted", check_generation.assisted, "two assistants, greedy text", needs="generate"),
    Row("static_cache", check_any.static_cache, "a prompt and steps in a static cache, full forward"),
    Row(
        "generation_with_static_cache",
        check_generation.generation_with_static_cache,
        "generate() with a static cache, default cache",
        needs="generate",
    ),
    Row(
        "compiled_decode",
        check_stream.compiled_decode,
        "6 compiled steps (fullgraph), full forward",
        needs="compile",
        foreign={"dynamic": None, "most_graphs": None},
    ),
    Row(
        "prefill_in_chunks",
        check_generation.prefill_in_chunks,
        "generate(prefill_chunk_size=5), without",
        needs="generate",
    ),
    Row(
        "generation_goes_on",
        check_generation.generation_goes_on,
        "two generate() through one cache, one long",
        needs="generate",
    ),
    Row("snapshots", check_stream.snapshots, "copied, restored and reloaded caches, full forward"),
    Row(
        "snapshot_elsewhere",
        check_processes.snapshot_elsewhere,
        "a saved cache in another process, here",
        needs="workers",
    ),
    Row(
        "saved_is_loaded",
        check_saving.saved_is_loaded,
        "weights and logits after a round trip, before",
        "bits",
        in_float32=True,
    ),
    Row("missing_keys", check_loading.missing_keys, "parameters that a file lacks, those of new models", "bits"),
    Row(
        "remote_code",
        check_processes.remote_code,
        "shipped code in a process without the package, here",
        needs="workers",
    ),
    Row("bf16_is_near", check_any.bf16_is_near, "median RMS of a token's bfloat16 logits, float32", "bf16"),
    Row(
        "long_input",
        check_precision.long_input,
        "finite logits in bfloat16 after 4096 tokens",
        "bits",
        ours={"num_tokens": 4096},
        foreign={"num_tokens": 4096},
    ),
    Row("accumulation", check_accumulation.accumulation, "two micro-batches, one batch", "loss"),
    Row(
        "accumulation_with_router_losses",
        check_accumulation.accumulation_with_router_losses,
        "two micro-batches, one batch, auxiliary losses included",
        "loss",
    ),
    Row("gradient_checkpointing", check_training.gradient_checkpointing, "checkpointed step, plain step", "loss"),
    Row(
        "data_parallel",
        check_processes.data_parallel,
        "DDP of two gloo processes, one process",
        "loss",
        needs="workers",
    ),
)

OURS = (
    Row("static_is_dynamic", check_stream.static_is_dynamic, "chunks and steps in a static cache, full forward"),
    Row("pads_in_stream", check_padding.pads_in_stream, "pads anywhere in cached streams, full forwards"),
    Row("chunks_of_pads", check_padding.chunks_of_pads, "calls of pads only among others, full forwards"),
    Row("mask_of_ones", check_padding.mask_of_ones, "calls with and without a mask"),
    Row("static_with_pads", check_padding.static_with_pads, "padded rows in a static cache, full forward"),
    Row("packed_chunks_by_position_ids", check_packing.packed_by_position_ids, "packed rows in chunks, documents"),
    Row("packed_chunks_by_seq_idx", check_packing.packed_by_seq_idx, "packed rows in chunks, documents"),
    Row("packed_chunks_by_cu_seq_lens", check_packing.packed_by_cu_seq_lens, "a packed row in chunks, documents"),
    Row("packed_with_pads", check_packing.packed_with_pads, "packed and padded rows in chunks, documents"),
    Row("padded_gradients", check_packing.padded_gradients, "padded batch, rows alone", "gradient"),
    Row(
        "caching_does_not_change_gradients",
        check_packing.caching_does_not_change_gradients,
        "gradients with and through a cache, without",
        "gradient",
    ),
    Row(
        "rollback_again_and_again",
        check_rows.rollback_again_and_again,
        "drafts taken back in part, full forwards",
        ours={"rounds": 6},
    ),
    Row("rollback_beyond_the_record", check_rows.rollback_beyond_the_record, "crop() beyond the record, an error"),
    Row("anything_goes", check_rows.anything_goes, "random events in one stream, full forwards"),
    Row("losses_add_up", check_training.losses_add_up, "padded micro-batches, one batch", "loss"),
    Row("packed_losses_add_up", check_training.packed_losses_add_up, "documents, packed row", "loss"),
    Row("recurrent_states_are_wide", check_precision.recurrent_states_are_wide, "types in a bfloat16 model", "bits"),
    Row("float32_islands", check_saving.float32_islands, "types and bits after casts", "bits"),
)

ROWS = {row.name: row for row in (*EVERY, *OURS)}


def rows_for(subject: Subject, select: list[str] | None = None) -> list[Row]:
    """The rows that a model is held to, or those of them that were selected.

    Args:
        subject: The model under test.
        select: Names of rows, or beginnings of names; all by default.
    """
    rows = EVERY if isinstance(subject, ForeignSubject) else (*EVERY, *OURS)
    return [row for row in rows if select is None or any(row.name.startswith(start) for start in select)]


def check_selection(select: list[str]) -> None:
    """Refuse a selection that matches no row.

    Raises:
        ValueError: With all names.
    """
    for start in select:
        if not any(name.startswith(start) for name in ROWS):
            raise ValueError(f"select: no check is called {start!r}, expected one of {list(ROWS)}, or how it begins")
