"""Mix a model's own answers with modern text into one file to heal on, and set aside held-out rows of both.

    python recipes/data/mix.py --answers answers.jsonl --model MODEL --output_dir DIR [--more_answers FILE ...]

`healing.jsonl` alternates answers, rendered with the model's chat template, and passages of modern text, so that any
stretch of it is a third answers by characters, or more where the text does not suffice. `held_out_chat.jsonl` and
`held_out_text.jsonl` are never healed on; `prompts.jsonl` are the prompts of all other answers. More answers, of other
draws for the same prompts, are only healed on, and not if their prompt is that of a held-out answer.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_layerprune import load_tokenizer

HERE = Path(__file__).parent
HELD_OUT_ANSWERS = 80
TEXT_PER_ANSWER = 2  # characters of modern text for each one of the answers


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, texts: list[str], column: str = "text") -> None:
    path.write_text("".join(json.dumps({column: text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    print(f"{path}: {len(texts):,} rows, {sum(map(len, texts)):,} characters")


def interleaved(answers: list[str], text: list[str]) -> list[str]:
    """All answers, with passages of text between them."""
    passages, mixed, ahead = iter(text), [], 0.0
    share = min(TEXT_PER_ANSWER, sum(map(len, text)) / max(1, sum(map(len, answers))))
    for answer in answers:
        mixed.append(answer)
        ahead += share * len(answer)
        while ahead > 0 and (passage := next(passages, None)) is not None:
            mixed.append(passage)
            ahead -= len(passage)
    return mixed


def rendered(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Chats as text. The template ends with the end token and a line break; without it no second one is added."""
    chats = [tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False) for row in rows]
    return [chat.rstrip("\n") for chat in chats]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=Path, required=True, help="what `hf-layerprune generate` wrote")
    parser.add_argument("--model", required=True, help="whose chat template renders the answers")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--more_answers", type=Path, nargs="*", default=[], help="of other draws, to heal on")
    args = parser.parse_args()

    tokenizer = load_tokenizer(args.model)
    rows = read(args.answers)
    random.Random(0).shuffle(rows)
    held_out, healed = rows[:HELD_OUT_ANSWERS], rows[HELD_OUT_ANSWERS:]
    prompts = [row["prompt"][-1]["content"] for row in healed]
    if args.more_answers:
        unseen = [row["prompt"] for row in held_out]
        healed += [row for path in args.more_answers for row in read(path) if row["prompt"] not in unseen]
        random.Random(1).shuffle(healed)
    text = [row["text"] for row in read(HERE / "modern_text.jsonl")]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write(args.output_dir / "healing.jsonl", interleaved(rendered(healed, tokenizer), text))
    write(args.output_dir / "prompts.jsonl", prompts, "prompt")
    write(args.output_dir / "held_out_chat.jsonl", rendered(held_out, tokenizer))
    write(args.output_dir / "held_out_text.jsonl", [row["text"] for row in read(HERE / "modern_text_held_out.jsonl")])


if __name__ == "__main__":
    main()
