"""Read and write native Llama, Mistral, Mixtral, Jamba, Mamba, Mamba-2 and Bamba checkpoints.

"Native" is what `save_pretrained` of transformers' own class writes: `config.json` and safetensors, one file or
sharded. Import followed by export gives back the same tensor names, shapes, types and bytes, and an equal config; the
borders between shards may differ.
"""

from os import PathLike
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig
from transformers.utils import logging

from ..modeling.configuration_hybridlm import HybridLMConfig
from ..modeling.modeling_hybridlm import HybridLMForCausalLM
from ..modeling.registry import resolve_config
from ..modeling.remote_code import auto_map, ship_code
from .folders import copy_companions, read_config, whole_folder
from .native_config import LEGACY_ROPE, differences, native_class, to_hybrid, to_native
from .native_families import FAMILIES
from .native_plan import EMBEDDING, export_plan, import_plan, native_embedding, spelled
from .native_tables import Family, Options
from .native_tensors import Checkpoint, write_shards

logger = logging.get_logger(__name__)

MAX_SHARD_BYTES = 5 * 10**9


def import_native(src: str | PathLike, out: str | PathLike, *, max_shard_bytes: int = MAX_SHARD_BYTES) -> Path:
    """Turn a native folder into a hybridlm folder that `from_pretrained` loads, remote code included.

    Weights stream from shard to shard; at most one output shard is in memory.

    Args:
        src: Folder with `config.json` and safetensors.
        out: Folder to make; it may exist when it is empty. It appears complete or not at all.
        max_shard_bytes: Size of an output shard.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: The config, the weights or a shard is missing.
        FileExistsError: `out` is there and not empty.
        ValueError: A corrupt file, an unknown family, an option without a counterpart, a missing, surplus or misshapen
            tensor. The text names the file.
    """
    src = Path(src)
    raw = read_config(src)
    family = _family(raw, src)
    try:
        arguments = to_hybrid(family, _native_config(family, raw))
        config = HybridLMConfig(**arguments, architectures=[HybridLMForCausalLM.__name__])
        model = _empty_model(config)
    except (StrictDataclassError, ValueError) as error:
        raise ValueError(f"{src / 'config.json'}: {error}") from error
    record: Options = {"model_type": family.model_type, "config": raw}
    with Checkpoint(src) as checkpoint, whole_folder(out) as temporary:
        outputs, narrow = import_plan(family, config, model, checkpoint)
        record |= {"dtype": spelled(checkpoint.dtype(native_embedding(family))), "narrow_dtypes": narrow}
        write_shards(temporary, outputs, max_shard_bytes)
        config.extra = {**config.extra, "native": record}
        copy_companions(src, temporary)
        config.auto_map = auto_map()
        config.save_pretrained(temporary)
        ship_code(temporary, {})
    return Path(out)


