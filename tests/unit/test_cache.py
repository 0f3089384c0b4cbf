"""The cache: how its buffers grow, what it counts, what it refuses, how it is copied, moved and continued elsewhere."""

import copy
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from variants import ATTENTION, MAMBA, WINDOW, build, hybrid_subject, mixer_subject

from hybridlm.testing import Stream, Subject

BASES = ["attention", "attention-window_and_sinks", "mamba", "mamba2"]


def ids(subject, start, stop):
    return subject.input_ids[:, start:stop]


def filled(subject, *calls, cache=None):
    """A cache after calls of so many tokens."""
    cache, start = subject.new_cache() if cache is None else cache, 0
    for length in calls:
        subject.forward(ids(subject, start, start + length), cache)
        start += length
    return cache


def goes_on(subject, cache, start):
    """Error of what follows after the first `start` tokens of the text."""
    logits = [subject.forward(ids(subject, t, t + 1), cache) for t in (start, start + 1)]
    logits.append(subject.forward(ids(subject, start + 2, start + 5), cache))
    return subject.error(torch.cat(logits, dim=1), subject.reference[:, start : start + 5])


# what it holds ----------------------------------------------------------------------------------------------------


def test_keys_grow_by_doubling():
    subject = Subject(build([(ATTENTION, None)]), num_tokens=300, batch_size=1)
    cache, addresses = subject.new_cache(), []
    for t in range(300):
        subject.forward(ids(subject, t, t + 1), cache)
        addresses.append(cache.layers[0].mixer.state.keys.data_ptr())
    moves = sum(a != b for a, b in zip(addresses, addresses[1:], strict=False))
    assert moves <= math.ceil(math.log2(300)) - 4  # the first buffer has room for 64


@pytest.mark.parametrize("variant", BASES)
@pytest.mark.parametrize("calls", [(1,), (5, 1, 1), (20,)])
def test_bytes_are_those_of_the_state_spec(variant, calls):
    subject = mixer_subject(variant)
    cache = filled(subject, *calls)
    dtype = subject.model.dtype
    expected = 0
    for layer in subject.model.model.layers:
        for shape, kind in layer.mixer.state_spec(sum(calls), dtype).values():
            expected += len(subject.input_ids) * math.prod(shape) * kind.itemsize
    assert cache.nbytes == expected


@pytest.mark.parametrize("variant", ["attention-window_and_sinks", "mamba", "mamba2"])
def test_a_bounded_state_stays_bounded(variant):
    subject = mixer_subject(variant)
    assert filled(subject, 1).nbytes == filled(subject, 30, 1, 1).nbytes


def test_static_tensors_keep_their_address_through_calls_and_resets():
    subject = hybrid_subject()
    cache = filled(subject, 3, cache=subject.new_cache(static=True, max_length=30))
    tensors = [t for layer in cache.layers for t in layer.named_tensors().values()]
    addresses = [tensor.data_ptr() for tensor in tensors]
    for start, stop in ((3, 4), (4, 9)):
        subject.forward(ids(subject, start, stop), cache)
    cache.reset()
    filled(subject, 4, 1, cache=cache)
    assert [t.data_ptr() for layer in cache.layers for t in layer.named_tensors().values()] == addresses


def test_a_full_row_of_a_static_cache_takes_pads_while_another_goes_on():
    subject = hybrid_subject()
    tokens = subject.input_ids[:2, :8]
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, 8:] = mask[1, 2:6] = 0
    padded = torch.zeros(2, 12, dtype=torch.long)
    for row in range(2):
        padded[row, mask[row].bool()] = tokens[row]
    expected = subject.forward(tokens, None)
    for calls in ([1] * 12, [7, 5]):
        cache, logits, start = subject.model.new_cache(static=True, max_length=8), [], 0
        for length in calls:
            stop = start + length
            logits.append(subject.forward(padded[:, start:stop], cache, attention_mask=mask[:, :stop]))
            start = stop
        found = torch.cat(logits, dim=1)
        for row in range(2):
            assert subject.error(found[row, mask[row].bool()], expected[row]) < 1e-9


