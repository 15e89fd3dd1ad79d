"""The Space on the Hub: its four files, and the push that makes or updates it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from huggingface_hub import CommitInfo, HfApi, SpaceCard, SpaceCardData, get_token

from ..errors import LayerPruneError
from ..files import write_atomically
from ..hub import load_run
from ..hub.paths import absolute_if_local, check_nothing_local, hub_id
from ..hub.push import check_content, full_name, open_repo
from ..hub.runs import hub_errors
from ..loading import EMBEDDED, is_gguf, split_revision
from .settings import DemoSettings, ModelEntry, read_settings

TEMPLATES = Path(__file__).parent.parent / "templates" / "space"
MODELS_FILE = "models.yaml"
GRADIO_VERSION = "6.31.0"
"""What the page was built and tested with."""
REPO_TYPE = "space"


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
    """Make a Space that compares students with their originals, or update it, in one commit.

    Args:
        repo_id (`str`): `user/name`, or a name in the token's own namespace.
        models (`str`, `Path` or `Sequence[str]`): a YAML file with the list of models, or Hub ids of pushed students.
        title (`str`, *optional*): of the Space.
        hardware (`str`, *optional*): what to suggest to those who copy the Space, such as `zero-a10g`.
        private (`bool`, *optional*): whether a Space that is made is private; by default the account's setting.
        token (`str`, *optional*): by default `HF_TOKEN` or the stored login.
        commit_message (`str`, *optional*): title of the commit.
        on_message (`Callable`, *optional*): told what is found and done, a sentence at a time.

    Returns:
        `CommitInfo`: the commit.

    Raises:
        [`LayerPruneError`]: if a model is not on the Hub, a run there is no pushed student, a name is invalid, the
            token has not the right, the repository holds something else, or the Hub cannot be reached.
    """
    settings = _settings(models, token)
    for entry in settings.models:
        _check_named(entry)
    api = HfApi(token=token)
    repo_id = full_name(api, repo_id)
    for entry in settings.models:
        _check_there(api, entry, on_message)
    with TemporaryDirectory(prefix="hf-layerprune-") as folder:
        write_space(Path(folder), settings, repo_id, title=title, hardware=hardware)
        check_nothing_local(Path(folder), (Path.home(), Path.cwd()), token or get_token())
        open_repo(api, repo_id, private=private, repo_type=REPO_TYPE, space_sdk="gradio")
        with hub_errors(f"pushing to {repo_id}"):
            files = api.list_repo_files(repo_id, repo_type=REPO_TYPE)
            check_content(files, MODELS_FILE, repo_id)
            on_message(f"{'updating' if MODELS_FILE in files else 'making'} the Space {repo_id}")
            default = "Update the comparison" if MODELS_FILE in files else "Compare original and compressed"
            options = {"repo_type": REPO_TYPE, "commit_message": commit_message or default}
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
    write_atomically(folder / "app.py", (TEMPLATES / "app.py.jinja").read_text(encoding="utf-8"))
    extras = "demo,gguf" if any(map(is_gguf, _named(settings))) else "demo"
    write_atomically(folder / "requirements.txt", f"hf-layerprune[{extras}]>={version('hf-layerprune')}\n")
    write_atomically(folder / MODELS_FILE, models_yaml(settings, title))
    card = SpaceCard.from_template(
        _metadata(settings, title, hardware),
        template_path=str(TEMPLATES / "README.md.jinja"),
        title=title,
        entries=[(entry.name, f": {entry.description}" if entry.description else "") for entry in settings.models],
        repo_id=repo_id,
    )
    write_atomically(folder / "README.md", str(card).rstrip() + "\n")


def models_yaml(settings: DemoSettings, title: str) -> str:
    """The list of models as `read_settings` takes it, without what is as by default."""
    entries = []
    for entry in settings.models:
        told = {key: value for key, value in asdict(entry).items() if value not in (None, "", ())}
        entries.append({key: list(value) if key == "examples" else value for key, value in told.items()})
    content: dict[str, Any] = {"title": title, "models": entries}
    if settings.dtype != "auto":
        content["dtype"] = settings.dtype
    limits = settings.limits
    if changed := {f.name: getattr(limits, f.name) for f in fields(limits) if getattr(limits, f.name) != f.default}:
        content["limits"] = changed
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120, default_flow_style=None)


def _named(settings: DemoSettings) -> list[str]:
    names = (name for entry in settings.models for name in (entry.run, entry.student, entry.teacher))
    return [name for name in names if name is not None]


def _metadata(settings: DemoSettings, title: str, hardware: str | None) -> SpaceCardData:
    models = list(dict.fromkeys(name for name in map(hub_id, _named(settings)) if name is not None))
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
        short_description="A language model beside a shallower copy of it",
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
        if hub_id(absolute_if_local(name)) is None:
            raise LayerPruneError(
                f"{name} is no model on the Hub, which a Space needs; push it first: hf-layerprune push {name} "
                "--repo_id user/name"
            )
        run = load_run(name, token=token)
        teacher = run.report["teacher"]["name"]
        layers = f"{run.plan.num_teacher_layers} to {run.plan.depth} layers"
        entries.append(ModelEntry(f"{name.split('/')[-1]}, {layers}", run=name, teacher=teacher or None))
    return DemoSettings(tuple(entries))


def _check_named(entry: ModelEntry) -> None:
    """Raise [`LayerPruneError`] if a model of the list has a name that is none on the Hub."""
    for key in ("run", "teacher", "student"):
        name = getattr(entry, key)
        if name is not None and name != EMBEDDED and hub_id(absolute_if_local(name)) is None:
            raise LayerPruneError(
                f"{entry.name}: {key}={name!r} is no model on the Hub, which a Space needs; push it first, or name it "
                "in a YAML file: --models"
            )


def _check_there(api: HfApi, entry: ModelEntry, on_message: Callable[[str], None]) -> None:
    """Raise [`LayerPruneError`] if a model of the list is not on the Hub, or its run is none; tell of private ones."""
    teacher = entry.teacher
    if entry.run is not None:
        teacher = teacher or load_run(entry.run, token=api.token).report["teacher"]["name"]
        if teacher != EMBEDDED and hub_id(teacher) is None:
            origin = f"{teacher}, which is no model on the Hub" if teacher else "what it does not say"
            raise LayerPruneError(f"{entry.name}: {entry.run} was made from {origin}; name its original, as teacher")
    for name in (entry.run, entry.student, teacher):
        if name in (None, EMBEDDED):
            continue
        repo_id, revision = hub_id(name) or name, split_revision(name)[1]
        with hub_errors(f"{entry.name}: looking at {name}"):
            private = api.model_info(repo_id, revision=revision).private
        if private:
            on_message(f"{name} is private: give the Space a secret HF_TOKEN that may read it")
