"""One run of the isoFLOP comparison: the models that are compared, the data, training, and the count of FLOPs.

Every arm is the same stack of attention and SwiGLU layers with one thing changed. Arms of one seed begin with the same
weights wherever they have the same parameter, and read the same rows in the same order.

Counted are matrix products: by torch's FlopCounterMode (2 for each multiply-add), attention as the full square that
eager attention computes, also where a kernel runs that the mode does not know. These stacks hold no scan. A step of
training counts as three forward passes. In a batch the rows inside a span are padded to the longest; what those pads
cost is in the count, and a second count leaves it out.

Shapes: B batch, T tokens of a row, D hidden size.
"""

import copy
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from hybridlm import HybridLMConfig, HybridLMForCausalLM
from hybridlm.analysis.flops import product_flops
from hybridlm.data import Framer, PackedRows, build_byte_tokenizer, load_documents, pack_documents
from hybridlm.data.documents import text_hash
from hybridlm.modeling.losses import update_selection_bias
from hybridlm.training.parameter_groups import parameter_groups
from hybridlm.training.trainer import EpochSampler

logger = logging.getLogger("isoflop")

BACKWARD = 3  # a step of training in forward passes


@dataclass(frozen=True)
class Settings:
    """What all runs of a comparison share.

    Args:
        hidden_size: Width D.
        num_layers: Layers of the plain stack.
        num_heads: Attention heads.
        intermediate_size: Width of the feed-forward networks; of an expert, half of it.
        initializer_range: Standard deviation of the initial weights.
        embedding_multiplier: Factor on the embeddings; without one they are small beside what the layers add.
        length: Tokens in a row, T.
        batch_size: Rows in a step.
        num_steps: Steps of the plain model; the FLOPs of these are what every arm may spend.
        learning_rate: Constant after the warm-up.
        warmup_steps: Steps in which it rises.
        weight_decay: Of matrices.
        num_evaluations: Times in `num_steps` that the held-out loss is read, evenly.
        heldout_windows: Windows of T bytes that are scored.
        count_every: Steps between two counts of an arm's FLOPs.
    """

    hidden_size: int = 64
    num_layers: int = 4
    num_heads: int = 2
    intermediate_size: int = 192
    initializer_range: float = 0.05
    embedding_multiplier: float = 8.0
    length: int = 128
    batch_size: int = 4
    num_steps: int = 2400
    learning_rate: float = 3e-3
    warmup_steps: int = 50
    weight_decay: float = 0.1
    num_evaluations: int = 6
    heldout_windows: int = 512
    count_every: int = 5


QUICK = Settings(
    hidden_size=32, num_layers=4, num_heads=2, intermediate_size=64, length=64, batch_size=4, num_steps=20,
    warmup_steps=4, num_evaluations=2, heldout_windows=8, count_every=2,
)  # fmt: skip


def _depth(capacity: float, rule: str) -> Callable[[Settings], list[dict[str, Any]]]:
    span = {"name": "mixture_of_depths", "start": 1, "stop": 2, "every": 2, "capacity": capacity, "rule": rule}
    return lambda settings: [dict(span)]


def _merging(boundary: str) -> Callable[[Settings], list[dict[str, Any]]]:
    def spans(settings: Settings) -> list[dict[str, Any]]:
        quarter = settings.num_layers // 4
        inside = {"start": quarter, "stop": settings.num_layers - quarter}
        return [{"name": "token_merging", **inside, "boundary": boundary, "target_ratio": 2.0}]

    return spans


@dataclass(frozen=True)
class Arm:
    """One way to build the stack.

    Args:
        about: What it is, in a few words.
        spans: Makes the config's `spans`.
        experts: Whether the feed-forward networks are mixtures of experts.
        every_other: Whether only layers 0, 2, 4, ... are built: what is left when the spans of depth take nothing.
    """

    about: str
    spans: Callable[[Settings], list[dict[str, Any]]] = field(default=lambda settings: [])
    experts: bool = False
    every_other: bool = False


