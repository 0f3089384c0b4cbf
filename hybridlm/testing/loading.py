"""Get a model ready for the checks: by its object, folder, hub id or config; in a dtype that runs; with a text.

Shapes: B batch, T tokens.
"""

import contextlib
import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from .base import Subject, quiet
from .foreign import ForeignSubject, accepts
from .weights import scale_weights

BATCH_SIZE, NUM_TOKENS = 3, 37
_LARGE = 100_000_000  # parameters of a model that is not run in float64 unless asked to
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_TEXTS = (
    "The lighthouse stood on a rock that the tide cut off twice a day. Whoever kept it had to plan by the moon: bread "
    "and oil came over the sand at low water, letters went back the same way, and in between there was only the sea.",
    "A good recipe says what to do when something goes wrong. If the dough tears, let it rest for ten minutes and fold "
    "it again; if it will not rise, the kitchen is too cold, and an oven with its lamp on is warm enough to help it.",
    "In 1905 the town had 412 houses, 3 wells and 1 clock. The clock was late by seven minutes, and since every train "
    "was late as well, nobody saw a reason to mend it until the first telegraph office opened across the square.",
)


class Unfit(ValueError):
    """The model cannot be checked at all; the message says why."""


@dataclass
class Prepared:
    """A model that is ready, and how it was made so.

    Attributes:
        subject: The model with its text.
        dtype: What it is held in.
        exact: What it computes in: float32 if it rounds to that inside.
        notes: What a reader of the report should know.
        is_twin: Whether its weights are random and scaled so that state matters.
        experts: The way to run experts that was replaced, if it was.
    """

    subject: Subject
    dtype: torch.dtype
    exact: torch.dtype
    notes: list[str] = field(default_factory=list)
    is_twin: bool = False
    experts: str | None = None

    @cached_property
    def in_float32(self) -> "Prepared":
        """The same in float32, for what does not run in float64."""
        model = copy.deepcopy(self.subject.model).float()
        if self.experts is not None:
            with quiet():
                model.set_experts_implementation(self.experts)
        found = make_subject(model, self.subject.input_ids, self.subject.seed, self.subject.router_losses)
        return Prepared(found, torch.float32, torch.float32, self.notes, self.is_twin)


def prepare(
    source: Any,
    *,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    seed: int = 0,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
    is_twin: bool | None = None,
) -> Prepared:
    """Load, scale, cast and place a model.

    Args:
        source: A model, a config, a folder or a hub id.
        dtype: What it computes in; float64 by default where that runs and the model is small, else float32.
        device: Where; where it is by default.
        seed: Where random choices start.
        tokenizer: Cuts the text into tokens; by default that of the folder or hub id, if there is one.
        trust_remote_code: Whether code of the hub or the folder may run.
        is_twin: Whether the weights are random and are to be scaled; by default those of configs and of folders
            without weights.

    Raises:
        Unfit: It is not a causal language model.
        OSError: There is no such model.
    """
    torch.manual_seed(seed)
    model, twin = load(source, trust_remote_code)
    twin = twin if is_twin is None else is_twin
    _check_kind(model)
    if twin:
        scale_weights(model, seed)
        _slow_steps(model)
        _undo_multipliers(model)
    if tokenizer is None and isinstance(source, str | Path) and not twin:
        with contextlib.suppress(Exception), quiet():
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    model = model.to(device) if device else model
    _check_causal(model)
    router_losses = _router_losses(model)
    ids = None if twin else text_ids(tokenizer, model)
    found = _cast(model, dtype)
    found.subject = make_subject(found.subject.model, ids, seed, router_losses)
    found.is_twin = twin
    if not twin and ids is None:
        found.notes.append("random tokens: the vocabulary is smaller than a byte and there is no tokenizer")
    return found


@torch.no_grad()
def _slow_steps(model: nn.Module) -> None:
    """Let every other head start at the smallest step of its family, as training does: clamps act from there on."""
    smallest = getattr(model.config.get_text_config(), "time_step_min", None)
    for name, parameter in model.named_parameters():
        if smallest and name.endswith("dt_bias") and parameter.dim() == 1:
            parameter[::2] = math.log(math.expm1(smallest))


@torch.no_grad()
def _undo_multipliers(model: nn.Module) -> None:
    """Make up for a large factor on the embedding, and a small one on the scores.

    Under the one random layers hardly change the stream, under the other random attention is uniform; trained weights
    make up for both.
    """
    factor = getattr(model.config.get_text_config(), "embedding_multiplier", 1.0) or 1.0
    if factor > 1:
        model.get_input_embeddings().weight /= factor
    for module in model.modules():
        query, size = getattr(module, "q_proj", None), getattr(module, "head_dim", None)
        factors = [getattr(part, "scaling", None) for part in (module, *module.children())]
        factor = next((value for value in factors if isinstance(value, float) and value > 0), None)
        if isinstance(query, nn.Linear) and size and factor and factor < size**-0.5:
            query.weight *= size**-0.5 / factor


def make_subject(model: nn.Module, ids: Tensor | None, seed: int, router_losses: bool) -> Subject:
    """A `Subject` for models with `new_cache()`, a `ForeignSubject` for all others."""
    kind = Subject if hasattr(model, "new_cache") else ForeignSubject
    ids = None if ids is None else ids.to(model.device)
    subject = kind(model, ids, batch_size=BATCH_SIZE, num_tokens=NUM_TOKENS, seed=seed)
    subject.router_losses = router_losses
    return subject


