"""A causal model without weights to speak of that solves what is answered by the text itself.

It predicts what followed the longest earlier run of tokens that equals the last ones, the latest of them if there are
several. Padded columns are invisible to it.
"""

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class LookupConfig(PreTrainedConfig):
    model_type = "lookup_test_model"

    def __init__(self, vocab_size=258, max_position_embeddings=512, num_hidden_layers=1, **kwargs):
        self.vocab_size, self.max_position_embeddings = vocab_size, max_position_embeddings
        self.num_hidden_layers = num_hidden_layers
        super().__init__(**kwargs)


class LookupForCausalLM(PreTrainedModel, GenerationMixin):
    """See above; `wrong_at` makes it err on purpose at that token of every text, counted from the left."""

    config_class = LookupConfig
    _is_stateful = True

    def __init__(self, config):
        super().__init__(config)
        self.scale = nn.Parameter(torch.tensor(9.0))
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        logits = torch.zeros(*input_ids.shape, self.config.vocab_size)
        for row, ids in enumerate(input_ids.tolist()):
            for place, token in enumerate(best_continuations(ids)):
                logits[row, place, token] = float(self.scale)
        return CausalLMOutput(logits=logits)

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        return {"input_ids": input_ids}


def best_continuations(ids):
    """For every place the token that followed the longest match of what ends there; the token itself without one."""
    previous, found = [0] * (len(ids) + 1), []
    for place, token in enumerate(ids):
        lengths = [0] * (len(ids) + 1)
        best, choice = 0, token
        for earlier in range(place):
            if ids[earlier] == token:
                lengths[earlier + 1] = previous[earlier] + 1
                if lengths[earlier + 1] >= best:
                    best, choice = lengths[earlier + 1], ids[earlier + 1]
        previous = lengths
        found.append(choice)
    return found
