"""What a text costs a model, without any of the library."""

import torch
import torch.nn.functional as F


def nll(model, tokenizer, prompt, text):
    """Nats of `text` behind `prompt`."""
    before = tokenizer(prompt)["input_ids"] if prompt else [tokenizer.eos_token_id]
    ids = torch.tensor([before + tokenizer(text)["input_ids"]])
    with torch.no_grad():
        log_probabilities = F.log_softmax(model(ids).logits.double(), -1)[0]
    return -sum(log_probabilities[t - 1, ids[0, t]].item() for t in range(len(before), ids.shape[1]))
