"""The Space on the Hub: its four files, and the push that makes or updates it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from huggingface_hub import CommitInfo, HfApi, SpaceCard, SpaceCardData, get_token

from ..errors import LayerPruneError
from ..hub.paths import absolute_if_local, check_nothing_local, hub_id
from ..hub.push import check_content, full_name, open_repo
from ..hub.runs import hub_errors
from ..loading import EMBEDDED, is_gguf, split_revision
from .catalog import pushed_run
from .settings import DemoSettings, ModelEntry, read_settings

TEMPLATES = Path(__file__).parent.parent / "templates" / "space"
MODELS_FILE = "models.yaml"
GRADIO_VERSION = "6.31.0"
"""What the page was built and tested with."""


def push_space(
    repo_id: str,
    models: str | Path | Sequence[str],
    *,
    title: str | None = None,
    hardware: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    on_message: Callable[[str], None] = lambda text: None,
) -> CommitInfo:
    """Make a Space that compares students with their teachers, or update it, in one commit.

    Args:
        repo_id (`str`): `user/name`, or a name in the token's own namespace.
        models (`str`, `Path` or `Sequence[str]`): a YAML file with the list of models, or Hub ids of pushed students.
        title (`str`, *optional*): of the Space.
        hardware (`str`, *optional*): what to suggest to those who copy the Space, such as `zero-a10g`.
        private (`bool`, *optional*): whether a new Space is private; by default the account's setting.
        token (`str`, *optional*): by default `HF_TOKEN` or the stored login.
        commit_message (`str`, *optional*): title of the commit.
        on_message (`Callable`, *optional*): called with what is found and done, a sentence at a time.

    Returns:
        `CommitInfo`: the commit.

    Raises:
        [`LayerPruneError`]: if a model is not on the Hub, a run there is not a pushed student, the token may not write
            there, the repository holds something else, or the Hub cannot be reached.
    """
    settings = _settings(models, token)
    api = HfApi(token=token)
    repo_id = full_name(api, repo_id)
    for entry in settings.models:
        _check_models(api, entry, on_message)
    with TemporaryDirectory(prefix="hf-layerprune-") as folder:
        write_space(Path(folder), settings, repo_id, title=title, hardware=hardware)
        check_nothing_local(Path(folder), (Path.home(), Path.cwd()), token or get_token())
        open_repo(api, repo_id, private=private, repo_type="space", space_sdk="gradio")
        with hub_errors(f"pushing to {repo_id}"):
            files = api.list_repo_files(repo_id, repo_type="space")
            check_content(files, MODELS_FILE, repo_id)
            on_message(f"{'updating' if MODELS_FILE in files else 'making'} the Space {repo_id}")
            default = "Update the comparison" if MODELS_FILE in files else "Compare original and compressed"
            options = {"repo_type": "space", "commit_message": commit_message or default}
            return api.upload_folder(repo_id=repo_id, folder_path=folder, **options)


def write_space(
    folder: Path, settings: DemoSettings, repo_id: str, *, title: str | None = None, hardware: str | None = None
) -> None:
    """Write the files of a Space: `app.py`, `README.md`, `requirements.txt` and `models.yaml`.

    Args:
        folder (`Path`): where to.
        settings ([`DemoSettings`]): models and limits.
        repo_id (`str`): name of the Space on the Hub.
        title (`str`, *optional*): by default that of the settings.
        hardware (`str`, *optional*): what to suggest to those who copy the Space.
    """
    title = title or settings.title
    names = [name for entry in settings.models for name in (entry.run, entry.student, entry.teacher) if name]
    card = SpaceCard.from_template(
        _metadata(names, title, hardware),
        template_path=str(TEMPLATES / "README.md.jinja"),
        title=title,
        entries=[(entry.name, f": {entry.description}" if entry.description else "") for entry in settings.models],
        repo_id=repo_id,
    )
    extras = "demo,gguf" if any(map(is_gguf, names)) else "demo"
    files = {
        "app.py": (TEMPLATES / "app.py.jinja").read_text(encoding="utf-8"),
        "requirements.txt": f"hf-layerprune[{extras}]>={version('hf-layerprune')}\n",
        MODELS_FILE: models_yaml(settings, title),
        "README.md": str(card).rstrip() + "\n",
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


def models_yaml(settings: DemoSettings, title: str) -> str:
    """The list of models as `read_settings` takes it, without the defaults."""
    content = {"title": title, "models": [_changed(entry) for entry in settings.models]}
    more = {key: value for key, value in _changed(settings).items() if key not in content}
    if "limits" in more:
        more["limits"] = _changed(settings.limits)
    return yaml.safe_dump(content | more, sort_keys=False, allow_unicode=True, width=120, default_flow_style=None)


def _changed(settings: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults."""
    defaults = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(settings)}
    return {name: getattr(settings, name) for name in defaults if getattr(settings, name) != defaults[name]}


def _metadata(names: Sequence[str], title: str, hardware: str | None) -> SpaceCardData:
    models = list(dict.fromkeys(name for name in map(hub_id, names) if name is not None))
    more = {"suggested_hardware": hardware} if hardware else {}
    return SpaceCardData(
        title=title,
        emoji="🥞",
        colorFrom="green",
        colorTo="gray",
        sdk="gradio",
        sdk_version=GRADIO_VERSION,
        python_version="3.12",
        app_file="app.py",
        pinned=False,
        license="apache-2.0",
        short_description="A language model next to a shallower copy of it",
        models=models or None,
        preload_from_hub=models or None,
        tags=["hf_layerprune", "layer-pruning", "model-compression", "mcp-server"],
        startup_duration_timeout="1h",
        **more,
    )


def _settings(models: str | Path | Sequence[str], token: str | None) -> DemoSettings:
    if isinstance(models, (str, Path)):
        return read_settings(models)
    entries = []
    for name in models:
        _check_name(name)
        teacher, plan = pushed_run(name, token)
        about = f"{name.split('/')[-1]}, {plan.num_teacher_layers} to {plan.depth} layers"
        entries.append(ModelEntry(about, run=name, teacher=teacher or None))
    return DemoSettings(entries)


def _check_name(name: str) -> None:
    if name != EMBEDDED and hub_id(absolute_if_local(name)) is None:
        raise LayerPruneError(
            f"{name!r} is not a model on the Hub, which a Space needs; push it first (hf-layerprune push), or name "
            "another in a YAML file: --models"
        )


def _check_models(api: HfApi, entry: ModelEntry, on_message: Callable[[str], None]) -> None:
    """Raise [`LayerPruneError`] if a model of the list is not on the Hub, or its run is not; report private ones."""
    for name in filter(None, (entry.run, entry.student, entry.teacher)):
        _check_name(name)
    of_run = pushed_run(entry.run, api.token)[0] if entry.run else ""
    teacher = entry.teacher or of_run
    if teacher != EMBEDDED and hub_id(teacher) is None:
        raise LayerPruneError(
            f"{entry.name}: {entry.run} was made from {teacher!r}, which is not a model on the Hub; name the teacher"
        )
    for name in filter(None, (entry.run, entry.student, teacher)):
        repo_id, revision = hub_id(name), split_revision(name)[1]
        if repo_id is None:  # the embedded model
            continue
        with hub_errors(f"{entry.name}: looking at {name}"):
            private = api.model_info(repo_id, revision=revision).private
        if private:
            on_message(f"{name} is private: give the Space a secret HF_TOKEN that may read it")
