"""Train the embedded teacher: a 16-layer Qwen2 of 7.1M parameters, on public-domain books, from nothing.

    python recipes/tiny/train_teacher.py --books BOOKS --output_dir hf_layerprune/assets/teacher --compile

Matrices of the decoder layers are trained with Muon, everything else with AdamW; both follow one trapezoid
(warm-up, constant, linear decay to zero) over the run's progress, which is the larger of tokens seen over
`--tokens` and time spent over `--minutes`. The loss of the held-out books goes to `training_log.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from books import HELD_OUT, read_books
from tokenizers import pre_tokenizers, trainers
from torch import Tensor
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

END = "<|endoftext|>"


def train_tokenizer(texts: list[str], vocab_size: int) -> Qwen2Tokenizer:
    """Byte-level BPE with Qwen2's own pre-tokenizer."""
    bare = Qwen2Tokenizer().backend_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bare.train_from_iterator(texts, trainer)
    model = json.loads(bare.to_str())["model"]
    return Qwen2Tokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])


def encode(tokenizer: Qwen2Tokenizer, books: list[str]) -> Tensor:
    """All books as one stream of token ids, an end token after each book."""
    ids: list[int] = []
    for text in books:
        ids += tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    return torch.tensor(ids, dtype=torch.int32)


def build_model(args: argparse.Namespace, tokenizer: Qwen2Tokenizer) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=args.vocab_size,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=args.num_layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        use_cache=True,
    )
    model = Qwen2ForCausalLM(config)
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.normal_(weight, std=0.02 / (2 * args.num_layers) ** 0.5)
    return model


def sample_batch(stream: Tensor, batch_size: int, length: int, generator: torch.Generator) -> Tensor:
    """`batch_size` random windows of `length` tokens: `(B, T)`."""
    starts = torch.randint(len(stream) - length, (batch_size,), generator=generator)
    return torch.stack([stream[s : s + length] for s in starts.tolist()]).long()


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, stream: Tensor, length: int, max_windows: int) -> float:
    """Mean next-token loss in nats over evenly spaced windows of the held-out books."""
    device = next(model.parameters()).device
    windows = stream[: len(stream) // length * length].view(-1, length)
    windows = windows[:: max(1, len(windows) // max_windows)][:max_windows].long()
    losses = []
    for batch in windows.split(16):
        with torch.autocast(device.type, torch.bfloat16):
            losses.append(next_token_loss(model, batch.to(device)).item() * len(batch))
    return sum(losses) / len(windows)


def next_token_loss(model: torch.nn.Module, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())


def trapezoid(progress: float, warmup: float = 0.01, decay: float = 0.35) -> float:
    return max(0.0, min(1.0, progress / warmup, (1 - progress) / decay))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--books", required=True, help="folder of Gutenberg texts, one paragraph a line")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--num_layers", type=int, default=16)
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--tokens", type=float, default=1e12, help="stop after this many training tokens")
    parser.add_argument("--minutes", type=float, default=105, help="stop after this many minutes")
    parser.add_argument("--muon_lr", type=float, default=3e-3)
    parser.add_argument("--adam_lr", type=float, default=3e-3)
    parser.add_argument("--weight_decay", type=float, default=0.1)
    parser.add_argument("--eval_every", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--resume", action="store_true", help="go on from the last evaluation in --output_dir")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)

    books = read_books(args.books)
    train_texts = [text for name, text in books.items() if name not in HELD_OUT]
    tokenizer = train_tokenizer(train_texts, args.vocab_size)
    train = encode(tokenizer, train_texts)
    held_out = encode(tokenizer, [books[name] for name in HELD_OUT])

    model = build_model(args, tokenizer).to(device)
    run = torch.compile(model) if args.compile else model
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "layers" in n)]
    muon = torch.optim.Muon(matrices, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0)
    peak = {muon: args.muon_lr, adamw: args.adam_lr}

    generator = torch.Generator().manual_seed(args.seed)
    log = (output / "training_log.jsonl").open("a" if args.resume else "w", buffering=1)

    def record(**values: object) -> None:
        line = json.dumps(values)
        log.write(line + "\n")
        print(line, flush=True)

    record(
        **vars(args) | {"books": "public-domain books", "output_dir": output.name},
        parameters=model.num_parameters(),
        train_tokens=len(train),
        held_out_tokens=len(held_out),
        held_out_characters=sum(len(books[name]) for name in HELD_OUT),
        held_out_books=HELD_OUT,
        torch=torch.__version__,
        device=str(device),
    )
    step, seen, earlier, running = 0, 0, 0.0, None
    if args.resume:
        last = torch.load(output / "last.pt", map_location=device)
        model.load_state_dict(last["model"])
        for optimizer, state in zip(peak, last["optimizers"], strict=False):
            optimizer.load_state_dict(state)
        step, seen, earlier = last["step"], last["tokens"], last["minutes"]
        generator.manual_seed(args.seed + step)
    start, progress = time.monotonic(), max(seen / args.tokens, earlier / args.minutes)
    while progress < 1:
        ids = sample_batch(train, args.batch_size, args.length, generator).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            loss = next_token_loss(run, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scale = trapezoid(progress)
        for optimizer, lr in peak.items():
            optimizer.param_groups[0]["lr"] = lr * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step, seen = step + 1, seen + ids.numel()
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        minutes = earlier + (time.monotonic() - start) / 60
        progress = max(seen / args.tokens, minutes / args.minutes)
        if step % args.eval_every == 0 or progress >= 1:
            model.eval()
            value = held_out_loss(model, held_out, args.length, 64 if progress < 1 else 10**9)
            model.train()
            record(
                step=step,
                tokens=seen,
                minutes=round(minutes, 2),
                lr_scale=round(scale, 4),
                train_loss=round(running, 4),
                held_out_loss=round(value, 4),
            )
            optimizer_states = [optimizer.state_dict() for optimizer in peak]
            last = {"step": step, "tokens": seen, "minutes": minutes, "optimizers": optimizer_states}
            torch.save(last | {"model": model.state_dict()}, output / "last.pt")

    model.eval()
    prompt = tokenizer("It was a dark night, and", return_tensors="pt").to(device)
    for seed in range(3):
        torch.manual_seed(seed)
        sample = model.generate(**prompt, max_new_tokens=60, do_sample=True, temperature=0.7, top_k=40)
        record(sample=tokenizer.decode(sample[0]))
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.7,
        top_k=40,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)
    (output / "last.pt").unlink()


if __name__ == "__main__":
    main()
