"""`generate` in all its modes gives the text of one full forward a token."""

import copy

import pytest
import torch
from stacks import STACKS, build, greedy, greedy_by_hand, left_padded, prompt, shared
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

stacks = pytest.mark.parametrize("stack", STACKS)


def varied(text):
    """Whether a text has enough different tokens for a comparison to mean something."""
    return len(set(text[0].tolist())) > 4


@stacks
@pytest.mark.parametrize(
    "options",
    [{}, {"use_cache": False}, {"prefill_chunk_size": 4}, {"cache_implementation": "static", "disable_compile": True}],
    ids=["cache", "no-cache", "chunked-prefill", "static"],
)
def test_greedy_text_is_that_of_full_forwards(stack, options):
    model, ids = shared(stack), prompt(2)
    expected = greedy_by_hand(model, ids)
    assert varied(expected[:, 9:])
    torch.testing.assert_close(greedy(model, ids, **options), expected)


@stacks
@pytest.mark.parametrize(
    "options",
    [{}, {"use_cache": False}, {"prefill_chunk_size": 3}, {"cache_implementation": "static", "disable_compile": True}],
    ids=["cache", "no-cache", "chunked-prefill", "static"],
)
def test_left_padded_rows_give_the_text_of_each_row_alone(stack, options):
    model = shared(stack)
    rows = [prompt(length=n, seed=n)[0] for n in (9, 2, 5)]
    expected = torch.stack([greedy_by_hand(model, row[None], 12)[0, len(row) :] for row in rows])
    batch = left_padded(rows, width=11)
    text = greedy(model, batch["input_ids"], 12, attention_mask=batch["attention_mask"], **options)
    torch.testing.assert_close(text[:, 11:], expected)


@stacks
def test_beam_search_with_a_cache_is_beam_search_without(stack):
    model = shared(stack)
    batch = left_padded([prompt(length=7)[0], prompt(length=4, seed=5)[0]])
    options = {"max_new_tokens": 10, "num_beams": 3, "num_return_sequences": 2, "do_sample": False, "pad_token_id": 0}
    cached, uncached = (model.generate(**batch, **options, use_cache=use) for use in (True, False))
    assert cached.shape == (4, 17)
    torch.testing.assert_close(cached, uncached)


@stacks
def test_sampling_follows_the_seed_and_the_cache_does_not_change_it(stack):
    model, ids = shared(stack), prompt()
    texts = []
    for use_cache in (True, True, False):
        torch.manual_seed(7)
        texts.append(greedy(model, ids, do_sample=True, top_k=20, num_return_sequences=3, use_cache=use_cache))
    torch.testing.assert_close(texts[0], texts[1])
    torch.testing.assert_close(texts[0], texts[2])
    assert not torch.equal(texts[0][0], texts[0][1])


@stacks
@pytest.mark.parametrize("tokens", [3, 10])
def test_prompt_lookup_gives_the_greedy_text(stack, tokens):
    model, ids = shared(stack), prompt(length=5).repeat(1, 4)  # repeats, so that there is something to look up
    expected = greedy_by_hand(model, ids, 24)
    torch.testing.assert_close(greedy(model, ids, 24, prompt_lookup_num_tokens=tokens), expected)


@pytest.fixture
def assistant():
    def make(model, schedule, tokens, noise):
        """A copy of the model whose head is disturbed, so that some drafts are right and some are wrong."""
        helper = copy.deepcopy(model)
        generator = torch.Generator().manual_seed(3)
        weight = helper.lm_head.weight.data
        weight += noise * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
        helper.generation_config.num_assistant_tokens_schedule = schedule
        helper.generation_config.num_assistant_tokens = tokens
        helper.generation_config.assistant_confidence_threshold = 0.0
        return helper

    return make


@stacks
@pytest.mark.parametrize(
    ("schedule", "tokens", "noise"),
    [("constant", 6, 0.1), ("heuristic", 20, 0.05), ("heuristic_transient", 5, 2.0), ("constant", 5, 0.0)],
    ids=["constant", "heuristic", "bad-drafts", "perfect-drafts"],
)
def test_assisted_decoding_gives_the_greedy_text(stack, schedule, tokens, noise, assistant):
    model, ids = shared(stack), prompt()
    helper = assistant(model, schedule, tokens, noise)
    expected = greedy_by_hand(model, ids, 24)
    torch.testing.assert_close(greedy(model, ids, 24, assistant_model=helper), expected)


