"""Small models with exactly one bug each, and the checks that must catch it.

Every class is the correct hybrid with one part, one argument or one method replaced. `FAULTS` names the checks that
prove it: each must find the bug, whatever other checks find.
"""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from hybridlm import HybridLMConfig, HybridLMForCausalLM
from hybridlm.modeling import cache as cache_module
from hybridlm.modeling.cache_entries import RecurrentEntry
from hybridlm.modeling.channel_swiglu import SwiGLU
from hybridlm.modeling.conv import CausalConv1d
from hybridlm.modeling.mixer_mamba2 import Mamba2Mixer

MAMBA2 = {"name": "mamba2", "state_size": 4, "head_dim": 8, "chunk_size": 4}
ATTENTION = {"name": "attention", "num_heads": 4, "num_kv_heads": 2, "position": {"name": "rope", "theta": 100.0}}
SWIGLU = {"name": "swiglu", "intermediate_size": 24}
MOE = {"name": "moe", "num_experts": 4, "intermediate_size": 12, "load_balancing_coef": 0.5}


def small_config(**moe: Any) -> HybridLMConfig:
    """Two recurrent layers around attention, with experts; `moe` changes the experts' options."""
    recipes = {
        "first": {"mixer": MAMBA2, "channel_mixer": SWIGLU},
        "middle": {"mixer": ATTENTION, "channel_mixer": MOE | moe},
        "last": {"mixer": MAMBA2, "channel_mixer": None},
    }
    sizes = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 3}
    return HybridLMConfig(layer_specs=recipes, layer_layout=list(recipes), **sizes)


class Correct(HybridLMForCausalLM):
    """No bug. Subclasses replace parts by class, and their cache by its methods."""

    parts: ClassVar[dict[type, type]] = {}
    cache_methods: ClassVar[dict[str, Any]] = {}

    def __init__(self, config: HybridLMConfig) -> None:
        super().__init__(config)
        for module in self.modules():
            module.__class__ = self.parts.get(type(module), type(module))

    def new_cache(self, *args: Any, **kwargs: Any) -> Any:
        cache = super().new_cache(*args, **kwargs)
        if self.cache_methods:  # the model knows its cache by the name of the class
            cache.__class__ = type("HybridCache", (cache_module.HybridCache,), dict(self.cache_methods))
        return cache


def with_part(old: type, new: type) -> type:
    """The correct model with the parts of one class replaced."""
    return type(f"With{new.__name__}", (Correct,), {"parts": {old: new}, "__module__": __name__})


def with_cache(**methods: Any) -> type:
    """The correct model with some methods of its cache replaced."""
    return type(f"With{'_'.join(methods)}", (Correct,), {"cache_methods": methods, "__module__": __name__})


# -- state between calls --------------------------------------------------------------------------------------------


class DropsState(Mamba2Mixer):
    def forward(self, hidden_states, state=None, sequence=None):
        if state is not None and hidden_states.shape[1] > 1:
            state = dataclasses.replace(state, recurrent_states=torch.zeros_like(state.recurrent_states))
        return super().forward(hidden_states, state, sequence)


class IgnoresConvTail(Mamba2Mixer):
    def forward(self, hidden_states, state=None, sequence=None):
        if state is not None and hidden_states.shape[1] > 1:
            state = dataclasses.replace(state, conv_states=torch.zeros_like(state.conv_states))
        return super().forward(hidden_states, state, sequence)


class ClampsInScanOnly(Mamba2Mixer):
    def forward(self, hidden_states, state=None, sequence=None):
        self.dt_limits = (0.0, None) if hidden_states.shape[1] == 1 else (0.3, None)
        return super().forward(hidden_states, state, sequence)


class RestartsPositions(Correct):
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        if position_ids is None and attention_mask is None and input_ids is not None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        return super().forward(input_ids, attention_mask, position_ids, **kwargs)


