"""The cache entries of one layer, in the form that transformers' tools expect."""

import weakref
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from .record import Stream


class EntryHolder:
    """Something with entries under the names in `parts`; any may be `None`."""

    parts: tuple[str, ...] = ()

    @property
    def entries(self) -> list[Any]:
        """The entries that exist."""
        return [entry for part in self.parts if (entry := getattr(self, part)) is not None]

    def named_tensors(self) -> dict[str, Tensor]:
        """Live tensors, named `mixer.keys` and so on."""
        return {
            f"{part}.{name}": tensor
            for part in self.parts
            if (entry := getattr(self, part)) is not None
            for name, tensor in entry.tensors().items()
        }

    def map(self, function: Any) -> None:
        """Replace every tensor by `function(tensor)`."""
        for entry in self.entries:
            entry.map(function)

    def reset(self) -> None:
        """Forget everything."""
        for entry in self.entries:
            entry.reset()


class HybridCacheLayer(EntryHolder, CacheLayerMixin):
    """The entries of one layer.

    Args:
        mixer: Entry of the mixer, or `None`.
        channel_mixer: Entry of the channel mixer, or `None`.
    """

    parts = ("mixer", "convolution", "channel_mixer")

    def __init__(self, mixer: Any = None, channel_mixer: Any = None) -> None:
        self.mixer, self.channel_mixer = mixer, channel_mixer
        self.device = torch.device("cpu")  # of the layer, where the model is spread over several
        self._cache: weakref.ref | None = None

    @property
    def cache(self) -> Any:
        """The `HybridCache` it belongs to, held weakly: in a cycle the state would live until garbage is collected."""
        return None if self._cache is None else self._cache()

    @cache.setter
    def cache(self, cache: Any) -> None:
        self._cache = weakref.ref(cache)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": None}  # the copy of the cache claims the copies of its layers

    def _tensor(self, name: str) -> Tensor | None:
        kept = [entry.tensors() for entry in (self.mixer, self.convolution) if entry is not None]
        return next((tensors[name] for tensors in kept if name in tensors), None)

    @property
    def convolution(self) -> Any:
        """Entry of the convolution in front of a key-value store, which is rolled back in another way."""
        return getattr(self.mixer, "convolution", None)

    keys = property(lambda self: self._tensor("keys"))
    values = property(lambda self: self._tensor("values"))
    conv_states = property(lambda self: self._tensor("conv_states"))
    recurrent_states = property(lambda self: self._tensor("recurrent_states"))
    is_initialized = property(lambda self: bool(self.named_tensors()) or not self.entries)
    is_compileable = property(lambda self: self.cache.is_static)
    is_croppable = property(lambda self: self.cache.is_croppable)
    is_sliding = False
    supports_early_init = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: entries are filled by their mixers."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refuse: a hybrid cache is filled by the model it was made for."""
        raise NotImplementedError("HybridCache is filled by its own model; other models need their own cache")

    def get_seq_length(self) -> int:
        """Columns of the stream so far, pads included."""
        return self.cache.num_columns

    def get_max_length(self) -> int:
        """Slots of a static cache, else -1."""
        return self.cache.max_length if self.cache.is_static else -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the columns a query may see."""
        return self.cache.num_columns + query_length, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Permute the rows."""
        self.map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self.map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self.map(lambda tensor: tensor[indices.to(tensor.device)])

    def crop(self, max_length: int) -> None:
        """Refuse: rows are rolled back for all layers at once, by `HybridCache.crop`."""
        raise NotImplementedError("crop the whole HybridCache, not one layer of it")

    def offload(self) -> None:
        """Move the tensors to the CPU."""
        self.map(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move the tensors back to where the layer is."""
        self.map(lambda tensor: tensor.to(self.device, non_blocking=True))


class SpanCache(EntryHolder):
    """What a span keeps between calls.

    Args:
        layers: Depths of the layers it covers.
        parent: Number of the span around it, if there is one.
        choice: Entry of what decides which tokens enter, or `None`; it advances with all tokens around the span.
        held: Entry of the inner output that later tokens read, or `None`.
        max_length: Tokens for which a static cache has room inside the span.
    """

    parts = ("choice", "held")

    def __init__(
        self,
        layers: range,
        parent: int | None = None,
        choice: Any = None,
        held: Any = None,
        max_length: int | None = None,
    ) -> None:
        self.layers, self.parent, self.max_length = layers, parent, max_length
        self.choice, self.held = choice, held
        self.stream = Stream(is_static=max_length is not None)  # of the tokens that entered
        self.device = torch.device("cpu")