def test_a_cache_counts_columns_and_real_tokens():
    subject = hybrid_subject()
    cache = subject.new_cache()
    assert not cache.is_initialized
    assert cache.batch_size == -1
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 1]])
    subject.forward(ids(subject, 0, 4), cache, attention_mask=mask)
    assert cache.get_seq_length() == 4
    assert cache.get_mask_sizes(2) == (6, 0)
    assert cache.seen_tokens.tolist() == [4, 3, 1]
    assert cache.batch_size == 3
    assert cache.is_initialized
    cache.reset()
    assert cache.get_seq_length() == 0
    assert not cache.is_initialized


def test_a_layer_shows_its_tensors_under_the_names_of_transformers():
    subject = Subject(build([(ATTENTION, None), (MAMBA, None)]))
    attention, mamba = filled(subject, 4).layers
    assert attention.keys.shape == attention.values.shape == (3, 2, 4, 4)
    assert attention.recurrent_states is None
    assert mamba.conv_states.shape == (3, 32, 3)
    assert mamba.recurrent_states.shape == (3, 32, 4)
    assert mamba.keys is None
    with pytest.raises(NotImplementedError, match="filled by its own model"):
        attention.update(attention.keys, attention.values)
    with pytest.raises(NotImplementedError, match="crop the whole HybridCache"):
        attention.crop(-1)


def test_a_reset_cache_is_a_new_one():
    subject = hybrid_subject()
    cache = filled(subject, 7, 1)
    cache.reset()
    assert subject.error(subject.forward(subject.input_ids, cache), subject.reference) <= 1e-9


# rollback ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", BASES)
def test_the_record_is_at_most_two_windows_long(variant):
    subject, window = mixer_subject(variant), 4
    cache = subject.recording_cache(window)
    for t in range(30):
        subject.forward(ids(subject, t, t + 1), cache)
        recorded = sum(call.num_columns for call in cache.stream.calls)
        assert recorded <= 2 * window + 1
        for layer in cache.layers:
            inputs = getattr(layer.mixer, "inputs", [])
            assert sum(hidden.shape[1] for hidden, _ in inputs) <= 2 * window + 1


def test_the_record_of_a_long_call_is_its_end():
    subject = mixer_subject("mamba")
    cache = subject.recording_cache(4)
    subject.forward(subject.input_ids, cache)
    held = {hidden.untyped_storage().data_ptr(): hidden for hidden, _ in cache.layers[0].mixer.inputs}
    assert sum(hidden.shape[1] for hidden in held.values()) <= 4
    full = subject.input_ids.numel() * subject.model.config.hidden_size * 8
    assert sum(hidden.untyped_storage().nbytes() for hidden in held.values()) < full, (
        "a view keeps the whole call alive"
    )


def test_crop_says_what_it_cannot_do():
    subject = mixer_subject("mamba")
    cache = filled(subject, 5)
    assert not cache.is_croppable
    with pytest.raises(ValueError, match=r"activate_past_recording\(\)"):
        cache.crop(-1)
    cache.activate_past_recording()
    assert cache.is_croppable
    with pytest.raises(ValueError, match="expected 0 or -k"):
        cache.crop(3)
    with pytest.raises(ValueError, match="cannot take back 6 of 5 tokens"):
        cache.crop(-6)
    with pytest.raises(ValueError, match="cannot take back 2 tokens"):
        cache.crop(-2)
    cache.crop(0)
    assert goes_on(subject, cache, 5) <= 1e-9


def test_a_static_cache_is_neither_recorded_nor_cropped():
    subject = hybrid_subject()
    cache = filled(subject, 5, cache=subject.new_cache(static=True, max_length=20))
    assert cache.is_compileable
    assert not cache.is_croppable
    with pytest.raises(ValueError, match="a static cache cannot record its past"):
        cache.activate_past_recording()
    with pytest.raises(ValueError, match="crop"):
        cache.crop(-1)
    assert goes_on(subject, cache, 5) <= 1e-9


def test_crop_takes_a_tensor_without_dimensions():
    subject = hybrid_subject()
    cache = filled(subject, 9, cache=subject.recording_cache(6))
    cache.crop(torch.tensor(-3))
    assert goes_on(subject, cache, 6) <= 1e-9


