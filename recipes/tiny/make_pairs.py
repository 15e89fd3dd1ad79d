"""Choose the minimal pairs the package carries: the same number of every phenomenon, evenly over its pairs.

python recipes/tiny/make_pairs.py --blimp blimp.jsonl --output_dir hf_layerprune/assets/text
"""

from __future__ import annotations

import argparse
import json
import lzma
from collections import defaultdict
from pathlib import Path

PAIRS_PER_PHENOMENON = 18
COLUMNS = ("sentence_good", "sentence_bad", "linguistics_term", "UID")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blimp", required=True, help="BLiMP's pairs in one .jsonl file")
    parser.add_argument("--output_dir", required=True)
    args = parser.parse_args()

    phenomena = defaultdict(list)
    for line in Path(args.blimp).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        phenomena[row["UID"]].append({name: row[name] for name in COLUMNS})
    # One of each phenomenon after the other: the first pairs are as varied as all of them.
    chosen = [
        rows[number * len(rows) // PAIRS_PER_PHENOMENON]
        for number in range(PAIRS_PER_PHENOMENON)
        for rows in phenomena.values()
    ]
    packed = lzma.compress("\n".join(map(json.dumps, chosen)).encode(), preset=9 | lzma.PRESET_EXTREME)
    (Path(args.output_dir) / "minimal_pairs.jsonl.xz").write_bytes(packed)
    print(f"{len(chosen)} pairs of {len(phenomena)} phenomena, {len(packed):,} bytes")


if __name__ == "__main__":
    main()
