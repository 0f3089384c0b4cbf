"""Presets of our own that equal a native family can be written for it, without ever having been imported."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from twins import normalise_groups_apart, randomize

from hybridlm import HybridLMForCausalLM, presets
from hybridlm.hub import export_native

EQUAL = {name: name for name in ("llama", "mistral", "mixtral", "jamba", "mamba", "mamba2", "bamba")}
EQUAL["jamba_3to1"] = "jamba"


@torch.no_grad()
@pytest.mark.parametrize(("preset", "family"), EQUAL.items())
def test_a_preset_exports_to_its_family(preset, family, tmp_path):
    ours = HybridLMForCausalLM(presets.load_config(f"tiny_{preset}")).eval()
    randomize(ours)
    ours.save_pretrained(tmp_path / "ours")
    export_native(tmp_path / "ours", tmp_path / "native")
    native, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "native", output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert native.config.model_type == family
    normalise_groups_apart(native)
    token_ids = torch.arange(17)[None]
    expected = native.eval()(token_ids, use_cache=False).logits
    assert (ours(token_ids).logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("preset", ["samba", "granite_4_like"])
def test_a_preset_that_no_family_has_says_what_is_different(preset, tmp_path):
    HybridLMForCausalLM(presets.load_config(f"tiny_{preset}")).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=r"equals no native family; the nearest is \w+: .*layer_layout\."):
        export_native(tmp_path / "ours", tmp_path / "native")
    assert not (tmp_path / "native").exists()