class WeakState(Mamba2Mixer):
    def _scan(self, value, dt, rate, key, query, skip, state, starts):
        output, state = super()._scan(value, dt, rate, key, query, skip, state, starts)
        direct = value * skip[:, None]
        return direct + 1e-5 * (output - direct), state


# -- pads -----------------------------------------------------------------------------------------------------------


class PadsDecayState(Mamba2Mixer):
    def forward(self, hidden_states, state=None, sequence=None):
        if sequence is not None:
            sequence = dataclasses.replace(sequence, token_mask=None, lengths=None)
        return super().forward(hidden_states, state, sequence)


class IgnoresMask(Correct):
    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        return super().forward(input_ids, None, **kwargs)


# -- documents ------------------------------------------------------------------------------------------------------


class LeaksThroughConv(CausalConv1d):
    def forward(self, inputs, tail=None, starts=None, lengths=None):
        return super().forward(inputs, tail, None, lengths)


class LeaksThroughState(Mamba2Mixer):
    def _scan(self, *inputs):
        return super()._scan(*inputs[:-1], None)


class IgnoresSeqIdx(Correct):
    def forward(self, *args, seq_idx=None, **kwargs):
        return super().forward(*args, **kwargs)


class IgnoresCuSeqLens(Correct):
    def forward(self, *args, cu_seq_lens_q=None, cu_seq_lens_k=None, **kwargs):
        return super().forward(*args, **kwargs)


class LeaksWithDefaultCache(Correct):
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, use_cache=None, **kwargs):
        if use_cache is None and input_ids is not None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        return super().forward(input_ids, attention_mask, position_ids, use_cache=use_cache, **kwargs)


class LeaksGradientBackwards(Correct):
    """The value is right; the gradient of a token reaches the document before."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        before = nn.functional.pad(outputs.logits[:, :-1], (0, 0, 1, 0))
        outputs.logits = outputs.logits + before - before.detach()
        return outputs


# -- causality and rows ---------------------------------------------------------------------------------------------


class TopTokensOnly(SwiGLU):
    """Runs the half of the tokens with the largest norm, chosen over the whole sequence."""

    def forward(self, hidden_states, state=None, sequence=None):
        output, state = super().forward(hidden_states, state, sequence)
        sizes = hidden_states.norm(dim=-1)
        kept = sizes >= sizes.median(dim=1, keepdim=True).values
        return output * kept[..., None], state


class LeaksGradientForwards(Correct):
    """The value is right; the gradient of a token reaches later ones."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        after = nn.functional.pad(outputs.logits[:, 1:], (0, 0, 0, 1))
        outputs.logits = outputs.logits + after - after.detach()
        return outputs


class MixesRows(SwiGLU):
    def forward(self, hidden_states, state=None, sequence=None):
        output, state = super().forward(hidden_states, state, sequence)
        return output - 0.1 * output.mean(dim=0, keepdim=True), state


def reorder_keys_only(self, beam_idx):
    for layer in self.layers:
        for entry in layer.entries:
            if not isinstance(entry, RecurrentEntry):
                entry.map(lambda tensor: tensor.index_select(0, beam_idx))
    self._map_rows(lambda tensor: tensor.index_select(0, beam_idx))


def repeat_in_blocks(self, repeats):
    for layer in self.layers:
        layer.map(lambda tensor: tensor.repeat(repeats, *[1] * (tensor.dim() - 1)))
    self._map_rows(lambda tensor: tensor.repeat(repeats))


# -- taking back, copies, static --------------------------------------------------------------------------------------


def crop_keys_only(self, tokens_to_remove):
    before = {
        (number, name): tensor.clone()
        for number, layer in enumerate(self.layers)
        for name, tensor in layer.named_tensors().items()
        if "states" in name
    }
    cache_module.HybridCache.crop(self, tokens_to_remove)
    for (number, _), _ in before.items():
        entry = self.layers[number].mixer
        if entry.stale:  # the state that was there before is taken for that of the tokens that are kept
            entry.begin_record()


def same_cache(self):
    return self


