"""Caches in `generate`: continued, given by the user, copied, static, and those that are refused."""

import copy
import gc
import pickle
import weakref
from importlib.metadata import version

import pytest
import torch
from stacks import STACKS, build, config_of, greedy, greedy_by_hand, left_padded, prompt, shared
from transformers import DynamicCache, StaticCache

from hybridlm import HybridCache, HybridLMForCausalLM

stacks = pytest.mark.parametrize("stack", STACKS)


@stacks
@pytest.mark.parametrize("options", [{}, {"prompt_lookup_num_tokens": 4}], ids=["greedy", "prompt-lookup"])
def test_a_second_generate_goes_on_with_the_returned_cache(stack, options):
    model, ids = shared(stack), prompt(length=6).repeat(1, 2)
    first = greedy(model, ids, 7, return_dict_in_generate=True, **options)
    assert isinstance(first.past_key_values, HybridCache)
    turn = torch.cat([first.sequences, prompt(length=4, seed=9)], dim=1)  # the user's next words
    expected = greedy_by_hand(model, turn, 8)
    text = greedy(model, turn, 8, past_key_values=first.past_key_values, **options)
    torch.testing.assert_close(text, expected)
    again = greedy(model, expected, 5, past_key_values=first.past_key_values)
    torch.testing.assert_close(again, greedy_by_hand(model, expected, 5))


def test_the_new_tokens_with_the_whole_mask_go_on_too():
    model, ids = shared("hybrid"), prompt()
    first = greedy(model, ids, 5, return_dict_in_generate=True)
    turn = torch.cat([first.sequences, prompt(length=4, seed=9)], dim=1)
    text = greedy(model, turn[:, 13:], 6, attention_mask=torch.ones_like(turn), past_key_values=first.past_key_values)
    torch.testing.assert_close(text[:, 5:], greedy_by_hand(model, turn, 6)[:, 18:])


def test_a_filled_cache_goes_on_in_chunks():
    model, ids = shared("hybrid"), prompt()
    first = greedy(model, ids, 5, return_dict_in_generate=True)
    turn = torch.cat([first.sequences, prompt(length=11, seed=9)], dim=1)
    options = {"past_key_values": first.past_key_values, "prefill_chunk_size": 4}
    if version("transformers") < "5.18":  # its chunked prefill feeds again what the cache holds: refused, not wrong
        with pytest.raises(ValueError, match="attention_mask: expected shape"):
            greedy(model, turn, 6, **options)
        return
    text = greedy(model, turn, 6, **options)
    torch.testing.assert_close(text, greedy_by_hand(model, turn, 6))


def test_a_second_generate_goes_on_in_a_padded_batch():
    model = shared("hybrid")
    rows = [prompt(length=n, seed=n)[0] for n in (8, 3)]
    batch = left_padded(rows)
    first = greedy(model, batch["input_ids"], 5, attention_mask=batch["attention_mask"], return_dict_in_generate=True)
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 5, dtype=torch.long)], dim=1)
    text = greedy(model, first.sequences, 6, attention_mask=mask, past_key_values=first.past_key_values)
    expected = torch.stack([greedy_by_hand(model, row[None], 11)[0, len(row) :] for row in rows])
    torch.testing.assert_close(text[:, 8:], expected)


@stacks
@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
def test_a_given_cache_is_used_and_filled(stack, static):
    model, ids = shared(stack), prompt(2)
    cache = model.new_cache(static=static, max_length=40 if static else None)
    text = greedy(model, ids, 8, past_key_values=cache, disable_compile=True)
    torch.testing.assert_close(text, greedy_by_hand(model, ids, 8))
    assert cache.get_seq_length() == 16
    text = greedy(model, text, 4, past_key_values=cache, disable_compile=True)
    torch.testing.assert_close(text, greedy_by_hand(model, ids, 12))
    cache.reset()
    torch.testing.assert_close(
        greedy(model, ids, 8, past_key_values=cache, disable_compile=True), greedy_by_hand(model, ids, 8)
    )


@stacks
def test_a_copied_cache_goes_its_own_way(stack):
    model, ids = shared(stack), prompt()
    system = model.new_cache()
    with torch.no_grad():
        model(ids, past_key_values=system)
    for seed in (3, 4, 5):
        turn = torch.cat([ids, prompt(length=5, seed=seed)], dim=1)
        text = greedy(model, turn, 6, past_key_values=copy.deepcopy(system))
        torch.testing.assert_close(text, greedy_by_hand(model, turn, 6))
    assert system.get_seq_length() == 9


def test_a_shared_prompt_serves_a_batch_of_copies():
    model, ids = shared("hybrid"), prompt()
    cache = model.new_cache()
    with torch.no_grad():
        model(ids, past_key_values=cache)
    cache.batch_repeat_interleave(3)
    turns = torch.cat([ids.expand(3, -1), prompt(3, length=4, seed=6)], dim=1)
    torch.testing.assert_close(greedy(model, turns, 6, past_key_values=cache), greedy_by_hand(model, turns, 6))


def test_beams_of_a_static_cache_are_beams_without_a_cache():
    model, ids = shared("hybrid"), prompt(2)
    options = {"num_beams": 3, "disable_compile": True}
    static = greedy(model, ids, 8, cache_implementation="static", **options)
    torch.testing.assert_close(static, greedy(model, ids, 8, use_cache=False, **options))


def test_the_returned_cache_can_be_saved_and_continued(tmp_path):
    model, ids = shared("hybrid"), prompt()
    first = greedy(model, ids, 5, return_dict_in_generate=True)
    first.past_key_values.save(tmp_path)
    cache = model.new_cache()
    cache.load(tmp_path)
    text = greedy(model, first.sequences, 5, past_key_values=cache)
    torch.testing.assert_close(text, greedy_by_hand(model, ids, 10))


