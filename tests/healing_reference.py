"""The loss of healing by its formula: full logits, every hidden state, one document at a time."""

import torch
import torch.nn.functional as F


def documents(batch):
    """The token ids `(1, T)` of each text in a padded batch, or in one without padding."""
    if "attention_mask" in batch:
        return [ids[mask.bool()][None] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    starts = batch["position_ids"][0].eq(0).nonzero().flatten().tolist()
    return [ids[None] for ids in batch["input_ids"][0].tensor_split(starts[1:])]


def divergence(p, q, beta):
    """Of log-probabilities, the teacher's and the student's."""
    if beta in (0, 1):
        return ((p.exp() * (p - q)) if beta == 0 else (q.exp() * (q - p))).sum()
    m = (beta * p.exp() + (1 - beta) * q.exp()).log()
    return (beta * p.exp() * (p - m) + (1 - beta) * q.exp() * (q - m)).sum()


def distance(x, y, args):
    if args.loss_preset == "paper":
        return (x - y).pow(2).mean(-1).sum()
    return ((x - y).pow(2).mean(-1) / y.pow(2).mean(-1)).sum()


def parts_of_loss(student, teacher, batch, states, args):
    """Divergence, hidden states of the blocks, final states and next-token loss, each a sum; and the tokens."""
    kl = hidden = final = lm = tokens = 0
    for ids in documents(batch):
        s, t = (model(ids, output_hidden_states=True, use_cache=False) for model in (student, teacher))
        p, q = (F.log_softmax(out.logits[0, :-1] / args.temperature, -1) for out in (t, s))
        kl = kl + args.temperature**2 * divergence(p, q, args.beta)
        compared = []
        for a, b in states:
            compared.append(distance(s.hidden_states[a + 1][0, :-1], t.hidden_states[b + 1][0, :-1], args))
        hidden = hidden + torch.stack(compared[-1:] if args.loss_preset == "paper" else compared).mean()
        final = final + distance(s.hidden_states[-1][0, :-1], t.hidden_states[-1][0, :-1], args)
        lm = lm + F.cross_entropy(s.logits[0, :-1], ids[0, 1:], reduction="sum")
        tokens += ids.shape[1] - 1
    return kl, hidden, final, lm, tokens


def loss_of_step(student, teacher, batches, states, args):
    """Of an optimizer step over some micro-batches."""
    found = [parts_of_loss(student, teacher, batch, states, args) for batch in batches]
    if args.loss_preset == "paper":
        return sum(kl / 100 + (hidden + final) / n for kl, hidden, final, _, n in found) / len(found)
    kl, hidden, final, lm, tokens = (sum(parts) for parts in zip(*found, strict=True))
    return (args.kl_weight * kl + args.hidden_weight * (hidden + final) / 2 + args.lm_weight * lm) / tokens