ARMS = {
    "plain": Arm("attention and SwiGLU"),
    "fewer": Arm("plain without the layers that depth routing wraps", every_other=True),
    "random": Arm("random 12.5 % of tokens in every other layer", _depth(0.125, "random")),
    "mod": Arm("mixture of depths, 12.5 % of tokens in every other layer", _depth(0.125, "threshold")),
    "mod_half": Arm("mixture of depths, 50 % of tokens in every other layer", _depth(0.5, "threshold")),
    "merge": Arm("token merging 2:1 around the middle layers, boundaries by cosine", _merging("cosine")),
    "moe": Arm("8 experts of half the width, 2 a token", experts=True),
    "moe_mod": Arm("moe and mod together", _depth(0.125, "threshold"), experts=True),
    "mod_topk": Arm("mod trained by top-k, with a causal predictor", _depth(0.125, "predictor")),
    "merge_learned": Arm("token merging 2:1 around the middle layers, learned boundaries", _merging("learned")),
}
DEFAULT_ARMS = [name for name in ARMS if name not in ("mod_topk", "merge_learned")]


def build_config(arm: str, settings: Settings) -> HybridLMConfig:
    """The config of an arm."""
    chosen = ARMS[arm]
    channel: dict[str, Any] = {"name": "swiglu", "intermediate_size": settings.intermediate_size}
    if chosen.experts:
        channel = {"name": "moe", "num_experts": 8, "top_k": 2, "load_balancing_coef": 0.01, "implementation": "loop"}
        channel["intermediate_size"] = settings.intermediate_size // 2
    mixer = {"name": "attention", "num_heads": settings.num_heads, "position": {"name": "rope"}, "qk_norm": True}
    depth = settings.num_layers // 2 if chosen.every_other else settings.num_layers
    return HybridLMConfig(
        vocab_size=len(build_byte_tokenizer()),
        hidden_size=settings.hidden_size,
        num_hidden_layers=depth,
        layer_specs={"attn": {"mixer": mixer, "channel_mixer": channel}},
        layer_layout=["attn"] * depth,
        spans=chosen.spans(settings),
        initializer_range=settings.initializer_range,
        embedding_multiplier=settings.embedding_multiplier,
        max_position_embeddings=settings.length,
        use_cache=False,
    )