def load_without_conv(self, folder):
    cache_module.HybridCache.load(self, folder)
    for layer in self.layers:
        if layer.conv_states is not None:
            layer.conv_states.zero_()


class ForgetsInStaticCache(Correct):
    def new_cache(self, *args, **kwargs):
        cache = super().new_cache(*args, **kwargs)
        if cache.is_static:
            for layer in cache.layers:
                for entry in layer.entries:
                    if isinstance(entry, RecurrentEntry):
                        entry.__class__ = KeepsFirstState
        return cache


class KeepsFirstState(RecurrentEntry):
    def _keep(self, state):
        if self.state is None:
            super()._keep(state)


class BreaksGraph(SwiGLU):
    def forward(self, hidden_states, state=None, sequence=None):
        output, state = super().forward(hidden_states, state, sequence)
        return (output if float(output.abs().max()) < 1e9 else output * 0), state


class LosesStateOfPrompt(Correct):
    """`generate` goes on from the user's cache as if its recurrent states were new."""

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args):
        given = model_kwargs.get("past_key_values")
        if given is not None:
            for layer in given.layers:
                if layer.recurrent_states is not None:
                    layer.recurrent_states.zero_()
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)


# -- weights and files ----------------------------------------------------------------------------------------------


class HasUnsavedWeight(Correct):
    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("scale", 1 + 0.1 * torch.randn(()), persistent=False)

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits * self.scale
        return outputs


class LacksInit(Mamba2Mixer):
    """What a checkpoint lacks stays as memory happens to be."""

    def init_weights(self, std):
        pass


class ShipsOtherCode(Correct):
    def save_pretrained(self, save_directory, **kwargs):
        super().save_pretrained(save_directory, **kwargs)
        shipped = Path(save_directory) / "channel_swiglu.py"
        shipped.write_text(shipped.read_text().replace("self.down_proj(", "1.01 * self.down_proj("))


# -- numbers --------------------------------------------------------------------------------------------------------


class RoundsStepsInHalf(Mamba2Mixer):
    def forward(self, hidden_states, state=None, sequence=None):
        if self.in_proj.weight.dtype == torch.bfloat16:
            hidden_states = (hidden_states * 2).round() / 2
        return super().forward(hidden_states, state, sequence)


class OverflowsLate(SwiGLU):
    def forward(self, hidden_states, state=None, sequence=None):
        output, state = super().forward(hidden_states, state, sequence)
        decay = torch.full_like(output[..., :1], 0.1).float().cumsum(1)
        return (output * decay.exp() * (-decay).exp()).to(hidden_states.dtype), state


class Drifts(Correct):
    calls = 0

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        type(self).calls += 1
        outputs.logits = outputs.logits * (1 + 1e-4 * type(self).calls)
        return outputs


# -- training -------------------------------------------------------------------------------------------------------


class AveragesMicroBatches(Correct):
    def forward(self, *args, num_items_in_batch=None, **kwargs):
        return super().forward(*args, **kwargs)


class CheckpointsOtherwise(Correct):
    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        if self.training and self.model.gradient_checkpointing and outputs.loss is not None:
            outputs.loss = 1.01 * outputs.loss
        return outputs


class DependsOnRank(Correct):
    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        if torch.distributed.is_available() and torch.distributed.is_initialized() and outputs.loss is not None:
            outputs.loss = outputs.loss * (1 + 0.1 * torch.distributed.get_rank())
        return outputs


ReordersKeysOnly = with_cache(reorder_cache=reorder_keys_only)
RepeatsInBlocks = with_cache(batch_repeat_interleave=repeat_in_blocks)
CropsKeysOnly = with_cache(crop=crop_keys_only)
SharesSnapshots = with_cache(snapshot=same_cache)


class LoadsWithoutConv(Correct):
    cache_methods: ClassVar[dict[str, Any]] = {"load": load_without_conv}


