"""Which tensor is written where: the work list of an import or an export, checked before anything is written."""

import torch

from ..modeling.configuration_hybridlm import HybridLMConfig
from ..modeling.modeling_hybridlm import HybridLMForCausalLM
from ..modeling.precision import Float32Islands
from .native_config import layout_of
from .native_tables import Family
from .native_tensors import Checkpoint, Output, native_pieces, num_bytes, piece_shape

EMBEDDING_MODULE = "model.embed_tokens"
EMBEDDING = f"{EMBEDDING_MODULE}.weight"


def native_embedding(family: Family) -> str:
    """Native name of the embedding matrix."""
    return f"{family.modules[EMBEDDING_MODULE]}.weight"


def spelled(dtype: torch.dtype | str) -> str:
    """The type as configs spell it."""
    return str(dtype).removeprefix("torch.")


def _expected(config: HybridLMConfig, model: HybridLMForCausalLM) -> dict[str, tuple[int, ...]]:
    """Our tensors on disk, in the order of the model."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return shapes


def _islands(model: HybridLMForCausalLM) -> set[str]:
    """Names of the tensors that stay float32 in a narrower model."""
    return {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if isinstance(module, Float32Islands)
        for name in module.float32_names
    }


def import_plan(
    family: Family, config: HybridLMConfig, model: HybridLMForCausalLM, checkpoint: Checkpoint
) -> tuple[list[Output], dict[str, str]]:
    """What to write, and the native types of the float32 islands that were narrower."""
    layout, islands = layout_of(config.to_dict()), _islands(model)
    outputs: list[Output] = []
    narrow: dict[str, str] = {}
    used: set[str] = set()
    for name, shape in _expected(config, model).items():
        pieces = native_pieces(family, layout, name, shape)
        for piece in pieces:
            _check_tensor(checkpoint, piece.name, piece_shape(shape, piece.index))
        used.update(piece.name for piece in pieces)
        dtypes = {checkpoint.dtype(piece.name) for piece in pieces}
        if len(dtypes) > 1:
            raise ValueError(f"{checkpoint.folder}: experts of {name} differ in type: {sorted(map(str, dtypes))}")
        dtype = native_dtype = dtypes.pop()
        if name in islands and dtype.itemsize < 4:
            dtype = torch.float32
            narrow[name] = spelled(native_dtype)

        def make(pieces=pieces, shape=shape, dtype=dtype) -> torch.Tensor:
            if not pieces[0].index:
                return checkpoint.read(pieces[0].name).to(dtype)
            tensor = torch.empty(shape, dtype=dtype)
            for piece in pieces:
                tensor[piece.index] = checkpoint.read(piece.name)
            return tensor

        outputs.append(Output(name, num_bytes(shape, dtype), make))
    _check_surplus(checkpoint, used, tied_to=native_embedding(family))
    present = islands & set(_expected(config, model))
    if set(narrow) == present and len(set(narrow.values())) == 1:
        narrow = {"*": narrow.popitem()[1]}  # one entry for all islands
    return outputs, narrow


def export_plan(
    family: Family,
    config: HybridLMConfig,
    model: HybridLMForCausalLM,
    checkpoint: Checkpoint,
    narrow: dict[str, str],
) -> list[Output]:
    """What to write; the float32 islands in `narrow` (or all, under `*`) get that type back."""
    layout, expected, islands = layout_of(config.to_dict()), _expected(config, model), _islands(model)
    outputs = []
    for name, shape in expected.items():
        _check_tensor(checkpoint, name, shape)
        dtype = checkpoint.dtype(name)
        if name in islands and dtype == torch.float32 and (native_dtype := narrow.get(name, narrow.get("*"))):
            dtype = getattr(torch, native_dtype)
        for piece in native_pieces(family, layout, name, shape):

            def make(name=name, index=piece.index, dtype=dtype) -> torch.Tensor:
                return checkpoint.read(name, index).to(dtype)

            outputs.append(Output(piece.name, num_bytes(piece_shape(shape, piece.index), dtype), make))
    _check_surplus(checkpoint, set(expected), tied_to=EMBEDDING)
    return outputs


def _check_tensor(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> None:
    if name not in checkpoint.names():
        raise ValueError(f"{checkpoint.folder}: tensor {name} is missing")
    if checkpoint.shape(name) != shape:
        found = list(checkpoint.shape(name))
        raise ValueError(f"{checkpoint.where(name)}: {name} has shape {found}, config.json asks for {list(shape)}")


def _check_surplus(checkpoint: Checkpoint, used: set[str], tied_to: str) -> None:
    for name in sorted(checkpoint.names() - used):
        # older versions of transformers stored what follows from other things in the folder
        if name.endswith("rotary_emb.inv_freq"):
            continue
        if name == "lm_head.weight":
            if torch.equal(checkpoint.read(name), checkpoint.read(tied_to)):
                continue
            raise ValueError(f"{checkpoint.where(name)}: {name} differs from {tied_to}, to which config.json ties it")
        raise ValueError(f"{checkpoint.where(name)}: tensor {name} is unknown to this config")
