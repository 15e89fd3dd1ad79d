"""A merged layer, written out: dense solutions on stacked activations, head by head. For models on the CPU."""

import copy

import torch

from hf_layerprune import merging, parallelize
from hf_layerprune.forward import final_states
from hf_layerprune.surgery import plan_of


@torch.no_grad()
def entered(model, batches):
    """What each block, and the final norm, reads at every token: a list of `(N, H)`."""
    found = []
    for batch in batches:
        states, valid = [], batch["attention_mask"].bool()
        readers = (*model.model.layers, model.model.norm)
        handles = [m.register_forward_pre_hook(lambda _, args: states.append(args[0][valid])) for m in readers]  # noqa: B023
        final_states(model, batch)
        found.append(states)
        for handle in handles:
            handle.remove()
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


@torch.no_grad()
def inside(model, batches, position):
    """What `o_proj` and `down_proj` of a block read: `(N, heads * D)` and `(N, I)`."""
    layer, found = model.model.layers[position], []
    for batch in batches:
        reads, valid = [], batch["attention_mask"].bool()
        handles = [
            module.register_forward_pre_hook(lambda _, args: reads.append(args[0][valid]))  # noqa: B023
            for module in (layer.self_attn.o_proj, layer.mlp.down_proj)
        ]
        final_states(model, batch)
        found.append(reads)
        for handle in handles:
            handle.remove()
    return [torch.cat(parts).double() for parts in zip(*found, strict=True)]


def refitted(read, weight, wanted, ridge):
    """`weight`, moved so that what it makes of `read` comes near `wanted`, by `lstsq` with the penalty as rows."""
    strength = (ridge * read.pow(2).sum() / len(read)).sqrt()
    rows = torch.cat([read, strength * torch.eye(read.shape[1], dtype=torch.float64)])
    return torch.linalg.lstsq(rows, torch.cat([wanted, strength * weight.T])).solution.T


def heads_that_add_most(heads, output, groups, head_dim, num_layers):
    """Columns of the groups of heads with the largest sum of squares of what they add, token by token."""
    columns = torch.arange(heads.shape[1]).view(groups, -1)
    added = [(heads[:, part] @ output[:, part].T).pow(2).sum() for part in columns]
    if head_dim is not None:  # whole layers
        sums = torch.stack(added).view(num_layers, -1).sum(dim=1)
        return columns.view(num_layers, -1)[sums.argmax()]
    best = sorted(sorted(range(groups), key=lambda group: -added[group])[: groups // num_layers])
    return columns[best].flatten()


def literal_merge(model, layers, batches, target, ridge):
    """`o_proj` and `down_proj` of merged `layers`, from the wide block that `parallelize` makes of them."""
    wide = parallelize(model, [layers])
    position = plan_of(wide).position_of(layers[0])
    attention, mlp = wide.model.layers[position].self_attn, wide.model.layers[position].mlp
    heads, neurons = inside(wide, batches, position)
    output, down = attention.o_proj.weight.double(), mlp.down_proj.weight.double()
    groups = len(attention.k_proj.weight) // attention.head_dim
    of_one = attention.head_dim if hasattr(attention, "q_norm") else None
    columns = heads_that_add_most(heads, output, groups, of_one, len(layers))
    o_proj = refitted(heads[:, columns], output[:, columns], heads @ output.T, ridge)

    gram = neurons.T @ neurons
    penalty = merging.LEVERAGE_RIDGE * torch.linalg.eigvalsh(gram).mean() * torch.eye(len(gram), dtype=torch.float64)
    leverage = torch.linalg.solve(gram + penalty, gram).diagonal()
    kept = leverage.topk(len(gram) // len(layers)).indices.sort().values
    return columns, o_proj, kept, down[:, kept], target.double()


@torch.no_grad()
def literal_model(merged, model, layers, batches, ridge):
    """`merged`, which was made of `model`, with what the dense solution says in the place of merged `layers`."""
    found, first = copy.deepcopy(merged), layers[0]
    target = entered(model, batches)[layers[-1] + 1]
    columns, o_proj, kept, down, target = literal_merge(model, layers, batches, target, ridge)
    layer, wide = found.model.layers[first], parallelize(model, [layers]).model.layers[first]
    layer.self_attn.q_proj.weight.copy_(wide.self_attn.q_proj.weight[columns])
    layer.mlp.up_proj.weight.copy_(wide.mlp.up_proj.weight[kept])
    layer.mlp.gate_proj.weight.copy_(wide.mlp.gate_proj.weight[kept])
    layer.self_attn.o_proj.weight.copy_(o_proj)
    _, neurons = inside(found, batches, first)
    state = entered(found, batches)[first + 1].double() - neurons @ layer.mlp.down_proj.weight.double().T
    layer.mlp.down_proj.weight.copy_(refitted(neurons, down, target - state, ridge))
    return found
