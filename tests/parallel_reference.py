"""The two equations of layer parallelism, word for word: what a block of several layers must compute.

y = x + sum of A_i(N1_i(x));   z = y + sum of F_i(N2_i(y))        (https://huggingface.co/papers/2502.02790)
"""

import copy

from torch import nn


class LiteralBlock(nn.Module):
    """Several whole decoder layers on one input, each with its own norms."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, hidden_states, **kwargs):
        attended = hidden_states
        for layer in self.layers:
            attended = attended + layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)[0]
        output = attended
        for layer in self.layers:
            output = output + layer.mlp(layer.post_attention_layernorm(attended))
        return output


def literal(model, blocks):
    """A copy of plain `model` that computes `blocks` by the equations, for use_cache=False."""
    parallel = copy.deepcopy(model)
    layers = parallel.model.layers
    parallel.model.layers = nn.ModuleList(LiteralBlock([layers[i] for i in block]) for block in blocks)
    parallel.config.num_hidden_layers = len(blocks)
    parallel.config.layer_types = ["full_attention"] * len(blocks)
    return parallel