def load(source: Any, trust_remote_code: bool = False) -> tuple[nn.Module, bool]:
    """A copy of a model, or a new one, and whether its weights are random.

    Raises:
        OSError: There is no such model.
        Unfit: transformers cannot make a causal language model of it.
    """
    with quiet():
        if isinstance(source, nn.Module):
            return copy.deepcopy(source), False
        if not isinstance(source, str | Path):
            return AutoModelForCausalLM.from_config(source), True
        folder = Path(source)
        if folder.is_dir() and not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code), True
        try:
            return AutoModelForCausalLM.from_pretrained(source, trust_remote_code=trust_remote_code), False
        except ValueError as error:
            if "Unrecognized configuration class" in str(error):
                raise Unfit("transformers knows no causal language model of this kind") from error
            raise


def _check_kind(model: nn.Module) -> None:
    config = getattr(model, "config", None)
    if config is None:
        raise Unfit(f"{type(model).__name__} has no config: it is no transformers model")
    if getattr(config, "is_encoder_decoder", False):
        raise Unfit(f"{type(model).__name__} is an encoder-decoder, not a causal language model")


def _check_causal(model: nn.Module) -> None:
    """Refuse what gives no logits `[B, T, V]`, and encoders."""
    model.eval()
    size = model.config.get_text_config().vocab_size
    ids = torch.arange(8, device=model.device)[None] % size
    edited = ids.clone()
    edited[:, -1] = (edited[:, -1] + 1) % size
    with torch.no_grad(), quiet():
        logits, moved = (getattr(model(input_ids=x), "logits", None) for x in (ids, edited))
    if logits is None or logits.shape[:2] != ids.shape:
        raise Unfit(f"{type(model).__name__} gives no logits [B, T, V]: it is no causal language model")
    leak = float((logits[:, 0] - moved[:, 0]).abs().max())
    if getattr(model.config, "is_decoder", None) is False and leak > 1e-6 * float(logits.abs().max()):
        raise Unfit(f"{type(model).__name__} is an encoder: config.is_decoder is False, and tokens see later ones")


def _router_losses(model: nn.Module) -> bool:
    """Whether router losses are on; for a model that is not ours they are put off for the other checks."""
    config = model.config.get_text_config()
    if hasattr(model, "new_cache"):
        layers = getattr(getattr(model, "model", None), "moe_layers", ())
        return any(getattr(layer, name, 0.0) for layer in layers for name in ("load_balancing_coef", "z_loss_coef"))
    on = bool(getattr(config, "output_router_logits", False)) and bool(getattr(config, "router_aux_loss_coef", 0.0))
    if on:
        config.output_router_logits = False
    return on


def text_ids(tokenizer: Any, model: nn.Module) -> Tensor | None:
    """Real text `[B, T]` by the tokenizer, else by bytes; `None` if the vocabulary is too small for bytes."""
    size = model.config.get_text_config().vocab_size
    if tokenizer is not None:
        rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in _TEXTS]
    else:
        rows = [list(text.encode()) for text in _TEXTS]
    rows = [(row * NUM_TOKENS)[:NUM_TOKENS] for row in rows]
    if max(map(max, rows)) >= size:
        return None
    return torch.tensor(rows[:BATCH_SIZE], device=model.device)


def _cast(model: nn.Module, dtype: torch.dtype | None) -> Prepared:
    """The model in the dtype asked for, or in float64 where that runs."""
    notes: list[str] = []
    if dtype is None and sum(p.numel() for p in model.parameters()) <= _LARGE and model.device.type != "mps":
        try:
            wide, note = _in_float64(copy.deepcopy(model))
        except Exception as error:
            notes.append(f"float64 does not run ({type(error).__name__})")
        else:
            exact = torch.float32 if _rounds(wide) else torch.float64
            notes += [note] if note else []
            notes += ["it rounds to float32 inside, whose tolerance holds"] if exact is torch.float32 else []
            experts = getattr(model.config, "_experts_implementation", None) if note else None
            return Prepared(Subject(wide), torch.float64, exact, notes, experts=experts)
    dtype = torch.float32 if dtype is None else dtype
    return Prepared(Subject(model.to(dtype)), dtype, dtype, notes)


def _in_float64(model: nn.Module) -> tuple[nn.Module, str]:
    model = model.to(torch.float64)
    try:
        _try(model)
        return model, ""
    except Exception:
        if not hasattr(model, "set_experts_implementation"):
            raise
        with quiet():
            model.set_experts_implementation("eager")  # the grouped product has no float64 on a CPU
        _try(model)
        return model, "experts run one by one, their grouped product has no float64"


def _try(model: nn.Module) -> None:
    """Run a forward, a backward and a step through a cache."""
    size = model.config.get_text_config().vocab_size
    ids = torch.arange(6, device=model.device)[None] % size
    with torch.enable_grad(), quiet():
        model(input_ids=ids).logits.sum().backward()
    model.zero_grad(set_to_none=True)
    if hasattr(model, "generate"):
        with torch.no_grad(), quiet():
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False, pad_token_id=0)


class _FindRounding(TorchDispatchMode):
    """Note whether a float64 activation is cast to float32."""

    found = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if (
            isinstance(result, Tensor)
            and result.dtype == torch.float32
            and any(isinstance(value, Tensor) and value.dtype == torch.float64 and value.dim() > 1 for value in args)
        ):
            self.found = True
        return result


def _rounds(model: nn.Module) -> bool:
    ids = torch.arange(6, device=model.device)[None] % model.config.get_text_config().vocab_size
    with torch.no_grad(), _FindRounding() as mode:
        model(input_ids=ids, **({"use_cache": False} if accepts(model, "use_cache") else {}))
    return mode.found


@contextlib.contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Put every dropout to zero for a while: what is compared in training mode must not depend on chance."""
    before = []
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and value and (name == "p" or "dropout" in name):
                before.append((module, name, value))
                setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
