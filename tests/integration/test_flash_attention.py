"""What flash attention is given, and what is refused because its kernels cannot express it.

The kernels need a GPU, so a stand-in computes what they would from the options that they know: causal order aligned to
the last key, a window, borders of documents in one row. Its name has `flash` in it, as theirs do.
"""

import pytest
import torch
from stacks import MIXERS, SWIGLU, build, left_padded, prompt
from transformers import AttentionInterface

from hybridlm import HybridLMConfig, HybridLMForCausalLM

NAME = "flash_stand_in"


def stand_in(
    module, query, key, value, attention_mask, scaling, dropout=0.0, is_causal=True, sliding_window=None,
    cu_seq_lens_q=None, softcap=None, **kwargs,
):  # fmt: skip
    """Attend as the kernels do; no mask can be given."""
    assert attention_mask is None
    assert is_causal
    groups = module.num_key_value_groups
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    num_queries, num_keys = query.shape[2], key.shape[2]
    place = torch.arange(num_queries)[:, None] + num_keys - num_queries
    visible = torch.arange(num_keys) <= place
    if sliding_window is not None:
        visible &= torch.arange(num_keys) > place - sliding_window
    if cu_seq_lens_q is not None:
        document = torch.bucketize(torch.arange(num_keys), cu_seq_lens_q[1:-1].long(), right=True)
        visible &= document[:, None] == document
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return (weights @ value).transpose(1, 2), None


@pytest.fixture(autouse=True)
def _registered():
    AttentionInterface.register(NAME, stand_in)
    yield
    AttentionInterface._global_mapping.pop(NAME, None)


def attention_model(**options):
    specs = {"a": {"mixer": MIXERS["attention"] | options, "channel_mixer": SWIGLU}}
    config = HybridLMConfig(
        layer_specs=specs, num_hidden_layers=2, layer_layout=["a", "a"], vocab_size=48, hidden_size=32,
        initializer_range=0.3,
    )  # fmt: skip
    return HybridLMForCausalLM(config).double().eval()


def with_flash(model, call):
    """The result of a call by flash, and by eager attention."""
    results = []
    for name in (NAME, "eager"):
        model.config._attn_implementation = name
        with torch.no_grad():
            results.append(call())
    return results


@pytest.mark.parametrize(
    "options",
    [{}, {"window": 3}, {"logit_softcap": 5.0}, {"num_kv_heads": 1}],
    ids=["full", "window", "softcap", "one-kv-head"],
)
def test_flash_gives_the_result_of_eager(options):
    model = attention_model(**options)
    batch = left_padded([prompt(length=n, seed=n)[0] for n in (9, 4)])
    packed, positions = prompt(1, 9), torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3]])

    def call():
        return [model(prompt(2)).logits, model(**batch).logits, model(packed, position_ids=positions).logits]

    for mine, expected in zip(*with_flash(model, call), strict=True):
        torch.testing.assert_close(mine, expected)


def test_flash_decodes_with_a_cache_of_even_rows():
    model = build("attention")

    def call():
        cache = model.new_cache()
        return torch.cat([model(part, past_key_values=cache).logits for part in prompt(2).split([4, 1, 3, 1], 1)], 1)

    mine, expected = with_flash(model, call)
    torch.testing.assert_close(mine, expected)


def flash_refuses(model, *args, **kwargs):
    model.config._attn_implementation = NAME
    with pytest.raises(ValueError, match="attn_implementation: flash attention .*use 'sdpa'"), torch.no_grad():
        model(*args, **kwargs)


def test_flash_refuses_attention_sinks():
    flash_refuses(build("window"), prompt())


def test_flash_refuses_learned_sinks():
    model = attention_model(learned_sinks=True)
    model.config._attn_implementation = NAME
    with pytest.raises(ValueError, match="attn_implementation: .*learned_sinks.*use 'eager'"):
        model(prompt())


def test_flash_refuses_rows_of_different_lengths_in_a_cache():
    model = build("attention")
    batch = left_padded([prompt(length=n, seed=n)[0] for n in (9, 4)])
    cache = model.new_cache()
    with torch.no_grad():
        model(**batch, past_key_values=cache)
    flash_refuses(model, prompt(2, 1), past_key_values=cache)


def test_flash_refuses_documents_in_a_cache():
    model = build("attention")
    cache = model.new_cache()
    with torch.no_grad():
        model(prompt(1, 6), position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]), past_key_values=cache)
    flash_refuses(model, prompt(1, 1), past_key_values=cache)


def test_flash_refuses_documents_in_several_rows():
    flash_refuses(build("attention"), prompt(2, 6), position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))


def test_flash_refuses_a_windowed_cache():
    model = attention_model(window=3)
    cache = model.new_cache()
    with torch.no_grad():
        model(prompt(), past_key_values=cache)
    flash_refuses(model, prompt(1, 1), past_key_values=cache)


def test_flash_refuses_a_static_cache():
    model = build("attention")
    flash_refuses(model, prompt(), past_key_values=model.new_cache(static=True, max_length=20))


def test_recorded_weights_need_eager_attention():
    model = build("attention")
    model.config._attn_implementation = NAME
    with torch.no_grad():
        assert len(model(prompt(), output_attentions=True).attentions) == 2


def test_sdpa_hands_soft_caps_and_learned_sinks_to_eager():
    model = attention_model(logit_softcap=5.0, learned_sinks=True)
    model.config._attn_implementation = "sdpa"
    with torch.no_grad():
        mine = model(prompt()).logits
        model.config._attn_implementation = "eager"
        torch.testing.assert_close(mine, model(prompt()).logits)