def build_model(arm: str, settings: Settings, seed: int) -> HybridLMForCausalLM:
    """An arm's model; what it shares with the plain one begins as there."""
    torch.manual_seed(seed)
    plain = HybridLMForCausalLM(build_config("plain", settings))
    if arm == "plain":
        return plain
    model = HybridLMForCausalLM(build_config(arm, settings))
    kept = dict(enumerate(plain.model.layers))
    if ARMS[arm].every_other:
        kept = {index: plain.model.layers[2 * index] for index in range(settings.num_layers // 2)}
    weights = {name: tensor for name, tensor in plain.state_dict().items() if ".layers." not in name}
    for index, layer in kept.items():
        weights |= {f"model.layers.{index}.{name}": tensor for name, tensor in layer.state_dict().items()}
    own = model.state_dict()
    model.load_state_dict({name: tensor for name, tensor in weights.items() if name in own}, strict=False)
    return model


@cache
def load_data(length: int, num_windows: int) -> tuple[PackedRows, Tensor, str]:
    """Training rows, held-out windows `[N, T + 1]`, and the hash of the documents.

    Windows are taken from held-out documents in the order of their hashes; each starts with the token before its first
    byte, and is read from an empty state, as a row in training is.
    """
    tokenizer = build_byte_tokenizer()
    documents = load_documents("stdlib")
    rows = pack_documents(documents.train, tokenizer, length)
    texts = sorted((row["text"] for row in documents.heldout if row["text"]), key=text_hash)
    windows = []
    for ids in Framer(tokenizer).encode(texts):
        starts = range(0, len(ids) - length, length)
        # spread over many documents: at most an eighth of the windows from one
        windows += [ids[start : start + length + 1] for start in starts][: max(1, num_windows // 8)]
        if len(windows) >= num_windows:
            break
    return rows, torch.from_numpy(np.stack(windows[:num_windows]).astype(np.int64)), documents.manifest_hash


def batches(rows: PackedRows, settings: Settings, seed: int) -> Iterator[dict[str, Tensor]]:
    """Batches without end, in an order that depends on the seed only."""
    sampler, epoch = EpochSampler(len(rows), seed), 0
    while True:
        order = sampler.order(epoch)
        for first in range(0, len(order) - settings.batch_size + 1, settings.batch_size):
            yield default_collate([rows[index] for index in order[first : first + settings.batch_size]])
        epoch += 1


@torch.no_grad()
def heldout_bits(model: nn.Module, windows: Tensor, batch_size: int = 32) -> float:
    """Bits per byte of windows `[N, T + 1]`, in the mode that the model is in."""
    nats = 0.0
    for chunk in windows.split(batch_size):
        logits = model(input_ids=chunk[:, :-1], use_cache=False).logits
        nats += nn.functional.cross_entropy(logits.flatten(0, 1), chunk[:, 1:].flatten(), reduction="sum").item()
    return nats / math.log(2) / windows[:, 1:].numel()


def _cpu_attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


@contextmanager
def counted(totals: list[int]) -> Iterator[None]:
    """Append the FLOPs of the matrix products that are run inside."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={kernel: _cpu_attention}) as counter:
        yield
    totals.append(counter.get_total_flops())


class LayerWatch:
    """Count the tokens that reach each layer, and what pads among them cost.

    Args:
        model: The model whose layers are watched as long as this lives.
    """

    def __init__(self, model: HybridLMForCausalLM) -> None:
        self.num_layers = len(model.model.layers)
        self.pad_flops = 0
        self._clear()
        self.handles = [model.model.embed_tokens.register_forward_pre_hook(self._count_all)]
        for index, layer in enumerate(model.model.layers):
            self.handles.append(layer.register_forward_pre_hook(self._counter(index, layer), with_kwargs=True))

    def _clear(self) -> None:
        self.real, self.computed, self.num_tokens = [0] * self.num_layers, [0] * self.num_layers, 0

    def _count_all(self, module: nn.Module, args: tuple) -> None:
        self.num_tokens += args[0].numel()

    def _counter(self, index: int, layer: nn.Module) -> Callable[..., None]:
        products = sum(product_flops(part) for part in (layer.mixer, layer.channel_mixer))
        square = 4 * layer.mixer.num_heads * layer.mixer.head_dim  # scores, and values times weights

        def count(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            batch, longest = args[0].shape[:2]
            mask = kwargs["sequence"].token_mask
            lengths = [longest] * batch if mask is None else mask.sum(1).tolist()
            real = sum(lengths)
            self.computed[index] += batch * longest
            self.real[index] += real
            self.pad_flops += products * (batch * longest - real)
            self.pad_flops += square * (batch * longest**2 - sum(length**2 for length in lengths))

        return count

    def shares(self) -> dict[str, list[float]]:
        """Share of the tokens that each layer was given, without and with pads, since the last call of this."""
        counts = {"real": self.real, "computed": self.computed}
        total = max(self.num_tokens, 1)
        shares = {name: [round(count / total, 4) for count in layers] for name, layers in counts.items()}
        self._clear()
        return shares

    def close(self) -> None:
        """Stop counting."""
        for handle in self.handles:
            handle.remove()


def flops_of_plain_step(settings: Settings) -> int:
    """FLOPs of one step of the plain model."""
    model, totals = HybridLMForCausalLM(build_config("plain", settings)), []
    with torch.no_grad(), counted(totals):
        model(input_ids=torch.zeros(settings.batch_size, settings.length, dtype=torch.long))
    return BACKWARD * totals[0]


class Trainee:
    """A model in training, with its FLOPs.

    Args:
        arm: Name of the arm.
        settings: What all runs share.
        seed: Of the weights, of the order of rows, and of random routing.
    """

    def __init__(self, arm: str, settings: Settings, seed: int) -> None:
        self.settings = settings
        self.model = build_model(arm, settings, seed).train()
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, settings.weight_decay),
            lr=settings.learning_rate,
            betas=(0.9, 0.95),
            fused=True,
        )
        self.num_steps, self.flops, self.unpadded_flops = 0, 0, 0
        self._of_last_count = (0, 0)  # FLOPs of a step, all and without pads
        self.losses: list[float] = []
        self.watch = LayerWatch(self.model)
        torch.manual_seed(seed)

    def step(self, batch: dict[str, Tensor]) -> None:
        """Take one step; every so often its FLOPs are counted, and stand for those of the steps after it."""
        totals: list[int] = []
        if self.num_steps % self.settings.count_every == 0:
            self.watch.pad_flops = 0
            with counted(totals):
                output = self.model(**batch)
            self._of_last_count = BACKWARD * totals[0], BACKWARD * (totals[0] - self.watch.pad_flops)
        else:
            output = self.model(**batch)
        output.loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        warm = min(1.0, (self.num_steps + 1) / self.settings.warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * warm
        self.optimizer.step()
        self.optimizer.zero_grad()
        update_selection_bias(self.model)
        self.num_steps += 1
        self.flops += self._of_last_count[0]
        self.unpadded_flops += self._of_last_count[1]
        self.losses.append((output.loss - (0 if output.aux_loss is None else output.aux_loss)).item())

    def evaluate(self, windows: Tensor) -> dict[str, Any]:
        """Read the held-out loss under the rule of decoding; also the training loss and shares since the last time."""
        training = self.watch.shares()
        self.model.eval()
        bits = heldout_bits(self.model, windows)
        self.model.train()
        point = {
            "step": self.num_steps,
            "flops": self.flops,
            "unpadded_flops": self.unpadded_flops,
            "heldout": round(bits, 5),
            "training": round(float(np.mean(self.losses)) / math.log(2), 5),
            "share": training,
            "heldout_share": self.watch.shares()["real"],
        }
        self.losses.clear()
        return point

    def heldout_under_training_rule(self, windows: Tensor) -> float:
        """The held-out loss under the rule of training; top-k looks ahead there, so that it measures a leak."""
        self.watch.close()
        return round(heldout_bits(copy.deepcopy(self.model).train(), windows), 5)


def run_hash(arm: str, settings: Settings, seed: int) -> str:
    """What a finished run must agree in to be used again: settings, the arm's config, documents, torch."""
    config = build_config(arm, settings).to_dict()
    config.pop("transformers_version", None)
    manifest_hash = load_data(settings.length, settings.heldout_windows)[2]
    said = [asdict(settings), config, arm, seed, manifest_hash, torch.__version__]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def run(arm: str, settings: Settings, seed: int, max_seconds: float | None = None) -> dict[str, Any]:
    """Train an arm until it has taken the plain model's steps and spent its FLOPs, whichever comes later.

    Args:
        arm: A key of `ARMS`.
        settings: What all runs share.
        seed: Of the weights, the rows and random routing.
        max_seconds: Stop after that much process time: for a trial of the speed.

    Returns:
        The settings' hash, sizes, times and the curve.
    """
    torch.set_num_threads(1)
    rows, windows, _ = load_data(settings.length, settings.heldout_windows)
    budget = settings.num_steps * flops_of_plain_step(settings)
    started, curve, evaluating = time.process_time(), [], 0.0
    trainee = Trainee(arm, settings, seed)
    source = batches(rows, settings, seed)
    interval = max(1, settings.num_steps // settings.num_evaluations)
    while True:
        trainee.step(next(source))
        seconds = time.process_time() - started
        timed_out = max_seconds is not None and seconds > max_seconds
        done = timed_out or (trainee.num_steps >= settings.num_steps and trainee.unpadded_flops >= budget)
        if done or trainee.num_steps % interval == 0:
            before = time.process_time()
            curve.append(trainee.evaluate(windows))
            evaluating += time.process_time() - before
            logger.info(
                "%-8s seed %d: step %4d, %3.0f %% of the FLOPs, held out %.4f bits per byte, %.0f s",
                arm, seed, trainee.num_steps, 100 * trainee.flops / budget, curve[-1]["heldout"], seconds,
            )  # fmt: skip
        if done:
            break
    num_tokens = trainee.num_steps * settings.batch_size * settings.length
    has_rule = bool(ARMS[arm].spans(settings))
    return {
        "arm": arm,
        "seed": seed,
        "hash": run_hash(arm, settings, seed),
        "parameters": trainee.model.num_parameters(),
        "flops_per_token": trainee.flops // num_tokens,
        "unpadded_flops_per_token": trainee.unpadded_flops // num_tokens,
        "heldout_under_training_rule": trainee.heldout_under_training_rule(windows) if has_rule else None,
        "process_seconds": round(time.process_time() - started, 1),
        "evaluation_seconds": round(evaluating, 1),
        "curve": curve,
    }
