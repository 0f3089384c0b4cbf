"""Remove each guard of the state from each mixer in turn, run the contract tests, and see a named test fail.

    python tests/mutants.py                               the table; exit status 1 if a mutant survives
    python tests/mutants.py --mutant mamba:initial_state  the tests of one mutant, in full

A guard is what makes a promise true inside a mixer: a document that begins resets the state, a pad leaves it alone, a
call begins from the state that it is given, and `crop` restores an earlier one.
"""

import argparse
import contextlib
import io
import multiprocessing
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "unit")]

GUARDS = {
    "document_reset": "a document that begins forgets the one before",
    "pad_identity": "a pad changes no state",
    "initial_state": "a call begins from the state that it is given",
    "state_rollback": "crop restores an earlier state",
}
LONG_INPUTS = "test_long_inputs_leave_reads_memory_and_gradients_bounded_whatever_the_gates"
OWN_CHUNKS = "test_the_outer_gradient_of_a_deep_memory_does_not_grow_with_tokens_that_are_chunks_of_their_own"
ONE_CHUNK = "test_a_chunk_moves_the_memory_by_its_bounds_at_most_however_large_the_learned_weights_are"
PROJECTIONS = "test_projections_of_any_size_leave_a_memory_bounded"
# guards of one mixer alone, and the test in its own file that must see them gone
OWN_GUARDS = {
    ("memorizing", "window_border"): "test_the_store_holds_the_last_tokens_that_left_the_window_of_the_own_document",
    ("memorizing", "store_border"): "test_the_store_holds_the_last_tokens_that_left_the_window_of_the_own_document",
    ("memorizing", "store_order"): "test_of_equal_keys_the_latest_are_chosen_however_the_sequence_is_cut",
    ("memorizing", "rounded_similarity"): "test_of_equal_keys_the_latest_are_chosen_however_the_sequence_is_cut",
    ("memorizing", "detached_memory"): "test_the_gradient_reaches_the_window_and_the_store_only_if_it_is_not_detached",
    ("neural_memory", "momentum_share"): LONG_INPUTS,
    ("neural_memory", "chunk_share"): LONG_INPUTS,
    ("neural_memory", "deep_share"): OWN_CHUNKS,
    ("neural_memory", "window_share"): ONE_CHUNK,
    ("neural_memory", "unit_keys"): PROJECTIONS,
    ("neural_memory", "unit_values"): PROJECTIONS,
    ("neural_memory", "max_gradient"): ONE_CHUNK,
    ("neural_memory", "max_curvature"): ONE_CHUNK,
    ("neural_memory", "min_forgetting"): "test_a_memory_that_is_pushed_one_way_for_ever_stays_in_a_ball",
    ("titans_mac", "context_prefix"): "test_no_token_reaches_what_comes_before_it_by_value_or_by_gradient",
    ("titans_mac", "memory_before_segment"): "test_no_token_reaches_what_comes_before_it_by_value_or_by_gradient",
    ("transformer_xl", "segment_border"): "test_it_is_the_paper_s_loop_over_segments",
    ("transformer_xl", "memory_border"): "test_the_context_grows_by_the_memory_with_every_layer",
    ("transformer_xl", "detached_memory"): "test_the_gradient_stops_exactly_at_the_border_of_the_segment",
}
HALVES = ("convolution", "recurrence")  # of a mixer with both, a guard can be removed from one alone
# removing it changes nothing that a test could see
NO_GUARD = {
    ("attention", "state_rollback"): "cannot exist: a key lies at its token's index, and no query sees a larger index",
}
CHECKS = (
    "chunked_continuation",
    "right_padding",
    "pads_in_stream",
    "packed_by_seq_idx",
    "packed_gradients",
    "rollback_again_and_again",
    "anything_goes",
)
PART_TESTS = (
    "test_forward_is_the_reference",
    "test_whatever_pads_hold_the_state_is_that_of_the_real_tokens",
    "test_a_document_that_begins_forgets_everything",
)


def mixers():
    """The mixers by the names of their variants: every registered one, attention with a window or a convolution."""
    from test_contract_models import BASES

    return list(BASES)


def built(mixer):
    """A mixer as its variant builds it."""
    from variants import MIXER_VARIANTS, build

    return build([(MIXER_VARIANTS[mixer], None)]).model.layers[0].mixer


def mutants(mixer):
    """The cells of a mixer: `(mixer, guard)`, where a guard may name a half: `"initial_state/convolution"`."""
    import torch

    part = built(mixer)
    halves = () if getattr(part, "conv1d", None) is None else HALVES
    if halves and "recurrent_states" not in part.state_spec(1, torch.float32):
        halves = halves[:1]  # attention without its convolution, and memories, have cells of their own
    cells = []
    for guard in GUARDS:
        cells.append((mixer, guard))
        if guard != "state_rollback":
            cells += [(mixer, f"{guard}/{half}") for half in halves]
    return cells + [cell for cell in OWN_GUARDS if cell[0] == mixer]


def without_borders(sequence):
    """The call as one document, which goes on from the past."""
    nothing = dict.fromkeys(("starts", "segment_ids", "doc_start", "past_doc_start"))
    return replace(sequence, **nothing, memo={})