def test_drafts_longer_than_the_default_record_give_the_greedy_text(assistant):
    model, ids = shared("hybrid"), prompt()
    helper = assistant(model, "heuristic", 90, 0.02)
    expected = greedy(model, ids, 110)
    torch.testing.assert_close(greedy(model, ids, 110, assistant_model=helper), expected)


def test_drafts_of_the_first_layers_give_the_greedy_text():
    model, ids = shared("hybrid"), prompt()
    torch.testing.assert_close(greedy(model, ids, assistant_early_exit=2), greedy_by_hand(model, ids))


def test_speculative_sampling_follows_the_seed():
    model, ids, texts = shared("hybrid"), prompt(), []
    for _ in range(2):
        torch.manual_seed(4)
        texts.append(greedy(model, ids, do_sample=True, assistant_model=shared("hybrid")))
    torch.testing.assert_close(texts[0], texts[1])


def test_the_assistant_may_be_another_stack():
    helper = copy.deepcopy(shared("mamba"))
    model, ids = shared("hybrid"), prompt()
    torch.testing.assert_close(greedy(model, ids, assistant_model=helper), greedy_by_hand(model, ids))


@stacks
def test_text_from_embeddings_is_text_from_ids(stack):
    model, ids = shared(stack), prompt(2)
    embeds = model.get_input_embeddings()(ids)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    text = model.generate(inputs_embeds=embeds, attention_mask=torch.ones_like(ids), **options)
    torch.testing.assert_close(text, greedy_by_hand(model, ids, 12)[:, 9:])


def test_a_streamer_gets_every_token():
    class Recorder(BaseStreamer):
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    model, ids, recorder = shared("hybrid"), prompt(), Recorder()
    text = greedy(model, ids, streamer=recorder)
    assert recorder.tokens == text[0].tolist()
    assert recorder.ended


def test_rows_that_ended_do_not_disturb_the_others():
    model = shared("hybrid")
    batch = left_padded([prompt(length=9)[0], prompt(length=6, seed=4)[0]])
    free = greedy(model, batch["input_ids"], 16, attention_mask=batch["attention_mask"])
    end = int(free[1, 12])  # the second row ends there
    text = greedy(
        model, batch["input_ids"], 16, attention_mask=batch["attention_mask"], eos_token_id=end, pad_token_id=0
    )
    stop = (free[0, 9:] == end).nonzero()
    stop = 16 if not len(stop) else int(stop[0]) + 1
    torch.testing.assert_close(text[0, : 9 + stop], free[0, : 9 + stop])
    assert (text[1, 13:] == 0).all()


def test_a_prompt_padded_on_the_right_is_refused():
    ids, mask = prompt(2), torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    with pytest.raises(ValueError, match="row 1 ends in pads; use left padding"):
        greedy(shared("hybrid"), ids, attention_mask=mask)
    with pytest.raises(ValueError, match="use left padding"):
        greedy(shared("hybrid"), ids, attention_mask=mask, cache_implementation="static", disable_compile=True)
    with pytest.raises(ValueError, match="use left padding"):
        greedy(shared("hybrid"), ids, attention_mask=mask, prefill_chunk_size=4)


def test_a_row_of_pads_only_is_refused():
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1] = 0
    with pytest.raises(ValueError, match="attention_mask: row 1 has no real token"):
        greedy(shared("hybrid"), prompt(2), attention_mask=mask)


@stacks
def test_compiled_decoding_gives_the_same_text(stack):
    from transformers import CompileConfig

    model = build(stack)
    batch = left_padded([prompt(length=6)[0], prompt(length=3, seed=8)[0]])
    expected = greedy(model, batch["input_ids"], 10, attention_mask=batch["attention_mask"])
    compile_config = CompileConfig(backend="eager", fullgraph=True, mode=None)
    compile_config._compile_all_devices = True
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=False):
        torch._dynamo.utils.counters.clear()
        text = greedy(
            model,
            batch["input_ids"],
            10,
            attention_mask=batch["attention_mask"],
            cache_implementation="static",
            compile_config=compile_config,
        )
    torch.testing.assert_close(text, expected)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_generation_options_in_the_model_are_used():
    model, ids = build("hybrid"), prompt()
    model.generation_config = GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=0, use_cache=True)
    text = model.generate(ids, attention_mask=torch.ones_like(ids))
    torch.testing.assert_close(text, greedy_by_hand(model, ids, 5))
