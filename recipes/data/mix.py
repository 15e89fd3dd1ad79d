"""Mix a model's own answers with modern text into one file to heal on, and set aside held-out rows of both.

    python recipes/data/mix.py --answers answers.jsonl --model MODEL --output_dir DIR

`healing.jsonl` alternates answers, rendered with the model's chat template, and passages of modern text, so that any
stretch of it is a third answers by characters; `held_out_chat.jsonl` and `held_out_text.jsonl` are never healed on.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from hf_layerprune import load_tokenizer

HERE = Path(__file__).parent
HELD_OUT_ANSWERS = 80
TEXT_PER_ANSWER = 2  # characters of modern text for each one of the answers


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    print(f"{path}: {len(texts):,} rows, {sum(map(len, texts)):,} characters")


def interleaved(answers: list[str], text: list[str]) -> list[str]:
    """All answers, with passages of text between them."""
    passages, mixed, ahead = iter(text), [], 0
    for answer in answers:
        mixed.append(answer)
        ahead += TEXT_PER_ANSWER * len(answer)
        while ahead > 0 and (passage := next(passages, None)) is not None:
            mixed.append(passage)
            ahead -= len(passage)
    return mixed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=Path, required=True, help="what `hf-layerprune generate` wrote")
    parser.add_argument("--model", required=True, help="whose chat template renders the answers")
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()

    tokenizer = load_tokenizer(args.model)
    # The template ends with the end token and a line break; without the break no second end token is added.
    chats = [
        tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False).rstrip("\n")
        for row in read(args.answers)
    ]
    random.Random(0).shuffle(chats)
    text = [row["text"] for row in read(HERE / "modern_text.jsonl")]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write(args.output_dir / "healing.jsonl", interleaved(chats[HELD_OUT_ANSWERS:], text))
    write(args.output_dir / "held_out_chat.jsonl", chats[:HELD_OUT_ANSWERS])
    write(args.output_dir / "held_out_text.jsonl", [row["text"] for row in read(HERE / "modern_text_held_out.jsonl")])


if __name__ == "__main__":
    main()