def with_pads_as_tokens(sequence, state, half):
    """The call with its pads taken for tokens."""
    if half == "recurrence":
        return replace(sequence, token_mask=None, memo={})
    sequence = replace(sequence, lengths=None, token_mask=None, memo={})
    if hasattr(state, "append"):  # pads take a place among the keys
        start = state.length
        index = start + sequence.index - sequence.index[:, :1]
        sequence = replace(sequence, index=index, uniform_past=start if state.max_length is None else None)
    return sequence


def without_state(state, half):
    """No state, or one with a half of it set to zero."""
    if half is None or state is None:
        return None
    if hasattr(state, "append"):  # beside the keys
        state.convolution.state = without_state(state.convolution.state, half)
        return state
    name = {"convolution": "conv_states", "recurrence": "recurrent_states"}[half]
    return replace(state, **{name: getattr(state, name) * 0})


def break_forward(mixer, guard, half):
    """Patch the mixer's class; instances of another variant of it (attention with a window) are left alone."""

    part, window = type(built(mixer)), getattr(built(mixer), "window", None)
    forward = part.forward

    def broken(self, hidden_states, state=None, sequence=None):
        if sequence is None or getattr(self, "window", None) != window:
            return forward(self, hidden_states, state, sequence)
        if guard == "initial_state":
            state = without_state(state, half)
        elif guard == "pad_identity" and half == "convolution":
            break_convolution(self, sequence.starts, None)
        elif guard == "pad_identity":
            sequence = with_pads_as_tokens(sequence, state, half)
        elif half is None:
            sequence = without_borders(sequence)
        else:
            sequence = break_border(self, sequence, half)
        return forward(self, hidden_states, state, sequence)

    part.forward = broken


def break_own(mixer, guard):
    """Remove a guard that only this mixer has: change an option during its forward, or what it calls."""
    import torch

    from hybridlm import MIXERS
    from hybridlm.modeling import mixer_memorizing

    part = MIXERS[mixer]
    if guard == "context_prefix":  # what the memory says of all tokens of the segment
        visible = part.visible

        def all_of_the_context(piece, num_slots):
            shown = visible(piece, num_slots).clone()
            shown[..., :num_slots] = True
            return shown

        part.visible = staticmethod(all_of_the_context)
        return
    if guard == "memory_before_segment":  # the gate reads the memory that has learned the segment
        learn = part._learn

        def learn_early(self, fast, weights, *others):
            after = learn(self, fast, weights, *others)
            weights[:] = self.network.weights(after.memory)
            return after

        part._learn = learn_early
        return
    if guard == "store_order":  # of equal keys the earliest
        find = mixer_memorizing.nearest

        def earliest(similarity, visible, count):
            return similarity.shape[-1] - 1 - find(similarity.flip(-1), visible.flip(-1), count)

        mixer_memorizing.nearest = earliest
        return
    if guard == "rounded_similarity":  # whatever a sort of the similarities themselves gives
        mixer_memorizing.nearest = lambda similarity, visible, count: (
            similarity.masked_fill(~visible, -torch.inf).topk(count, dim=-1).indices
        )
        return
    name, change = {
        "window_border": ("window", 1),
        "store_border": ("memory_size", -1),
        "segment_border": ("segment_size", 1),
        "memory_border": ("memory_size", -1),
        "detached_memory": ("detach_memory", None),
    }[guard]
    forward = part.forward

    def broken(self, *arguments, **named):
        kept = getattr(self, name)
        setattr(self, name, not kept if change is None else kept + change)
        try:
            return forward(self, *arguments, **named)
        finally:
            setattr(self, name, kept)

    part.forward = broken


def break_bound(guard):
    """Remove a bound of the neural memory's update."""
    import torch

    from hybridlm.modeling.memory import MemoryNetwork
    from hybridlm.modeling.memory_gates import DEEP_SHARES, MemoryGates
    from hybridlm.modeling.neural_memory import NeuralMemory

    factors = {
        "momentum_share": lambda gates, log_eta: -1 / torch.expm1(log_eta) if gates.momentum else 1.0,
        "chunk_share": lambda gates, log_eta: gates.shares,
        "deep_share": lambda gates, log_eta: gates.shares if gates.shares == DEEP_SHARES else 1.0,
        "window_share": lambda gates, log_eta: gates.window,
    }
    if guard in factors:
        choose = MemoryGates.forward

        def faster(self, hidden_states):
            theta, log_eta, *others = choose(self, hidden_states).unbind(-1)
            return torch.stack([theta * factors[guard](self, log_eta), log_eta, *others], dim=-1)

        MemoryGates.forward = faster
        return
    if guard in ("unit_keys", "unit_values"):
        associate, place = NeuralMemory.associate, {"unit_keys": 0, "unit_values": 1}[guard]

        def of_any_length(self, mixed, gates):
            queries, tokens = associate(self, mixed, gates)
            plain = torch.nn.functional.silu(mixed).unflatten(-1, (3, self.num_heads, self.head_dim))
            columns = slice(place * self.head_dim, (place + 1) * self.head_dim)
            tokens[..., columns] = plain[..., place + 1, :, :]
            return queries, tokens

        NeuralMemory.associate = of_any_length
        return
    owner, nothing = (MemoryGates, 0.0) if guard == "min_forgetting" else (MemoryNetwork, None)
    build = owner.__init__

    def without(self, *arguments, **named):
        build(self, *arguments, **named)
        setattr(self, guard, nothing)

    owner.__init__ = without


