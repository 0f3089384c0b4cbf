"""The imported model computes what the native class computes, on a single full forward."""

import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM
from twins import FAMILIES, TWINS

from hybridlm import HybridLMForCausalLM
from hybridlm.hub import import_native


def token_ids():
    return torch.randint(0, 97, (2, 23), generator=torch.Generator().manual_seed(1))


def imported(twin, tmp_path, dtype, **options):
    """The native model and ours, read from its folder."""
    native = twin.build(dtype)
    native.save_pretrained(tmp_path / "native")
    import_native(tmp_path / "native", tmp_path / "ours")
    ours = HybridLMForCausalLM.from_pretrained(tmp_path / "ours", dtype=dtype, **options).eval()
    return native, ours


def assert_logits_equal(ours, native, tolerance):
    """Largest difference within `tolerance` of the largest logit."""
    largest = native.abs().max()
    assert (ours.to(native.dtype) - native).abs().max() <= tolerance * largest


@torch.no_grad()
@pytest.mark.parametrize(
    ("dtype", "attn_implementation", "tolerance"),
    [(torch.float32, "sdpa", 1e-5), (torch.float64, "eager", 1e-6)],
    ids=["fp32-sdpa", "fp64-eager"],
)
def test_logits_equal_the_native_twin(twin, tmp_path, dtype, attn_implementation, tolerance):
    native, ours = imported(twin, tmp_path, dtype, attn_implementation=attn_implementation)
    assert_logits_equal(ours(token_ids()).logits, native(token_ids(), use_cache=False).logits, tolerance)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_no_tensor_could_be_wrong_unseen(family, tmp_path):
    _, ours = imported(TWINS[family], tmp_path, torch.float64)
    before = ours(token_ids()).logits
    for name, parameter in ours.named_parameters():
        held = parameter.clone()
        parameter.mul_(1.1)
        moved = (ours(token_ids()).logits - before).abs().max() / before.abs().max()
        assert moved > 1e-4, name
        parameter.copy_(held)


@pytest.mark.parametrize("name", ["mixtral-window", "jamba-bias"])
def test_loss_with_router_loss_equals_the_native_twin(name, tmp_path):
    native, ours = imported(TWINS[name], tmp_path, torch.float64, attn_implementation="eager")
    labels = token_ids()
    labels[0, :4] = -100
    expected = native(token_ids(), labels=labels, output_router_logits=True, use_cache=False)
    assert expected.aux_loss.item() > 0
    found = ours(token_ids(), labels=labels, output_router_logits=True)
    torch.testing.assert_close(found.loss, expected.loss.to(found.loss.dtype), rtol=1e-6, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_equals_the_native_twin(family, tmp_path):
    native, ours = imported(TWINS[family], tmp_path, torch.float32)
    prompt = token_ids()[:, :7]
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    # some native caches are inexact: without one, every step is a full forward
    expected = native.generate(prompt, use_cache=False, **options)
    assert torch.equal(ours.generate(prompt, **options), expected)


REMOTE = """
import sys
sys.modules["hybridlm"] = None  # importing it fails
import torch, transformers
for folder in sys.argv[1:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    token_ids = torch.arange(9)[None]
    torch.save(model.eval()(token_ids).logits, folder + "/logits.pt")
"""


@torch.no_grad()
def test_imported_folders_load_where_hybridlm_is_not_installed(tmp_path):
    folders = []
    for family in FAMILIES:
        TWINS[family].build().save_pretrained(tmp_path / "native" / family)
        folders.append(import_native(tmp_path / "native" / family, tmp_path / "ours" / family))
    environment = os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    subprocess.run(
        [sys.executable, "-c", REMOTE, *map(str, folders)],
        check=True,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    for folder in folders:
        ours = HybridLMForCausalLM.from_pretrained(folder).eval()
        assert torch.equal(torch.load(folder / "logits.pt"), ours(torch.arange(9)[None]).logits)


@torch.no_grad()
def test_a_bf16_twin_gives_nearly_its_logits_and_keeps_its_islands_wide(tmp_path):
    native, ours = imported(TWINS["jamba"], tmp_path, torch.bfloat16)
    narrow = {name for name, p in ours.named_parameters() if p.dtype == torch.bfloat16}
    wide = {name.rsplit(".", 1)[1] for name, p in ours.named_parameters() if name not in narrow}
    assert wide == {"A_log", "D", "dt_bias"}
    assert_logits_equal(ours(token_ids()).logits.float(), native(token_ids()).logits.float(), 0.1)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_the_auto_class_loads_an_imported_folder_completely(family, tmp_path):
    TWINS[family].build().save_pretrained(tmp_path / "native")
    import_native(tmp_path / "native", tmp_path / "ours")
    _, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
