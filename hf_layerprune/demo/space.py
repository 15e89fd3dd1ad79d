"""The Space on the Hub: its files, and the push that makes or updates it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from huggingface_hub import CommitInfo, HfApi, SpaceCard, SpaceCardData, get_token, hf_hub_url

from .. import __version__
from ..errors import LayerPruneError
from ..hub import load_run
from ..hub.paths import absolute_if_local, check_nothing_local, hub_id
from ..hub.push import check_content, full_name, open_repo
from ..hub.runs import hub_errors
from ..loading import EMBEDDED, is_gguf, split_revision
from .catalog import teacher_of
from .settings import DemoSettings, ModelEntry, read_settings

TEMPLATES = Path(__file__).parent.parent / "templates" / "space"
MODELS_FILE, THUMBNAIL, WHEELS = "models.yaml", "thumbnail.png", "hf_layerprune-*.whl"


def push_space(
    repo_id: str,
    models: str | Path | Sequence[str],
    *,
    title: str | None = None,
    hardware: str | None = None,
    private: bool | None = None,
    wheel: str | Path | None = None,
    on_message: Callable[[str], None],
) -> CommitInfo:
    """Make a Space that compares students with their teachers, or update it, in one commit.

    `models` is a YAML file with the list of models, or the Hub ids of pushed students. `wheel` is a wheel of this
    package, which the Space holds and installs instead of a release; the Space must then be public. `hardware` is
    suggested to those who copy the Space.
    """
    listed, api = isinstance(models, (str, Path)), HfApi()
    settings = read_settings(models) if listed else DemoSettings([ModelEntry(name, run=name) for name in models])
    wheel = None if wheel is None else _checked_wheel(Path(wheel), private)
    repo_id = full_name(api, repo_id)
    entries = [_checked(api, entry, listed, on_message) for entry in settings.models]
    with TemporaryDirectory(prefix="hf-layerprune-") as folder:
        settings = replace(settings, models=entries, title=title or settings.title)
        write_space(Path(folder), settings, repo_id, hardware, wheel)
        check_nothing_local(Path(folder), (Path.home(), Path.cwd()), get_token())
        with hub_errors(f"pushing to {repo_id}"):
            open_repo(api, repo_id, private=private, repo_type="space", space_sdk="gradio")
            if wheel is not None:
                _checked_wheel(wheel, api.repo_info(repo_id, repo_type="space").private)
            files = api.list_repo_files(repo_id, repo_type="space")
            check_content(files, MODELS_FILE, repo_id)
            on_message(f"{'updating' if MODELS_FILE in files else 'making'} the Space {repo_id}")
            message = "Update the comparison" if MODELS_FILE in files else "Compare original and compressed"
            options = {"repo_type": "space", "commit_message": message, "delete_patterns": WHEELS}
            return api.upload_folder(repo_id=repo_id, folder_path=folder, **options)


def write_space(
    folder: Path, settings: DemoSettings, repo_id: str, hardware: str | None = None, wheel: Path | None = None
) -> None:
    """Write the files of a Space: code, card, requirements, list of models and picture, and a `wheel` if given."""
    names = [name for entry in settings.models for name in (entry.run, entry.student, entry.teacher) if name]
    on_hub = list(dict.fromkeys(filter(None, map(hub_id, names))))
    metadata = SpaceCardData(
        title=settings.title,
        suggested_hardware=hardware,
        models=on_hub or None,
        thumbnail=hf_hub_url(repo_id, THUMBNAIL, repo_type="space"),
        preload_from_hub=[*on_hub] or None,
    )
    card = SpaceCard.from_template(
        metadata,
        template_path=str(TEMPLATES / "README.md.jinja"),
        settings=settings,
        models=on_hub,
        repo_id=repo_id,
    )
    # a Space is built from its requirements alone, before it has its other files
    source = f" @ {hf_hub_url(repo_id, wheel.name, repo_type='space')}" if wheel else f">={__version__}"
    extras = "demo,gguf" if any(map(is_gguf, names)) else "demo"
    content = {"title": settings.title} | _changed(settings)  # as `read_settings` takes it, without the defaults
    content["models"] = [_changed(entry) for entry in settings.models]
    if "limits" in content:
        content["limits"] = _changed(settings.limits)
    files = {
        "app.py": (TEMPLATES / "app.py.jinja").read_text(encoding="utf-8"),
        "requirements.txt": f"hf-layerprune[{extras}]{source}\n",
        MODELS_FILE: yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120, default_flow_style=None),
        "README.md": str(card).rstrip() + "\n",
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    for file in filter(None, (TEMPLATES / THUMBNAIL, wheel)):
        shutil.copy(file, folder)


def _checked_wheel(wheel: Path, private: bool | None) -> Path:
    if not (wheel.is_file() and wheel.match(WHEELS)):
        raise LayerPruneError(f"wheel={wheel} is not a wheel of hf-layerprune; `make dist` in a clone writes one")
    if private:
        raise LayerPruneError("a private Space cannot install a wheel it holds; make it public, or leave out wheel")
    return wheel


def _changed(settings: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults."""
    defaults = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(settings)}
    return {name: getattr(settings, name) for name in defaults if getattr(settings, name) != defaults[name]}


def _checked(api: HfApi, entry: ModelEntry, listed: bool, on_message: Callable[[str], None]) -> ModelEntry:
    """An entry whose models are all on the Hub, with a name and its teacher unless it is `listed` in a file."""
    for name in filter(None, (entry.run, entry.student, entry.teacher)):
        if name != EMBEDDED and hub_id(absolute_if_local(name)) is None:
            raise LayerPruneError(
                f"{name!r} is not a model on the Hub, which a Space needs; push it first (hf-layerprune push), or "
                "name another in a YAML file: --models"
            )
    teacher = entry.teacher
    if entry.run:
        run = load_run(entry.run)
        teacher = teacher_of(entry, run)
        if not listed:
            about = f"{entry.run.split('/')[-1]}, {run.plan.num_teacher_layers} to {run.plan.depth} layers"
            entry = replace(entry, name=about, teacher=teacher)
    for name in filter(None, (entry.run, entry.student, teacher)):
        repo_id, revision = hub_id(name), split_revision(name)[1]
        if repo_id is None:  # the embedded model
            continue
        with hub_errors(f"{entry.name}: looking at {name}"):
            private = api.model_info(repo_id, revision=revision).private
        if private:
            on_message(f"{name} is private: give the Space a secret HF_TOKEN that may read it")
    return entry
