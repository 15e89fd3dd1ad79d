"""Cut the books into the text the package carries: calibration and healing (seen by the teacher), held-out (not).

python recipes/tiny/make_text.py --books BOOKS --output_dir hf_layerprune/assets/text
"""

from __future__ import annotations

import argparse
import lzma
from pathlib import Path

from books import HELD_OUT, read_books, sample_passages

CALIBRATION_CHARACTERS = 500_000
HEALING_CHARACTERS = 8_000_000
HELD_OUT_CHARACTERS = 1_400_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--books", required=True, help="folder of Gutenberg texts, one paragraph a line")
    parser.add_argument("--output_dir", required=True)
    args = parser.parse_args()
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)

    books = read_books(args.books)
    seen = {name: text for name, text in books.items() if name not in HELD_OUT}
    held_out = {name: text for name, text in books.items() if name in HELD_OUT}
    training = sample_passages(seen, CALIBRATION_CHARACTERS + HEALING_CHARACTERS, seed=0)
    split, characters = 0, 0
    while characters < CALIBRATION_CHARACTERS:
        characters += len(training[split])
        split += 1
    texts = {
        "calibration": training[:split],
        "healing": training[split:],
        "held_out": sample_passages(held_out, HELD_OUT_CHARACTERS, seed=0),
    }
    for name, texts_of in texts.items():
        packed = lzma.compress("\n\n".join(texts_of).encode(), preset=9 | lzma.PRESET_EXTREME)
        (output / f"{name}.txt.xz").write_bytes(packed)
        print(f"{name}: {len(texts_of)} passages, {sum(map(len, texts_of)):,} characters, {len(packed):,} bytes")


if __name__ == "__main__":
    main()
