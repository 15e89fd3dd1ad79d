"""What several verbs do: load a model, read text, print tables, keep the recipe and the folder of a run."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from rich import box
from rich.markup import escape
from rich.table import Table
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..data import EMBEDDED_MODEL, Batch, check_length, is_one_split, load_text_dataset, may_have, tokenized_batches
from ..errors import LayerPruneError
from ..files import write_atomically
from ..hub.paths import with_absolute_paths
from ..loading import load_model, resolve
from ..progress import Console, Phases, say
from ..record import RunRecord
from ..report import perplexity_caption, table_rows
from .arguments import DataArguments, MeasureArguments


def device() -> torch.device:
    """The accelerator, if there is one."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def load_on_device(name: str, dtype: str, phases: Phases, **kwargs: Any) -> PreTrainedModel:
    """Load a model onto that device, or where a `device_map` says."""
    phases.phase(f"loading {name}")
    model = load_model(name, dtype, device(), **kwargs)
    return model if kwargs.get("device_map") else model.to(device())


def check_sources(arguments: DataArguments, *others: str | None) -> None:
    """Refuse to read no text for a model that brings none, or a split or configuration that none of the texts has;
    `others` are the further data sets that the settings name."""
    if arguments.dataset is None and resolve(arguments.model) != EMBEDDED_MODEL:
        raise LayerPruneError(
            f"--dataset is missing: which text is {arguments.model} to read? (The English books that come with the "
            "package are embedded:healing, embedded:calibration and embedded:held_out)"
        )
    split, named = arguments.dataset_split, [name for name in (arguments.dataset, *others) if name is not None]
    if split != "train" and not any(may_have(name, split) for name in named):
        raise LayerPruneError(
            f"dataset_split={split!r} is not in {' and '.join(named) or 'the embedded text'}: a local file takes "
            "'train' or a slice such as 'train[:100]'; leave it out"
        )
    if (name := arguments.dataset_config) is not None and all(map(is_one_split, named)):
        text = " and ".join(named) or "the embedded text"
        raise LayerPruneError(f"dataset_config={name!r}: {text} has no configurations; leave it out")


def check_no_text(given: Iterable[str], reader: str) -> None:
    """Refuse settings of text where `reader` reads none."""
    if found := sorted({"dataset", "dataset_text_field", "max_length", "num_samples"}.intersection(given)):
        raise LayerPruneError(f"{reader}; leave out {', '.join(found)}")


def check_text(arguments: MeasureArguments, config: PretrainedConfig, *others: str | None) -> None:
    """Like [`check_sources`], and refuse rows that are longer than the model can read."""
    check_sources(arguments, *others)
    check_length(arguments.max_length, config, arguments.model)


def read_dataset(arguments: DataArguments, source: str) -> Dataset:
    """A data set that the settings of a verb name."""
    return load_text_dataset(source, arguments.dataset_split, arguments.dataset_config)


def text_batches(
    arguments: MeasureArguments, tokenizer: PreTrainedTokenizerBase, source: str, num_rows: int
) -> list[Batch]:
    """Rows of the data set `source`, read as the settings say."""
    return tokenized_batches(
        read_dataset(arguments, source),
        tokenizer,
        text_field=arguments.dataset_text_field,
        max_length=arguments.max_length,
        num_rows=num_rows,
        batch_size=arguments.batch_size,
    )


def write_recipe(folder: Path, given: dict[str, Any], **changed: Any) -> None:
    """Write `recipe.yaml`: `--config` repeats the run, from any folder, on any machine.

    It holds what was `given`, some of it `changed`; what was derived from that here, such as `bf16`, is derived again.
    """
    content = given | changed | {"output_dir": str(folder)}
    content = {name: value for name, value in content.items() if name not in ("gguf_file", "resume")}
    text = yaml.safe_dump(with_absolute_paths(content), sort_keys=False, allow_unicode=True)
    write_atomically(folder / "recipe.yaml", text)


def check_new_folder(folder: Path, instead: str = "") -> None:
    """Refuse a folder that holds something; `instead` says what else to do."""
    if folder.is_dir() and any(folder.iterdir()):
        raise LayerPruneError(f"output_dir={folder} is not empty; {instead}choose another folder")


@contextmanager
def writable(folder: Path | None) -> Iterator[None]:
    """Make a folder that can be written, if there is to be one, before the work that fills it; an error that leaves it
    empty, or with halves of what `replace_folder` puts there, removes it again."""
    if folder is None:
        yield
        return
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    try:
        yield
    except BaseException:
        if new:
            for half in folder.glob("*.tmp"):
                shutil.rmtree(half, ignore_errors=True)
            with suppress(OSError):  # it is not empty
                folder.rmdir()
        raise


def print_table(
    names: Sequence[str],
    rows: Iterable[Sequence[str]],
    title: str | None = None,
    wide: str | None = None,
    console: Console | None = None,
) -> None:
    """Print a table that fits a terminal of 80 columns: the column `wide`, by default the first, may wrap."""
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    for name in names:
        may_wrap = name == (wide or names[0])
        justify = "left" if may_wrap and wide is None else "right"
        table.add_column(name, justify=justify, no_wrap=not may_wrap, overflow="fold", min_width=8 * may_wrap)
    for row in rows:
        table.add_row(*map(escape, row))
    (console or Console()).print(table)


def print_run(run: RunRecord, console: Console, folder: Path, what: str) -> None:
    """Print what came of a run, and where its files are; `what` names the model in `folder`."""
    rows = table_rows(run)
    print_table(list(rows[0]), [list(row.values()) for row in rows], perplexity_caption(run), "edit", console)
    say_files(console, {what: folder / "model", "report": folder / "report.md", "plot": folder / "quality.png"})


def say_files(console: Console, files: dict[str, Path]) -> None:
    """Print where `files` are, and how to get the plot if there is none."""
    there = {what: str(path) for what, path in files.items() if path.exists()}
    if "plot" not in there:
        there["no plot"] = "pip install 'hf-layerprune[plots]'"
    say(console, "   ".join(f"{what}: {where}" for what, where in there.items()))