# name: (model class, options of the experts, checks that must catch it)
FAULTS: dict[str, tuple[type, dict[str, Any], tuple[str, ...]]] = {
    "state dropped between chunks": (
        with_part(Mamba2Mixer, DropsState),
        {},
        ("chunked_continuation", "prefill_in_chunks"),
    ),
    "conv tail ignored": (with_part(Mamba2Mixer, IgnoresConvTail), {}, ("chunked_continuation",)),
    "clamp in the scan only": (
        with_part(Mamba2Mixer, ClampsInScanOnly),
        {},
        ("step_is_scan", "greedy_with_cache"),
    ),
    "positions restart at 0": (RestartsPositions, {}, ("step_is_scan", "chunked_continuation")),
    "state hardly used": (with_part(Mamba2Mixer, WeakState), {}, ("state_matters",)),
    "pads decay the state": (with_part(Mamba2Mixer, PadsDecayState), {}, ("right_padding",)),
    "mask ignored": (IgnoresMask, {}, ("left_padding", "left_padded_generation")),
    "documents leak through conv only": (
        with_part(CausalConv1d, LeaksThroughConv),
        {},
        ("packed_position_ids", "packed_seq_idx", "packed_cu_seq_lens"),
    ),
    "documents leak through state only": (
        with_part(Mamba2Mixer, LeaksThroughState),
        {},
        ("packed_position_ids", "packed_seq_idx", "packed_cu_seq_lens"),
    ),
    "seq_idx ignored": (IgnoresSeqIdx, {}, ("packed_seq_idx_alone",)),
    "cu_seq_lens ignored": (IgnoresCuSeqLens, {}, ("packed_cu_seq_lens_alone",)),
    "documents leak with the default cache": (
        LeaksWithDefaultCache,
        {},
        ("packed_position_ids_default_cache",),
    ),
    "gradient leaks to the document before": (LeaksGradientBackwards, {}, ("packed_position_ids",)),
    "top tokens of the whole sequence": (with_part(SwiGLU, TopTokensOnly), {}, ("causal_by_perturbation",)),
    "gradient leaks to later tokens": (LeaksGradientForwards, {}, ("causal_by_gradient",)),
    "rows mixed": (with_part(SwiGLU, MixesRows), {}, ("rows_are_independent",)),
    "state not reordered": (ReordersKeysOnly, {}, ("reordered_rows", "beams_with_cache")),
    "rows repeated in blocks": (RepeatsInBlocks, {}, ("repeated_and_selected_rows",)),
    "crop leaves the state": (CropsKeysOnly, {}, ("rollback", "prompt_lookup", "assisted")),
    "static state not updated": (
        ForgetsInStaticCache,
        {},
        ("static_cache", "generation_with_static_cache"),
    ),
    "graph broken in a step": (with_part(SwiGLU, BreaksGraph), {}, ("compiled_decode",)),
    "state of a given cache lost": (LosesStateOfPrompt, {}, ("generation_goes_on",)),
    "snapshot shared": (SharesSnapshots, {}, ("snapshots",)),
    "conv state not loaded": (LoadsWithoutConv, {}, ("snapshots", "snapshot_elsewhere")),
    "weight not saved": (HasUnsavedWeight, {}, ("saved_is_loaded",)),
    "missing init": (with_part(Mamba2Mixer, LacksInit), {}, ("missing_keys",)),
    "other code shipped": (ShipsOtherCode, {}, ("remote_code",)),
    "coarse in bfloat16": (with_part(Mamba2Mixer, RoundsStepsInHalf), {}, ("bf16_is_near",)),
    "overflow on long inputs": (with_part(SwiGLU, OverflowsLate), {}, ("long_input",)),
    "drift from call to call": (Drifts, {}, ("repeatable",)),
    "mean over micro-batches": (AveragesMicroBatches, {}, ("accumulation",)),
    "auxiliary loss per micro-batch": (Correct, {"loss_scope": "batch"}, ("accumulation_with_router_losses",)),
    "checkpointing changes the loss": (CheckpointsOtherwise, {}, ("gradient_checkpointing",)),
    "gradient depends on the rank": (DependsOnRank, {}, ("data_parallel",)),
}
