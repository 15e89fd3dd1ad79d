"""`hf-layerprune convert`: a checkpoint in another family's form, with the same logits."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..conversion import convert as convert_model
from ..errors import LayerPruneError
from ..files import replace_folder
from ..forward import measuring
from ..loading import load_config, load_model, load_tokenizer
from ..progress import Phases, say
from ..trainer.students import write_student
from .parsing import check_new_folder, parse

TOLERANCE = {torch.float32: 1e-4}
ROUGH_TOLERANCE = 0.05  # of the dtypes with fewer digits
PROBE = "The year 2024, 12345 words:\n\n    naïve café, it's 3.14159 — don't!\t日本語 <|end|>"


def convert(argv: list[str]) -> None:
    """Convert, save beside the output folder, read back and compare, and only then put it there."""
    (arguments,) = parse("convert", argv)
    if arguments.model is None or arguments.output_dir is None:
        raise LayerPruneError("which model, and where to? give --model MODEL --output_dir DIR")
    folder = Path(arguments.output_dir)
    check_new_folder(folder)
    load_config(arguments.model)
    tokenizer = load_tokenizer(arguments.model)
    phases = Phases()
    phases.phase(f"loading {arguments.model}")
    model = load_model(arguments.model, dtype=arguments.dtype)
    phases.phase("converting, writing and comparing")
    expected, before = _logits(model), type(model).__name__
    converted = convert_model(model, arguments.to)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        target = write_student(converted, tokenizer, converted.dtype, Path(temporary) / "model")
        del model, converted
        written = load_model(str(target))
        difference = _check(written, expected)
        read_by_others = _check_tokenizer(target, tokenizer)
        replace_folder(target, folder)
    console = Console()
    say(
        console,
        f"{before} as {type(written).__name__}: {folder}   logits differ by {difference:.1e} of their size",
    )
    if not read_by_others:
        say(
            console,
            f"transformers' AutoTokenizer takes any tokenizer beside a {type(written).__name__} for Qwen2's and would "
            f"split text differently; elsewhere load it with PreTrainedTokenizerFast.from_pretrained({str(folder)!r})",
        )


def _logits(model: PreTrainedModel) -> Tensor:
    """Of tokens that are always the same: `(1, T, V)`."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, 32), generator=generator)
    with measuring(model):
        return model(ids.to(model.device), use_cache=False).logits.float()


def _check(written: PreTrainedModel, expected: Tensor) -> float:
    """The relative difference of the logits."""
    difference = ((_logits(written) - expected).norm() / expected.norm()).item()
    if not difference <= TOLERANCE.get(written.dtype, ROUGH_TOLERANCE):
        raise LayerPruneError(
            f"the converted model's logits differ by {difference:.1e} of their size; nothing was written. Please "
            "report this with the model's config.json"
        )
    return difference


def _check_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether `AutoTokenizer` reads what was saved as it was; we have to."""
    wanted = _encoded(tokenizer)
    if _encoded(load_tokenizer(str(folder))) != wanted:
        raise LayerPruneError("the tokenizer reads differently once it is saved; nothing was written")
    return _encoded(AutoTokenizer.from_pretrained(folder)) == wanted


def _encoded(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], str | None]:
    return tokenizer(PROBE).input_ids, tokenizer.chat_template
