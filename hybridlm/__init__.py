"""hybridlm: hybrid state-space / attention language models for Hugging Face.

Importing the package registers its classes, so that `AutoModelForCausalLM` and its relatives find them.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .hub.lora import lora_targets
from .modeling.cache import HybridCache
from .modeling.configuration_hybridlm import HybridLMConfig
from .modeling.modeling_hybridlm import (
    HybridLMForCausalLM,
    HybridLMForQuestionAnswering,
    HybridLMForSequenceClassification,
    HybridLMForTokenClassification,
    HybridLMModel,
)
from .modeling.quantization import quantization_skip_modules
from .modeling.registry import CHANNEL_MIXERS, MIXERS, RESIDUALS, SPANS

__version__ = "0.1.0"

AutoConfig.register("hybridlm", HybridLMConfig, exist_ok=True)
for _auto, _model in (
    (AutoModel, HybridLMModel),
    (AutoModelForCausalLM, HybridLMForCausalLM),
    (AutoModelForSequenceClassification, HybridLMForSequenceClassification),
    (AutoModelForTokenClassification, HybridLMForTokenClassification),
    (AutoModelForQuestionAnswering, HybridLMForQuestionAnswering),
):
    _auto.register(HybridLMConfig, _model, exist_ok=True)

__all__ = [
    "CHANNEL_MIXERS",
    "MIXERS",
    "RESIDUALS",
    "SPANS",
    "HybridCache",
    "HybridLMConfig",
    "HybridLMForCausalLM",
    "HybridLMForQuestionAnswering",
    "HybridLMForSequenceClassification",
    "HybridLMForTokenClassification",
    "HybridLMModel",
    "lora_targets",
    "quantization_skip_modules",
]
