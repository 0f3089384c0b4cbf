"""The stack without a head, and what all models share: initialisation, saving, caches.

Shapes: B batch, T tokens, D hidden size.
"""

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple, logging
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention_product import AttentionProduct
from .cache import DEFAULT_RECORD_WINDOW, HybridCache
from .channel_moe import MoE
from .checkpoint import align_tensors, check_weights
from .configuration_hybridlm import HybridLMConfig
from .layer import HybridLMLayer
from .masks import SequenceInfo, compiling
from .mixer_attention import AttentionMixer
from .norms import build_norm
from .outputs import HybridLMModelOutput, leave_compaction, leave_spans, leave_traces
from .passage import Journal, stream_mean
from .quantization import with_skip_list
from .registry import SPANS, build_part, build_residual_head, resolve_config, span_places
from .remote_code import auto_map, foreign_parts, ship_code
from .router import Router
from .stream import RowState, build_sequence, current_mask

_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


logger = logging.get_logger(__name__)

_RECORDED = ("output_hidden_states", "output_attentions", "output_router_logits", "output_memory_trace")

# what transformers passes to any forward
_OTHER_ARGUMENTS = {
    *_RECORDED,
    *("return_dict", "num_items_in_batch", "cache_position", "token_type_ids"),
}


class HybridLMPreTrainedModel(PreTrainedModel):
    """What the base model and the heads share: initialisation, saving, flags for transformers."""

    config_class = HybridLMConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HybridLMLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = [
        *("A_log", "D", "dt_bias", "selection_bias", "threshold_bias"),
        *("mix_weight", "mix_base", "mix_scale"),
    ]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _is_stateful = False
    # transformers reads the source of this file to answer; attention and experts live in other files
    _can_set_attn_implementation_cached_value = True
    _can_set_experts_implementation_cached_value = False
    _can_record_outputs = {
        "router_logits": OutputRecorder(Router, index=0),
        "hidden_states": HybridLMLayer,
        "attentions": OutputRecorder(AttentionProduct, index=1),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if hasattr(module, "init_weights") and not isinstance(module, PreTrainedModel):
            module.init_weights(self.config.initializer_range)
        elif isinstance(module, nn.Embedding) and self.config.embedding_std is not None:
            init.normal_(module.weight, mean=0.0, std=self.config.embedding_std)
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path | None, *args: Any, **kwargs: Any) -> Any:
        """Load a model, as in transformers.

        A damaged file in a local folder is named, and quantization leaves out `quantization_skip_modules`.

        Raises:
            OSError: A file of weights is missing, truncated or damaged.
        """
        path = pretrained_model_name_or_path
        if path is not None and Path(path).is_dir():
            check_weights(Path(path) / (kwargs.get("subfolder") or ""), kwargs.get("variant"))
        if kwargs.get("quantization_config") is not None:
            config = kwargs.get("config")
            if not isinstance(config, PreTrainedConfig):
                hub = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
                config = cls.config_class.from_pretrained(path if config is None else config, **hub)
            kwargs["quantization_config"] = with_skip_list(kwargs["quantization_config"], config)
        loaded = super().from_pretrained(path, *args, **kwargs)
        align_tensors(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Do nothing: `save_pretrained` ships the code of all heads without a mark on the class.

        transformers calls this when it loads remote code, and would then save an entry for this head that names a file
        from which the other heads cannot be reached.
        """

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Save weights, config and the code that loads them where hybridlm is not installed.

        Args:
            save_directory: The model folder; it is made if it does not exist.
            kwargs: As in transformers.
        """
        self.config.auto_map = auto_map()
        super().save_pretrained(save_directory, **kwargs)
        only_adapters = getattr(self, "_hf_peft_config_loaded", False)
        if kwargs.get("is_main_process", True) and not only_adapters:
            ship_code(save_directory, foreign_parts(self.config))

    def _upload_modified_files(self, working_dir: str | Path, *args: Any, **kwargs: Any) -> Any:
        """Upload what `save_pretrained(push_to_hub=True)` wrote, and the code."""
        ship_code(working_dir, foreign_parts(self.config))
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def new_cache(
        self,
        batch_size: int | None = None,
        *,
        static: bool = False,
        max_length: int | None = None,
        record_window: int = DEFAULT_RECORD_WINDOW,
    ) -> HybridCache:
        """Make an empty cache for this model.

        Args:
            batch_size: Number of rows; learned from the first call by default.
            static: Whether every tensor keeps its address and shape, as compiled decoding needs.
            max_length: Most real tokens a row may have; needed for a static cache.
            record_window: Tokens that `crop` can take back once `activate_past_recording` was called.

        Raises:
            ValueError: A static cache without a positive `max_length`.
            NotImplementedError: A part sees the whole text at once.
        """
        for moe in self.base_model.moe_layers:
            moe.router.check_decodes()
        if static and (max_length is None or max_length < 1):
            raise ValueError(f"max_length: a static cache needs it, at least 1, got {max_length}")
        length = max_length if static else None
        base = self.base_model
        spans = []
        rooms = dict.fromkeys(range(len(base.layers)), length)  # slots a layer needs
        for span in base.spans:
            entry = span.new_entry(rooms[span.start])
            spans.append(entry)
            rooms.update(dict.fromkeys(entry.layers, entry.max_length))
        layers = [layer.new_entry(rooms[number]) for number, layer in enumerate(base.layers)]
        return HybridCache(layers, spans, base.signature, batch_size, length, record_window)

    def check_cache(self, cache: Any) -> None:
        """Refuse a cache that is not ours, or was made for another architecture.

        Raises:
            ValueError: The cache does not fit; the message says how to make one.
        """
        if type(cache).__name__ != HybridCache.__name__:  # by name: remote code has a class of its own
            raise ValueError(
                f"past_key_values: {type(cache).__name__} cannot hold the state of this model, make one by "
                "model.new_cache()"
            )
        if cache.signature != self.base_model.signature:
            raise ValueError("past_key_values: was made for a model with another config")


class HybridLMModel(HybridLMPreTrainedModel):
    """The stack without a head.

    Args:
        config: What to build. Its parts are checked and written out in full.

    Raises:
        ValueError: Something in the config is wrong; the message starts with its path.
    """

    def __init__(self, config: HybridLMConfig) -> None:
        resolve_config(config)
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(HybridLMLayer(config, i) for i in range(config.num_hidden_layers))
        self.spans = nn.ModuleList()
        for entry, start, stop, parent in span_places(config):
            span = build_part(config.spans[entry], SPANS, f"spans.{entry}", config.hidden_size)
            span.place(len(self.spans), start, stop, parent)
            self.spans.append(span)
        self._span_at = {(span.parent, span.start): span.number for span in self.spans}
        self.residual_head = build_residual_head(config.residual, config.hidden_size)
        self.norm = build_norm(config.norm, config.hidden_size)
        self.gradient_checkpointing = False
        fields = ("hidden_size", "layer_specs", "layer_layout", "spans", "norm", "residual")
        shape = {name: getattr(config, name) for name in fields}
        self.signature = hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:16]
        self.post_init()

    def _depths(self, half: str, kind: type) -> list[int]:
        """Depths of the layers with a part of a kind."""
        return [depth for depth, layer in enumerate(self.layers) if isinstance(getattr(layer, half), kind)]

    @property
    def moe_layers(self) -> list[MoE]:
        """The mixture-of-experts parts, in order."""
        return [self.layers[depth].channel_mixer for depth in self.moe_depths]

    @property
    def moe_depths(self) -> list[int]:
        """Depths of the layers with experts."""
        return self._depths("channel_mixer", MoE)

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.embed_tokens = value

    def _check_inputs(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> tuple[int, int, torch.device]:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids: give exactly one of input_ids and inputs_embeds")
        given, name = (inputs_embeds, "inputs_embeds") if input_ids is None else (input_ids, "input_ids")
        if given.dim() != (3 if input_ids is None else 2):
            raise ValueError(f"{name}: expected {'[B, T, D]' if input_ids is None else '[B, T]'}, got {given.shape}")
        if given.shape[0] == 0 or given.shape[1] == 0:
            raise ValueError(f"{name}: expected at least one row and one token, got shape {tuple(given.shape)}")
        if input_ids is None and given.shape[2] != self.config.hidden_size:
            raise ValueError(f"{name}: expected hidden_size={self.config.hidden_size} values, got {given.shape[2]}")
        for moe in self.moe_layers if input_ids is None else ():
            moe.router.check_token_ids(None)
        if input_ids is not None and input_ids.device.type == "cpu" and not compiling():
            low, high = int(input_ids.min()), int(input_ids.max())
            if low < 0 or high >= self.config.vocab_size:
                bad = low if low < 0 else high
                raise ValueError(f"input_ids: {bad} is out of range, expected 0 to {self.config.vocab_size - 1}")
        return *given.shape[:2], given.device

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HybridCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        **kwargs: Any,
    ) -> HybridLMModelOutput:
        """Run the stack.

        Args:
            input_ids: `[B, T]`.
            attention_mask: `[B, cached + T]`, 1 at real tokens.
            position_ids: `[B or 1, T]`; counted from the start of each document by default. Without an attention mask,
                positions that do not go on by one begin a document.
            past_key_values: State of the tokens before, from `new_cache()` or an earlier call.
            inputs_embeds: `[B, T, D]`, instead of `input_ids`.
            use_cache: Whether to return the state; by default as in the config, and never in training.
            seq_idx: `[B or 1, T]`, number of each token's document.
            cu_seq_lens_q: `[documents + 1]`, borders of the documents of one row.
            cu_seq_lens_k: The same with cached keys counted in.
            max_length_q: Accepted from collators and not needed.
            max_length_k: Accepted from collators and not needed.
            kwargs: `output_hidden_states`, `output_attentions`, `output_router_logits`, `output_memory_trace`.

        Returns:
            Hidden states `[B, T, D]` (0 at pads) and what was asked for.

        Raises:
            ValueError: An argument has a wrong shape or value; the message names it. Nothing was changed then.
        """
        for name in kwargs.keys() - _OTHER_ARGUMENTS if not compiling() else ():
            logger.warning_once(f"{name}: unknown argument of forward, it has no effect")
        batch, length, device = self._check_inputs(input_ids, inputs_embeds)
        cache = self._cache_for(past_key_values, use_cache)
        reads_past = cache is not None and isinstance(attention_mask, Tensor) and not compiling()
        num_past = cache.num_columns if reads_past else 0
        real = current_mask(attention_mask, batch, length, num_past)
        if real is not None and past_key_values is None and device.type == "cpu" and not compiling():
            empty = (~real.any(1)).nonzero()
            if empty.numel():
                raise ValueError(f"attention_mask: row {int(empty[0])} has no real token")
        rows = RowState.fresh(batch, device) if cache is None else cache.start_rows(batch, device)
        sequence, compaction, rows = build_sequence(
            batch,
            length,
            device,
            rows,
            real=real,
            position_ids=position_ids,
            seq_idx=seq_idx,
            cu_seq_lens_q=cu_seq_lens_q,
            cu_seq_lens_k=cu_seq_lens_k,
            borders_from_positions=attention_mask is None,
        )
        sequence.attn_implementation = self.config._attn_implementation or "eager"
        sequence.need_weights = bool(kwargs.get("output_attentions", self.config.output_attentions))
        sequence.use_cache = cache is not None
        if input_ids is not None:
            sequence.token_ids = input_ids if compaction is None else compaction.apply(input_ids)
            inputs_embeds = self.embed_tokens(sequence.token_ids)
        elif compaction is not None:
            inputs_embeds = compaction.apply(inputs_embeds)
        kwargs.pop("return_dict", None)
        wanted = [name for name in _RECORDED if kwargs.get(name, getattr(self.config, name, False))]
        sequence.journal = journal = Journal(complete=bool(wanted), traced="output_memory_trace" in wanted)
        if cache is not None:
            cache.plan(sequence)
        output = self._run_layers(inputs_embeds, sequence, cache, return_dict=True, **kwargs)
        if self.residual_head is not None and output.hidden_states:
            output.hidden_states = tuple(None if x is None else stream_mean(x) for x in output.hidden_states)
        if cache is not None:
            cache.commit(length, real, sequence, rows)
        output.segment_ids = sequence.segment_ids
        if journal.traced:
            leave_traces(output, journal)
        if self.spans and (wanted or self.training):
            depths = self.moe_depths, self._depths("mixer", AttentionMixer)
            leave_spans(output, journal, *depths, with_records=self.training or "output_router_logits" in wanted)
        if compaction is not None:
            leave_compaction(output, compaction, attention_mask)
        if self.training:
            for span, record in zip(self.spans, output.span_records or (), strict=True):
                span.add_load(record)
        output.token_mask = real
        return output

    def _cache_for(self, cache: HybridCache | None, use_cache: bool | None) -> HybridCache | None:
        if self.gradient_checkpointing and self.training:
            return None  # a layer that is run again in backward would feed its tokens twice
        if cache is not None:
            self.check_cache(cache)
            return cache
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        return self.new_cache() if use_cache else None

    @capture_outputs
    def _run_layers(
        self, inputs_embeds: Tensor, sequence: SequenceInfo, cache: HybridCache | None, **kwargs: Any
    ) -> HybridLMModelOutput:
        """Layers and final norm over compacted tokens; transformers' hooks record in here."""
        hidden_states = inputs_embeds
        if self.config.embedding_multiplier != 1.0:
            hidden_states = hidden_states * self.config.embedding_multiplier
        hidden_states = nn.functional.dropout(hidden_states, self.config.embedding_dropout, self.training)
        sequence.inputs_embeds = hidden_states
        if self.residual_head is not None:
            hidden_states = self.residual_head.expand(hidden_states)  # [B, T, streams, D]
        hidden_states = self._run_range(0, len(self.layers), None, cache, hidden_states, sequence)
        if self.residual_head is not None:
            hidden_states = self.residual_head.collapse(hidden_states)
        return HybridLMModelOutput(last_hidden_state=self.norm(hidden_states), past_key_values=cache)

    def _run_range(
        self,
        start: int,
        stop: int,
        parent: int | None,
        cache: HybridCache | None,
        hidden_states: Tensor,
        sequence: SequenceInfo,
    ) -> Tensor:
        """Layers `[start, stop)`, which lie inside the span `parent`, and the spans among them."""
        depth = start
        while depth < stop:
            number = self._span_at.get((parent, depth))
            if number is None:
                sequence.journal.layers.append((depth, sequence.passage))
                hidden_states = self.layers[depth](hidden_states, sequence=sequence, past_key_values=cache)
                depth += 1
            else:
                span = self.spans[number]
                inner = partial(self._run_range, span.start, span.stop, span.number, cache)
                hidden_states = span(hidden_states, sequence, inner, cache)
                depth = span.stop
        return hidden_states