def test_full_attention_is_cropped_without_a_record():
    subject = mixer_subject("attention")
    for depth in (1, 4, 9):
        cache = filled(subject, 8, 1)
        assert cache.is_croppable
        cache.crop(-depth)
        assert cache.get_seq_length() == 9 - depth
        assert goes_on(subject, cache, 9 - depth) <= 1e-9


@pytest.mark.parametrize("borders", ["position_ids", "seq_idx"])
def test_a_document_that_begins_after_an_unrecorded_crop_is_seen(borders):
    subject = mixer_subject("attention")
    stream = Stream(subject, 2, borders=borders)
    stream.feed([[(t, 0) for t in (3, 1, 4, 1, 5)]] * 2)
    stream.crop(2)
    stream.feed([[(9, 1), (2, 1), (6, 1)]] * 2)
    assert stream.check() <= 1e-9


def test_padded_or_packed_rows_need_a_record_even_in_full_attention():
    subject = mixer_subject("attention")
    cache, mask = subject.new_cache(), torch.ones(3, 5, dtype=torch.long)
    mask[1, :2] = 0
    subject.forward(ids(subject, 0, 5), cache, attention_mask=mask)
    with pytest.raises(ValueError, match=r"activate_past_recording\(\)"):
        cache.crop(-1)
    packed = subject.new_cache()
    subject.forward(ids(subject, 0, 5), packed, seq_idx=torch.tensor([[0, 0, 1, 1, 1]]))
    with pytest.raises(ValueError, match=r"activate_past_recording\(\)"):
        packed.crop(-1)


def test_recording_again_keeps_the_record_and_widens_the_window():
    subject = mixer_subject("mamba")
    cache = subject.recording_cache(3)
    filled(subject, 10, cache=cache)
    cache.activate_past_recording(8)
    cache.crop(-3)
    assert cache.record_window == 8
    subject.forward(ids(subject, 7, 18), cache)
    cache.crop(-8)
    assert goes_on(subject, cache, 10) <= 1e-9


def test_after_rows_move_only_what_follows_can_be_taken_back():
    subject = mixer_subject("mamba")
    cache = filled(subject, 6, cache=subject.recording_cache(4))
    cache.reorder_cache(torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="cannot take back"):
        cache.crop(-1)
    subject.forward(ids(subject, 6, 9), cache)
    cache.crop(-2)
    assert goes_on(subject, cache, 7) <= 1e-9


@pytest.mark.parametrize("move", ["reorder_cache", "batch_select_indices", "batch_repeat_interleave", "save"])
def test_between_a_crop_and_the_next_token_moves_and_files_are_refused(move, tmp_path):
    subject = mixer_subject("mamba")
    cache = filled(subject, 9, cache=subject.recording_cache(4))
    cache.crop(-2)
    argument = {"batch_repeat_interleave": 2, "save": tmp_path / "state"}.get(move, torch.tensor([2, 1, 0]))
    with pytest.raises(ValueError, match="feed a token after crop"):
        getattr(cache, move)(argument)
    assert goes_on(subject, cache, 7) <= 1e-9


# copies, files, other processes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", BASES)
@pytest.mark.parametrize("static", [False, True])
def test_a_copy_and_its_original_go_their_own_ways(variant, static):
    subject = mixer_subject(variant)
    options = {"static": True, "max_length": 30} if static else {}
    cache = filled(subject, 5, 1, cache=subject.new_cache(**options))
    snapshot = cache.snapshot()
    subject.forward(ids(subject, 20, 28), cache)  # other tokens than the copy will see
    assert goes_on(subject, snapshot, 6) <= 1e-9
    cache.restore(filled(subject, 8, cache=subject.new_cache(**options)))
    assert goes_on(subject, cache, 8) <= 1e-9


def test_a_snapshot_can_be_restored_more_than_once():
    subject = hybrid_subject()
    cache = filled(subject, 6)
    snapshot = cache.snapshot()
    for _ in range(3):
        assert goes_on(subject, cache, 6) <= 1e-9
        cache.restore(snapshot)