def break_convolution(part, starts, lengths):
    """Let the convolution see these borders and lengths, whatever the call says."""
    convolve = type(part.conv1d).forward
    part.conv1d.forward = lambda inputs, tail=None, *_: convolve(part.conv1d, inputs, tail, starts, lengths)


def break_border(part, sequence, half):
    """Let documents run into one another in one half of a mixer."""
    break_convolution(part, None if half == "convolution" else sequence.starts, sequence.lengths)
    return sequence if half == "convolution" else without_borders(sequence)


def break_rollback(mixer):
    """Let `crop` keep the state that counts the removed tokens in."""

    from hybridlm.modeling.cache_entries import AttentionEntry, RecurrentEntry

    if mixer == "attention":
        AttentionEntry.rollback = lambda *_: None
    part, window = type(built(mixer)), getattr(built(mixer), "window", None)
    run = RecurrentEntry.run

    def broken(self, module, hidden_states, sequence):
        module_of = getattr(module, "__self__", module)  # a method of attention, where it convolves
        if isinstance(module_of, part) and getattr(module_of, "window", None) == window:
            self.stale = False
        return run(self, module, hidden_states, sequence)

    RecurrentEntry.run = broken


def tests_of(mixer, guard):
    """The quick contract tests of a mixer, or the test of a guard of its own."""
    if (mixer, guard) in OWN_GUARDS:
        return [f"{ROOT}/tests/unit/test_{mixer}.py::{OWN_GUARDS[mixer, guard]}"]
    models, parts = ROOT / "tests/unit/test_contract_models.py", ROOT / "tests/unit/test_mixer_contract.py"
    checks = [f"{models}::test_a_stack_of_one_mixer_keeps_every_promise[{check}-{mixer}]" for check in CHECKS]
    return checks + [f"{parts}::{test}[{mixer}]" for test in PART_TESTS]


class Recorder:
    """Remembers which tests ran and which failed."""

    def __init__(self):
        self.ran, self.failed = [], []

    def pytest_runtest_logreport(self, report):
        name = report.nodeid.split("::")[-1]
        if report.when == "call":
            self.ran.append(name)
        if report.failed:
            self.failed.append(name)


def run_mutant(cell, loud=False):
    """Break one mixer in this process and run its tests; return what ran, what failed, and what was printed."""
    import pytest

    mixer, (guard, _, half) = cell[0], cell[1].partition("/")
    if cell in OWN_GUARDS and mixer == "neural_memory":
        break_bound(guard)
    elif cell in OWN_GUARDS:
        break_own(*cell)
    elif guard == "state_rollback":
        break_rollback(mixer)
    elif guard != "none":
        break_forward(mixer, guard, half or None)
    recorder, printed = Recorder(), io.StringIO()
    arguments = ["-q", "-p", "no:cacheprovider", "--tb=short", f"--rootdir={ROOT}", *tests_of(*cell)]
    with contextlib.nullcontext() if loud else contextlib.redirect_stdout(printed):
        pytest.main(arguments, [recorder])
    return recorder.ran, recorder.failed, printed.getvalue()


def describe(cell, ran, failed, printed):
    """The last column of a line, and whether the cell is as it must be."""
    if len(ran) < len(tests_of(*cell)):
        return f"the tests did not run: {printed[-2000:]}", False
    if cell[1] == "none":
        return f"all {len(ran)} tests pass" if not failed else f"FAILS {failed}", not failed
    if failed:
        return f"{failed[0]} ({len(failed)} of {len(ran)} fail)", True
    return NO_GUARD.get(cell, f"SURVIVES all {len(ran)} tests"), cell in NO_GUARD


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutant", help="mixer:guard, or mixer:guard/half; mixer:none changes nothing")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 4))
    arguments = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if arguments.mutant:
        return bool(run_mutant(tuple(arguments.mutant.split(":")), loud=True)[1])
    started, good = time.time(), True
    cells = [cell for mixer in mixers() for cell in [(mixer, "none"), *mutants(mixer)]]
    print(f"{'mixer':28}{'removed guard':28}failing test", flush=True)
    # every mutant is a fork of this process, which has imported everything, and is patched and gone after its tests
    with multiprocessing.get_context("fork").Pool(arguments.jobs, maxtasksperchild=1) as pool:
        for cell, result in zip(cells, pool.imap(run_mutant, cells), strict=True):
            text, fine = describe(cell, *result)
            good &= fine
            print(f"{cell[0]:28}{cell[1]:28}{text}", flush=True)
    print(f"{len(cells)} cells in {time.time() - started:.0f} s: {'every mutant is caught' if good else 'NOT GOOD'}")
    return not good


if __name__ == "__main__":
    sys.exit(main())
