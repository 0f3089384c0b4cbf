"""What every check shares: the model under test, how results are compared, and what a check is.

A check is a function of a `Subject` and keyword options that returns the largest error it measured, relative to the
scale of the logits. It knows no tolerance: the caller does. The first line of its docstring is the promise it checks.

Shapes: B batch, T tokens, V vocabulary.
"""

import copy
import inspect
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.utils import logging


class NotApplicable(Exception):
    """The model does not offer what a check is about; the message says what."""


class Differs(Exception):
    """Results differ, and more is known than how far.

    Args:
        error: The largest relative error.
        reason: What is known.
    """

    def __init__(self, error: float, reason: str) -> None:
        super().__init__(reason)
        self.error = error


@dataclass(frozen=True)
class Check:
    """A promise and the function that measures how well a model keeps it."""

    name: str
    promise: str
    function: Callable[..., float]

    @classmethod
    def of(cls, function: Callable[..., float]) -> "Check":
        """Name a check after its function, and take the promise from its docstring."""
        return cls(function.__name__, inspect.getdoc(function).splitlines()[0].rstrip("."), function)

    def __call__(self, subject: "Subject", **options: Any) -> float:
        """Run the check.

        Returns:
            The largest relative error.

        Raises:
            NotApplicable: The model does not offer what the check is about.
        """
        return self.function(subject, **options)


def relative_error(actual: Tensor, expected: Tensor, scale: float | None = None) -> float:
    """Largest difference as a fraction of `scale`, by default of the largest expected value; `inf` if not finite."""
    assert actual.shape == expected.shape, f"shapes differ: {tuple(actual.shape)} and {tuple(expected.shape)}"
    if not bool(torch.isfinite(actual).all()):
        return math.inf
    if actual.numel() == 0:
        return 0.0
    wide = torch.promote_types(actual.dtype, torch.float32)
    difference = float((actual.detach().to(wide) - expected.detach().to(wide)).abs().max())
    scale = float(expected.detach().abs().max()) if scale is None else scale
    return difference / scale if scale else (math.inf if difference else 0.0)


class Subject:
    """A causal language model under test and the text it is tested with.

    Args:
        model: Any model with the `forward` of transformers' causal language models; it is put in evaluation mode.
        input_ids: `[B, T]`, the text; random ids by default.
        batch_size: B of random ids.
        num_tokens: T of random ids.
        seed: Where all random choices start.
    """

    cache_argument = "past_key_values"
    keeps_cache = True

    def __init__(
        self,
        model: nn.Module,
        input_ids: Tensor | None = None,
        *,
        batch_size: int = 3,
        num_tokens: int = 37,
        seed: int = 0,
    ) -> None:
        self.model = model.eval()
        self.seed = seed
        if input_ids is None:
            input_ids = self.random_ids(random.Random(seed), batch_size, num_tokens)
        self.input_ids = input_ids

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.model.config.get_text_config().vocab_size

    @cached_property
    def reference(self) -> Tensor:
        """Logits `[B, T, V]` of one full forward without a cache: the truth, and the scale of all errors."""
        return self.forward(self.input_ids)

    @cached_property
    def scale(self) -> float:
        """The largest logit of the reference."""
        return float(self.reference.abs().max())

    def rng(self, name: str) -> random.Random:
        """A source of random choices that depends on the seed and the name alone."""
        return random.Random(f"{self.seed} {name}")

    def random_ids(self, rng: random.Random, *shape: int) -> Tensor:
        """Token ids of the given shape."""
        ids = [rng.randrange(self.vocab_size) for _ in range(math.prod(shape))]
        return torch.tensor(ids, device=self.model.device).view(shape)

    def like(self, model: nn.Module, input_ids: Tensor | None = None, **options: Any) -> "Subject":
        """Another model under the same conventions and with the same seed."""
        return type(self)(model, input_ids, seed=self.seed, **options)

    def arguments(self, cache: Any = None, **arguments: Any) -> dict[str, Any]:
        """The arguments of `forward`, the cache among them under its name."""
        return arguments if cache is None else {self.cache_argument: cache, **arguments}

    def call(self, model: nn.Module | None = None, cache: Any = None, **arguments: Any) -> Any:
        """Outputs of `forward` of this model or of a copy."""
        return (self.model if model is None else model)(**self.arguments(cache, **arguments))

    def forward(self, input_ids: Tensor, cache: Any = None, **kwargs: Any) -> Tensor:
        """Logits `[B, T, V]` without gradients; without a cache unless one is given."""
        kwargs.setdefault("use_cache", cache is not None)
        with torch.no_grad():
            return self.model(input_ids=input_ids, past_key_values=cache, **kwargs).logits

    def new_cache(self, **options: Any) -> Any:
        """An empty cache of the kind that the model wants.

        Raises:
            NotApplicable: Options were asked for and the model has no `new_cache`.
        """
        if hasattr(self.model, "new_cache"):
            return self.model.new_cache(**options)
        if options:
            raise NotApplicable(f"the model has no new_cache({', '.join(options)})")
        return DynamicCache(config=self.model.config)

    def recording_cache(self, window: int) -> Any:
        """A cache whose last `window` tokens can be taken back."""
        cache = self.new_cache(record_window=window) if hasattr(self.model, "new_cache") else self.new_cache()
        if not hasattr(cache, "activate_past_recording"):
            raise NotApplicable("the cache cannot record its past")
        cache.activate_past_recording()
        return cache

    def error(self, actual: Tensor, expected: Tensor) -> float:
        """`relative_error` on the scale of the reference."""
        return relative_error(actual, expected, self.scale)

    def copy_of_model(self) -> nn.Module:
        """A copy to cast, train or change."""
        return copy.deepcopy(self.model)


def require_independent_tokens(model: nn.Module) -> None:
    """Leave out a model that says that tokens of one batch depend on one another in training.

    Raises:
        NotApplicable: A module has a true `batch_dependent`.
    """
    if any(getattr(module, "batch_dependent", False) for module in model.modules()):
        raise NotApplicable("experts of limited capacity: in training the tokens of a batch depend on one another")


def random_split(rng: random.Random, total: int, longest: int | None = None) -> list[int]:
    """Cut `total` tokens into chunks of 1 to `longest`, with single tokens often among them."""
    longest = total if longest is None else longest
    chunks: list[int] = []
    while sum(chunks) < total:
        chunk = 1 if rng.random() < 0.3 else rng.randint(1, longest)
        chunks.append(min(chunk, total - sum(chunks)))
    return chunks


def gradient_error(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest `relative_error` over named gradients, each on the scale of the largest gradient of its kind."""
    assert actual.keys() == expected.keys(), f"gradients differ: {sorted(actual.keys() ^ expected.keys())}"
    largest = max(float(value.abs().max()) for value in expected.values())
    floor = 1e-3 * largest  # a gradient that is zero by nature is compared on the scale of the others
    return max(
        relative_error(actual[name], value, max(float(value.abs().max()), floor)) for name, value in expected.items()
    )


def add_gradients(total: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sums of named gradients; a parameter may have one in either only."""
    return total | {name: total.get(name, 0) + gradient for name, gradient in found.items()}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradient of every parameter that has one, cloned; gradients are set to `None` afterwards."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' warnings and progress bars out of the way."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
