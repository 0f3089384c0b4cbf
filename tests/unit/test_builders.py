"""Pattern strings and Jamba's periods expand to the explicit list, or say where they cannot be read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridlm.builders import build_config, expand_pattern, jamba_layers

SYMBOLS = {"M": "ssm", "*": "attn", "-": "mlp"}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("M*", "M*"),
        ("(MMM*)x6", "MMM*" * 6),
        ("Mx3 *", "MMM*"),
        ("((M-)x2*)x2 M", "M-M-*" * 2 + "M"),
        ("(M)x12", "M" * 12),
        ("M-(M*)x1", "M-M*"),
    ],
)
def test_a_pattern_repeats_layers_and_groups(pattern, expected):
    assert expand_pattern(pattern, SYMBOLS) == [SYMBOLS[character] for character in expected]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("MM?", "position 2: unknown '?', expected one of ['*', '-', 'M']"),
        ("M(M*", "position 1: '(' is never closed"),
        ("M*)", "position 2: ')' closes nothing"),
        ("M()", "position 1: the group is empty"),
        ("x3M", "position 0: 'x' must follow a layer or a group"),
        ("Mx2x3", "position 3: 'x' must follow a layer or a group"),
        ("(M*)x", "position 4: 'x' must be followed by a count of at least 1"),
        ("(M*)x0", "position 4: 'x' must be followed by a count of at least 1"),
        ("(M*)x99999", "position 4: more than 10000 layers"),
        ("M6", "position 1: unknown '6'"),
        ("  ", "no layers"),
    ],
)
def test_a_bad_pattern_is_refused_with_its_position(pattern, message):
    with pytest.raises(ValueError) as error:
        expand_pattern(pattern, SYMBOLS)
    assert message in str(error.value)


def test_a_symbol_that_the_pattern_language_uses_is_refused():
    with pytest.raises(ValueError, match="symbols: 'x' must be one character"):
        expand_pattern("x", {"x": "ssm"})


@given(st.lists(st.tuples(st.text("M*-", min_size=1, max_size=5), st.integers(1, 4)), min_size=1, max_size=4))
def test_a_pattern_of_groups_is_the_concatenation_of_its_groups(groups):
    pattern = "".join(f"({text})x{count}" for text, count in groups)
    assert expand_pattern(pattern, SYMBOLS) == [SYMBOLS[c] for text, count in groups for c in text * count]


def test_the_published_jamba_attends_at_4_of_8_and_has_experts_at_every_odd_layer():
    specs, layout = jamba_layers(
        32,
        mixer={"name": "mamba"},
        attention={"name": "attention"},
        channel_mixer={"name": "swiglu"},
        experts={"name": "moe"},
    )
    assert [i for i, name in enumerate(layout) if specs[name]["mixer"]["name"] == "attention"] == [4, 12, 20, 28]
    experts = [i for i, name in enumerate(layout) if specs[name]["channel_mixer"]["name"] == "moe"]
    assert experts == list(range(1, 32, 2))
    assert set(specs) == set(layout)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attn_layer_offset": 8}, r"attn_layer_offset=8 must lie in \[0, attn_layer_period=8\)"),
        ({"expert_layer_offset": -1}, "expert_layer_offset=-1 must lie in"),
        ({"expert_layer_period": 0}, "expert_layer_period=0 must be at least 1"),
    ],
)
def test_a_bad_period_or_offset_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        jamba_layers(
            8, mixer={"name": "mamba"}, attention={"name": "attention"}, channel_mixer={"name": "mlp"}, **options
        )


def test_recipes_that_share_a_mixer_name_stay_apart():
    window, full = {"name": "attention", "window": 8}, {"name": "attention"}
    specs, layout = jamba_layers(8, mixer=window, attention=full, channel_mixer={"name": "mlp"})
    assert specs[layout[0]]["mixer"] == window
    assert specs[layout[4]]["mixer"] == full


SPECS = {
    "ssm": {"mixer": {"name": "mamba"}, "channel_mixer": {"name": "mlp"}},
    "attn": {"mixer": {"name": "attention"}, "channel_mixer": {"name": "mlp"}},
}


def test_a_config_stores_the_explicit_list():
    config = build_config(SPECS, "(MM*)x2", symbols={"M": "ssm", "*": "attn"}, hidden_size=64)
    assert config.layer_layout == ["ssm", "ssm", "attn", "ssm", "ssm", "attn"]
    assert config.num_hidden_layers == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layout": "M", "symbols": {"M": "mamba"}}, r"symbols\['M'\]: unknown recipe 'mamba', expected one of"),
        ({"layout": ["ssm"], "symbols": {"M": "ssm"}}, "symbols: only for a pattern string"),
        ({"layout": ["ssm"], "num_hidden_layers": 2}, "num_hidden_layers=2 contradicts the layout, which has 1"),
    ],
)
def test_a_layout_that_contradicts_itself_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_config(SPECS, **arguments)