def export_native(
    src: str | PathLike,
    out: str | PathLike,
    *,
    family: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Turn a hybridlm folder into the native folder of the family that its config equals.

    Options that change neither weights nor logits and that the family cannot say (dropouts, losses, initial values)
    are left out, with a warning that names them.

    Args:
        src: Folder with a hybridlm `config.json` and safetensors.
        out: Folder to make; it may exist when it is empty. It appears complete or not at all.
        family: A `model_type`; by default the one the folder was imported from, else the first that fits.
        max_shard_bytes: Size of an output shard.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: The config, the weights or a shard is missing.
        FileExistsError: `out` is there and not empty.
        ValueError: No family equals the config: the text lists each config path, what it says and what the nearest
            family has. Or a corrupt file or a missing, surplus or misshapen tensor: the text names the file.
    """
    src = Path(src)
    raw = read_config(src)
    if raw.get("model_type") != HybridLMConfig.model_type:
        raise ValueError(f"{src / 'config.json'}: model_type is {raw.get('model_type')!r}, expected 'hybridlm'")
    _check_architecture(raw, HybridLMForCausalLM.__name__, src)
    if family is not None and family not in FAMILIES:
        raise ValueError(f"family: unknown {family!r}, expected one of {sorted(FAMILIES)}")
    try:
        config = HybridLMConfig.from_dict(raw)
        model = _empty_model(config)
    except (StrictDataclassError, ValueError) as error:
        raise ValueError(f"{src / 'config.json'}: {error}") from error
    chosen, native = _equal_family(config, family)
    record = config.extra.get("native", {})
    with Checkpoint(src) as checkpoint, whole_folder(out) as temporary:
        # widened as a whole since the import: the islands are no exception any more
        same = EMBEDDING in checkpoint.names() and spelled(checkpoint.dtype(EMBEDDING)) == record.get("dtype")
        narrow = record.get("narrow_dtypes", {}) if same else {}
        write_shards(temporary, export_plan(chosen, config, model, checkpoint, narrow), max_shard_bytes)
        copy_companions(src, temporary)
        native.to_json_file(temporary / "config.json")
    return Path(out)


# --- configs ----------------------------------------------------------------------------------------------------------


def _family(raw: Options, src: Path) -> Family:
    family = FAMILIES.get(raw.get("model_type"))
    if family is None:
        raise ValueError(
            f"{src / 'config.json'}: model_type is {raw.get('model_type')!r}, expected one of {sorted(FAMILIES)}"
        )
    _check_architecture(raw, family.architecture, src)
    if raw.get("quantization_config"):
        raise ValueError(f"{src / 'config.json'}: quantization_config is set, expected unquantized weights")
    return family


def _check_architecture(raw: Options, expected: str, src: Path) -> None:
    if raw.get("architectures") not in (None, [], [expected]):
        raise ValueError(f"{src / 'config.json'}: architectures is {raw['architectures']!r}, expected [{expected!r}]")


def _native_config(family: Family, options: Options) -> PreTrainedConfig:
    try:
        return native_class(family).from_dict(dict(options))
    except (StrictDataclassError, ValueError, TypeError, KeyError, ZeroDivisionError, AttributeError) as error:
        raise ValueError(f"not a {family.model_type} config ({' '.join(str(error).split())})") from error


def _empty_model(config: HybridLMConfig) -> HybridLMForCausalLM:
    """The model without memory; building it checks the config and writes all defaults into it."""
    with torch.device("meta"):
        return HybridLMForCausalLM(config)


def _resolved(family: Family, native: PreTrainedConfig) -> Options:
    config = HybridLMConfig(**to_hybrid(family, native))
    resolve_config(config)
    return config.to_dict()


def _native_options(family: Family, config: HybridLMConfig) -> Options:
    """The native options of our config: those it was imported with, where it still says the same, else new ones."""
    options = to_native(family, config.to_dict())
    dtype = None if config.dtype is None else spelled(config.dtype)
    record = config.extra.get("native", {})
    if record.get("model_type") != family.model_type:
        options |= {"model_type": family.model_type, "architectures": [family.architecture]}
        return options | ({"dtype": dtype} if dtype else {})
    imported = dict(record["config"])
    native = _native_config(family, imported)
    before = to_native(family, _resolved(family, native))
    changed = {key: value for key, value in options.items() if key not in before or before[key] != value}
    if "rope_parameters" in changed:
        for key in LEGACY_ROPE:
            imported.pop(key, None)
    if dtype and dtype != spelled(native.dtype or record["dtype"]):
        imported.pop("torch_dtype", None)
        changed["dtype"] = dtype
    return imported | changed


def _equal_family(config: HybridLMConfig, wanted: str | None) -> tuple[Family, PreTrainedConfig]:
    recorded = config.extra.get("native", {}).get("model_type")
    names = [wanted] if wanted else sorted(FAMILIES, key=lambda name: name != recorded)
    reasons: dict[str, list[str]] = {}
    invalid: dict[str, list[str]] = {}
    for name in names:
        family = FAMILIES[name]
        try:
            native = _native_config(family, _native_options(family, config))
            blocking, harmless = differences(config.to_dict(), _resolved(family, native), name)
        except ValueError as error:
            invalid[name] = [str(error)]
            continue
        if not blocking:
            for sentence in harmless:
                logger.warning(f"export as {name} leaves out: {sentence}")
            return family, native
        reasons[name] = blocking
    reasons = reasons or invalid
    nearest = min(reasons, key=lambda name: len(reasons[name]))
    opening = (
        f"config does not equal {wanted}" if wanted else f"config equals no native family; the nearest is {nearest}"
    )
    raise ValueError(f"{opening}: {'; '.join(reasons[nearest])}")
