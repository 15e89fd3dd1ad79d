"""What a demo shows and allows: the list of models, from YAML or the command line, and the limits."""

# no `from __future__ import annotations`: `strict` reads the types of the fields

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import yaml
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError

from ..errors import LayerPruneError
from ..files import load_yaml
from ..hub.paths import hub_id
from ..hub.runs import run_of
from ..loading import EMBEDDED
from ..settings import check_at_least


@strict
@dataclass
class Limits:
    """What one visitor may ask for; enforced on the server."""

    max_prompt_characters: int = 4000
    max_prompt_tokens: int = 1024  # or of the conversation so far
    max_new_tokens: int = 512
    max_inspected_tokens: int = 128  # of the next-token view
    max_seconds: int = 120  # for one answer
    max_waiting: int = 40  # visitors in the queue
    max_models: int = 4  # in memory; the least recently used goes first

    def __post_init__(self) -> None:
        check_at_least(self, dict.fromkeys(vars(self), 1) | {"max_models": 2})


@strict
@dataclass
class ModelEntry:
    """One line of the list that visitors choose from: a run, a teacher and a student, or a teacher and a plan."""

    name: str  # what the visitor sees
    run: str | None = None  # output folder of a run, or Hub id of a pushed student
    teacher: str | None = None  # folder, Hub id or "embedded"; by default what the run says
    student: str | None = None  # folder or Hub id
    plan: list[list[int]] | None = None  # blocks of teacher layers, applied to the teacher in memory
    description: str = ""
    examples: list[str] = field(default_factory=list)  # prompts to click

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.run, self.student, self.plan)) != 1:
            raise LayerPruneError(f"{self.name}: give exactly one of run, student and plan")
        if self.run is None and self.teacher is None:
            raise LayerPruneError(f"{self.name}: name the teacher too")


@strict
@dataclass
class DemoSettings:
    """A demo: what visitors choose from (nothing else can be loaded), and what they may ask for."""

    models: list[ModelEntry]
    title: str = "Original and compressed, side by side"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the weights; each checkpoint's own
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        names = [entry.name for entry in self.models]
        if not names:
            raise LayerPruneError("the list of models is empty; give at least one")
        if len(set(names)) < len(names):
            raise LayerPruneError(f"two models have the same name; give each its own: {', '.join(names)}")


def read_settings(path: str | Path) -> DemoSettings:
    """Read the list of models, `models.yaml`. Folders in it are relative to the file."""
    path = Path(path)
    try:
        content = load_yaml(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not isinstance(content.get("models"), list):
            raise LayerPruneError('it needs a list "models"')
        models = [_fields(ModelEntry, item, f"models[{n}]") for n, item in enumerate(content["models"])]
        for entry in models:
            for key in ("run", "teacher", "student"):
                if (name := getattr(entry, key)) and (path.parent / name).is_dir():
                    setattr(entry, key, str(path.parent / name))
        limits = _fields(Limits, content.get("limits", {}), "limits")
        return _fields(DemoSettings, content | {"models": models, "limits": limits}, "the list")
    except OSError as error:
        raise LayerPruneError(f"{path} cannot be read: {error.strerror or error}") from None
    except (TypeError, ValueError, yaml.YAMLError, StrictDataclassError) as error:
        raise LayerPruneError(f"{path}: {' '.join(str(error).split())}") from None


def _fields(kind: type, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise LayerPruneError(f"{where} must be keys and values, not {values!r:.50}")
    known = [f.name for f in fields(kind)]
    for key in values.keys() - set(known):
        close = get_close_matches(str(key), known, 1)
        meant = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(known)}"
        raise LayerPruneError(f"{where} has an unknown key {key!r}; {meant}")
    return kind(**values)


def settings_of(names: Sequence[str]) -> DemoSettings:
    """The demo of the names on the command line: a run, a teacher and a student, or nothing."""
    if len(names) > 2:
        raise LayerPruneError(f"{' '.join(names)} are {len(names)} names; give one run, or a teacher and a student")
    for name in names:
        if name != EMBEDDED and not Path(name).exists() and hub_id(name) is None:
            raise LayerPruneError(f"there is no {name!r}; name the output folder of a run, a model folder or a Hub id")
    if not names:
        return DemoSettings([embedded_entry()])
    teacher, last = names[0] if len(names) == 2 else None, names[-1]
    run = run_of(Path(last))
    if run is None and teacher is not None:
        return DemoSettings([ModelEntry(f"{_short(teacher)} and {_short(last)}", teacher=teacher, student=last)])
    return DemoSettings([ModelEntry(_short(str(run or last)), run=str(run or last), teacher=teacher)])


def embedded_entry() -> ModelEntry:
    """The default: the embedded teacher, and twelve of its layers in parallel.

    The groups are those that `python benchmarks/edits.py` chose, without the healing.
    """
    blocks = [[0], [1, 2], [3, 4], [5, 6], [7], [8, 9], [10, 11], [12, 13], [14], [15]]
    about = "A small English model that comes with hf_layerprune, and the same weights with twelve layers in parallel."
    return ModelEntry("Embedded teacher, 16 to 10 layers", teacher="embedded", plan=blocks, description=about)


def _short(name: str) -> str:
    return Path(name).name or name
