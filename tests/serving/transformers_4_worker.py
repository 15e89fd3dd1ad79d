"""transformers 4 on saved students: what it reads, and what it computes. Needs neither hf_layerprune nor its tests."""

import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer


def run(folder: str, texts: list[str], new_tokens: int) -> dict:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, told = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    rows = [tokenizer(text).input_ids for text in texts]
    with torch.no_grad():
        logits = [model(torch.tensor([row])).logits[0] for row in rows]
        prompt = torch.tensor([rows[0]])
        answer = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens)
    missing = sorted(told["missing_keys"]) + sorted(told["unexpected_keys"])
    found = {"class": type(model).__name__, "version": transformers.__version__, "missing": missing}
    return found | {"rows": rows, "logits": logits, "answer": answer[0].tolist()}


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text())
    torch.save({folder: run(folder, *rest) for folder, *rest in asked}, sys.argv[2])