def test_a_copy_of_a_recording_cache_has_a_record_of_its_own():
    subject = hybrid_subject()
    cache = filled(subject, 9, 1, 1, cache=subject.recording_cache(6))
    other = copy.deepcopy(cache)
    other.crop(-4)
    cache.crop(-1)
    assert goes_on(subject, cache, 10) <= 1e-9
    assert goes_on(subject, other, 7) <= 1e-9


@pytest.mark.parametrize("variant", BASES)
def test_a_cache_filled_with_gradients_can_be_copied(variant):
    subject = mixer_subject(variant)
    cache = subject.new_cache()
    with torch.enable_grad():
        subject.model(input_ids=ids(subject, 0, 5), past_key_values=cache)
        logits = subject.model(input_ids=ids(subject, 5, 6), past_key_values=cache).logits
    assert goes_on(subject, copy.deepcopy(cache), 6) <= 1e-9
    logits.sum().backward()  # the original still knows where its tensors came from
    subject.model.zero_grad()


@pytest.mark.parametrize("padded", [False, True])
def test_a_saved_cache_is_loaded_into_another(padded, tmp_path):
    subject = hybrid_subject()
    stream = Stream(subject, 2, borders="seq_idx")
    rows = [[(1, 0), (2, 0), (3, 1), (4, 1)], [(5, 0), None if padded else (6, 0), (7, 0), (8, 1)]]
    stream.feed(rows)
    stream.cache.save(tmp_path / "new" / "folder")
    stream.cache = subject.new_cache()
    stream.cache.load(tmp_path / "new" / "folder")
    stream.feed([[(9, 1)], [(9, 1)]])
    stream.feed([[(9, 2), (3, 2)], [(9, 1), (2, 2)]])
    assert stream.check() <= 1e-9


def test_a_saved_static_cache_is_loaded_into_a_static_one(tmp_path):
    subject = hybrid_subject()
    filled(subject, 6, cache=subject.new_cache(static=True, max_length=20)).save(tmp_path)
    cache = subject.new_cache(static=True, max_length=20)
    cache.load(tmp_path)
    assert goes_on(subject, cache, 6) <= 1e-9
    with pytest.raises(ValueError, match="another max_length"):
        subject.new_cache().load(tmp_path)


def test_a_saved_cache_of_another_config_is_refused(tmp_path):
    filled(mixer_subject("mamba"), 3).save(tmp_path)
    other = mixer_subject("mamba2").new_cache()
    with pytest.raises(ValueError, match="another signature"):
        other.load(tmp_path)
    assert other.get_seq_length() == 0


CONTINUE = """
import sys
import torch
from hybridlm import HybridLMForCausalLM

folder, last = sys.argv[1:]
model = HybridLMForCausalLM.from_pretrained(folder + "/model", dtype=torch.float64).eval()
cache = model.new_cache()
cache.load(folder + "/cache")
with torch.no_grad():
    logits = model(input_ids=torch.load(folder + "/ids.pt"), past_key_values=cache).logits
torch.save(logits, last)
"""


def test_a_saved_cache_goes_on_in_another_process(tmp_path):
    subject = hybrid_subject()
    subject.model.save_pretrained(tmp_path / "model")
    filled(subject, 6, 1).save(tmp_path / "cache")
    torch.save(ids(subject, 7, 11), tmp_path / "ids.pt")
    command = [sys.executable, "-c", CONTINUE, str(tmp_path), str(tmp_path / "logits.pt")]
    root = Path(__file__).resolve().parents[2]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(root)})
    assert subject.error(torch.load(tmp_path / "logits.pt"), subject.reference[:, 7:11]) <= 1e-9


def test_tensors_go_to_the_cpu_and_back():
    subject = hybrid_subject()
    cache = filled(subject, 6)
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    assert goes_on(subject, cache, 6) <= 1e-9


def test_layers_without_state_need_no_place_in_the_cache():
    subject = Subject(build([(MAMBA, None), (None, {"name": "mlp", "intermediate_size": 8}), (WINDOW, None)]))
    cache = filled(subject, 6)
    assert cache.layers[1].named_tensors() == {}
    assert goes_on(subject, cache, 6) <= 1e-9