@pytest.mark.parametrize("kind", ["quantized", "offloaded", "offloaded_static"])
def test_a_kind_of_cache_that_is_not_ours_is_refused(kind):
    with pytest.raises(ValueError, match="cache_implementation"):
        greedy(shared("hybrid"), prompt(), cache_implementation=kind)


def test_continuous_batching_is_refused():
    model = build("hybrid")
    with pytest.raises(NotImplementedError, match=r"paged cache.*model\.new_cache\(\)"):
        model.generate_batch([[2, 3, 4]])
    with pytest.raises(NotImplementedError, match="paged cache"):
        greedy(model, prompt(), cache_implementation="paged")


def test_new_tokens_alone_are_taken_for_the_whole_text_and_refused():
    model = shared("hybrid")
    cache = greedy(model, prompt(), 5, return_dict_in_generate=True).past_key_values
    for length in (4, 13):
        with pytest.raises(ValueError, match="input_ids: past_key_values holds 13 tokens.* give the whole text"):
            greedy(model, prompt(length=length), 5, past_key_values=cache)


@pytest.mark.parametrize("make", [DynamicCache, lambda: StaticCache(config=config_of("attention"), max_cache_len=40)])
def test_a_cache_of_transformers_is_refused_with_the_way_to_make_ours(make):
    model = shared("attention")
    with pytest.raises(ValueError, match=r"past_key_values: \w+Cache cannot hold .*model\.new_cache\(\)"):
        greedy(model, prompt(), past_key_values=make())
    with pytest.raises(ValueError, match=r"model\.new_cache\(\)"):
        model(prompt(), past_key_values=make())


def test_a_tuple_is_not_a_cache():
    with pytest.raises(ValueError, match=r"past_key_values: tuple cannot hold .*model\.new_cache\(\)"):
        greedy(shared("attention"), prompt(), past_key_values=((torch.zeros(1), torch.zeros(1)),))


def test_a_cache_of_another_config_is_refused():
    with pytest.raises(ValueError, match="past_key_values: was made for a model with another config"):
        greedy(shared("hybrid"), prompt(), past_key_values=shared("mamba").new_cache())


def test_a_cache_and_a_kind_of_cache_contradict_each_other():
    model = shared("hybrid")
    with pytest.raises(ValueError, match="cache_implementation"):
        greedy(model, prompt(), past_key_values=model.new_cache(), cache_implementation="static")


def test_assisted_decoding_with_a_static_cache_is_refused():
    model = shared("hybrid")
    with pytest.raises(ValueError, match="[Ss]tatic"):
        greedy(model, prompt(), prompt_lookup_num_tokens=3, cache_implementation="static")
    cache = model.new_cache(static=True, max_length=40)
    with pytest.raises(ValueError, match="static cache cannot record its past"):
        greedy(model, prompt(), prompt_lookup_num_tokens=3, past_key_values=cache)


def test_a_static_cache_that_is_too_short_is_refused_before_it_is_changed():
    model = shared("hybrid")
    cache = model.new_cache(static=True, max_length=6)
    with pytest.raises(ValueError, match="max_length=6"), torch.no_grad():
        model(prompt(), past_key_values=cache)
    assert cache.get_seq_length() == 0


def test_a_batch_of_another_size_is_refused():
    model = shared("hybrid")
    cache = model.new_cache()
    with torch.no_grad():
        model(prompt(2), past_key_values=cache)
    with pytest.raises(ValueError, match="past_key_values: holds 2 rows, got a batch of 3"):
        model(prompt(3), past_key_values=cache)


def test_a_model_whose_config_turns_the_cache_off_still_generates():
    model, ids = build("hybrid", use_cache=False), prompt()
    with torch.no_grad():
        assert model(ids).past_key_values is None
    torch.testing.assert_close(greedy(model, ids, 6, use_cache=False), greedy_by_hand(model, ids, 6))


def test_the_cache_of_a_bfloat16_model_keeps_recurrent_states_in_float32():
    model = build("hybrid", torch.bfloat16, HybridLMForCausalLM)
    out = greedy(model, prompt(), 3, return_dict_in_generate=True)
    layers = out.past_key_values.layers
    assert {layer.recurrent_states.dtype for layer in layers if layer.recurrent_states is not None} == {torch.float32}
    assert {layer.keys.dtype for layer in layers if layer.keys is not None} == {torch.bfloat16}


def test_a_cache_that_is_dropped_frees_its_memory_at_once():
    model, ids = shared("hybrid"), prompt()
    gc.collect()
    gc.disable()  # a reference cycle would hold the memory of a GPU until the next collection
    try:
        out = greedy(model, ids, 3, return_dict_in_generate=True)
        tensors = [weakref.ref(t) for layer in out.past_key_values.layers for t in layer.named_tensors().values()]
        cache = weakref.ref(out.past_key_values)
        del out
        assert cache() is None
        assert not [ref for ref in tensors if ref() is not None]
    finally:
        gc.enable()


def test_a_cache_can_be_pickled():
    model, ids = shared("hybrid"), prompt()
    first = greedy(model, ids, 5, return_dict_in_generate=True)
    cache = pickle.loads(pickle.dumps(first.past_key_values))
    text = greedy(model, first.sequences, 5, past_key_values=cache)
    torch.testing.assert_close(text, greedy_by_hand(model, ids, 10))
    assert cache.layers[0].get_seq_length() == 18
