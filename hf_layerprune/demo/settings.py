"""What a demo shows and allows: the list of models, read from YAML or named on the command line, and the limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from ..errors import LayerPruneError, first_line

EXAMPLES = (
    "The old man looked out of the window and",
    "She opened the letter slowly, and when she had read it",
    "It was a dark and stormy night;",
)
"""Beginnings that suit a model that was trained on books."""
CHAT_EXAMPLES = (
    "Why is the sky blue? Answer in two sentences.",
    "Write a short poem about a lighthouse.",
    "Name three differences between a list and a tuple in Python.",
)


@dataclass(frozen=True)
class Limits:
    """What one visitor may ask for; enforced on the server.

    Attributes:
        max_prompt_characters (`int`): longest prompt, in characters.
        max_prompt_tokens (`int`): longest prompt, or chat so far, in tokens.
        max_new_tokens (`int`): longest answer, in tokens.
        max_inspected_tokens (`int`): longest text of the next-token view, in tokens.
        max_seconds (`int`): longest time for one answer.
        max_waiting (`int`): visitors that may wait in the queue.
        max_models (`int`): models kept in memory; the one that was used longest ago goes first.
    """

    max_prompt_characters: int = 4000
    max_prompt_tokens: int = 1024
    max_new_tokens: int = 512
    max_inspected_tokens: int = 128
    max_seconds: int = 120
    max_waiting: int = 40
    max_models: int = 4

    def __post_init__(self) -> None:
        for limit in fields(self):
            value, least = getattr(self, limit.name), 2 if limit.name == "max_models" else 1
            if type(value) is not int or value < least:
                raise LayerPruneError(f"{limit.name}={value!r} must be a whole number of at least {least}")


@dataclass(frozen=True)
class ModelEntry:
    """One line of the list that visitors choose from.

    A run, or an original and a student, or an original and a plan that is applied to it when it is loaded.

    Attributes:
        name (`str`): what the visitor sees.
        run (`str`, *optional*): output folder of a run, or Hub id of a student that was pushed.
        teacher (`str`, *optional*): the original: folder, Hub id or `"embedded"`; of a run by default what it says.
        student (`str`, *optional*): folder or Hub id of the compressed model.
        plan (`list[list[int]]`, *optional*): blocks of the original's layers.
        description (`str`, *optional*): a sentence about it.
        examples (`tuple[str, ...]`, *optional*): prompts to click.
    """

    name: str
    run: str | None = None
    teacher: str | None = None
    student: str | None = None
    plan: list[list[int]] | None = None
    description: str = ""
    examples: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise LayerPruneError(f"a model of the list has name={self.name!r}; give it one for visitors to choose by")
        for key in ("run", "teacher", "student", "description"):
            if not isinstance(getattr(self, key), (str, type(None))):
                raise LayerPruneError(f"{self.name}: {key}={getattr(self, key)!r} is no text")
        if not isinstance(self.examples, (list, tuple)) or any(not isinstance(text, str) for text in self.examples):
            raise LayerPruneError(f"{self.name}: examples={self.examples!r:.200} is no list of texts")
        object.__setattr__(self, "examples", tuple(self.examples))
        if sum(value is not None for value in (self.run, self.student, self.plan)) != 1:
            raise LayerPruneError(f"{self.name}: give exactly one of run, student and plan")
        if self.run is None and self.teacher is None:
            raise LayerPruneError(f"{self.name}: name its original too, as teacher")


@dataclass(frozen=True)
class DemoSettings:
    """A demo.

    Attributes:
        models (`tuple[ModelEntry, ...]`): what visitors choose from; nothing else can be loaded.
        title (`str`): heading of the page.
        dtype (`str`): dtype of the weights: auto (each checkpoint's own), float32, bfloat16 or float16.
        limits ([`Limits`]): what a visitor may ask for.
    """

    models: tuple[ModelEntry, ...]
    title: str = "Original and compressed, side by side"
    dtype: str = "auto"
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not isinstance(self.title, str) or not self.title.strip():
            raise LayerPruneError(f"title={self.title!r} is no text; put it in quotes")
        names = [entry.name for entry in self.models]
        if not names:
            raise LayerPruneError("the list of models is empty; give at least one")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise LayerPruneError(f"the list names {twice[0]!r} twice; give each model a name of its own")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise LayerPruneError(f"dtype={self.dtype!r} is unknown; choose auto, float32, bfloat16 or float16")


def read_settings(path: str | Path) -> DemoSettings:
    """Read the list of models, `models.yaml`; a folder in it is meant from where the file lies.

    Raises:
        [`LayerPruneError`]: if it is missing, is not YAML, or holds a key that nothing reads.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LayerPruneError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, yaml.YAMLError) as error:
        raise LayerPruneError(f"{path} is not YAML: {first_line(error)}") from None
    try:
        return _settings(content, path.parent)
    except LayerPruneError as error:
        raise LayerPruneError(f"{path}: {error}") from None


def _settings(content: Any, folder: Path) -> DemoSettings:
    if not isinstance(content, dict) or not isinstance(content.get("models"), list):
        raise LayerPruneError('it needs a list "models"')
    values = _known(content, DemoSettings, "the file")
    values["models"] = tuple(_entry(item, folder) for item in values["models"])
    if "limits" in values:
        values["limits"] = Limits(**_known(values["limits"], Limits, "limits"))
    return DemoSettings(**values)


def _entry(item: Any, folder: Path) -> ModelEntry:
    values = _known(item, ModelEntry, "a model of the list")
    if "name" not in values:
        raise LayerPruneError(f"a model of the list has no name: {item!r:.200}")
    for key in ("run", "teacher", "student"):
        value = values.get(key)
        if isinstance(value, str) and value and (folder / value).is_dir():
            values[key] = str(folder / value)
    return ModelEntry(**values)


def _known(values: Any, kind: type, what: str) -> dict[str, Any]:
    names = [known.name for known in fields(kind)]
    if not isinstance(values, dict):
        raise LayerPruneError(f"{what} is {values!r:.200}; give settings: {', '.join(names)}")
    if unknown := [key for key in values if key not in names]:
        raise LayerPruneError(f"{what} has an unknown key {unknown[0]!r}; choose from {', '.join(names)}")
    return dict(values)


def settings_of(words: Sequence[str]) -> DemoSettings:
    """The demo of what stands on the command line: a run, an original and a student, or nothing.

    Raises:
        [`LayerPruneError`]: for more than two words.
    """
    if len(words) > 2:
        raise LayerPruneError(f"{' '.join(words)} are {len(words)} names; give one run, or an original and a student")
    if len(words) == 2:
        teacher, student = words
        name = f"{_short(teacher)} and {_short(student)}"
        return DemoSettings((ModelEntry(name, teacher=teacher, student=student),))
    if words:
        return DemoSettings((ModelEntry(_short(words[0]), run=words[0]),))
    return DemoSettings((embedded_entry(),))


def embedded_entry() -> ModelEntry:
    """What is shown where nothing is named: the embedded teacher, and twelve of its layers run in parallel.

    The groups are those that `python benchmarks/edits.py` chose, without the healing.
    """
    blocks = [[0], [1, 2], [3, 4], [5, 6], [7], [8, 9], [10, 11], [12, 13], [14], [15]]
    about = "A small English model that comes with hf_layerprune, and the same weights with twelve layers in parallel."
    return ModelEntry("Embedded teacher, 16 to 10 layers", teacher="embedded", plan=blocks, description=about)


def _short(name: str) -> str:
    return Path(name).name or name
