"""Pull a student back: its plan and report, checked as outside input, and its model when it is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import OfflineModeIsEnabled, RemoteEntryNotFoundError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import LayerPruneError
from ..loading import load_model, load_tokenizer, one_revision, split_revision
from ..plan import LayerPlan
from ..surgery import plan_of
from .client import READING, patiently
from .reading import PLAN_FILE, REPORT_FILE, SIZE_LIMITS, read_plan, read_report
from .target import check_names


@dataclass(frozen=True)
class PulledRun:
    """A student and how it came about.

    Attributes:
        name (`str`): Hub id, or the folder of the student.
        revision (`str`, *optional*): the commit on the Hub that everything is from.
        plan ([`LayerPlan`]): which layers of the original it holds.
        report (`dict`): what its run measured: `teacher`, `rounds`, `settings`, `environment`.
        token (`str`, *optional*): what a private repository is read with.
    """

    name: str
    revision: str | None
    plan: LayerPlan
    report: dict[str, Any]
    token: str | None = field(default=None, repr=False)

    def load_model(self, **kwargs: Any) -> PreTrainedModel:
        """The student; options of [`load_model`]. No code that lies beside the weights is run.

        Raises:
            [`LayerPruneError`]: if it cannot be loaded, or is not what the plan says.
        """
        model = load_model(self.name, **self._options(kwargs))
        if plan_of(model) != self.plan:
            raise LayerPruneError(f"{self.name}: {PLAN_FILE} and config.json hold different plans; push it again")
        return model

    def load_tokenizer(self, **kwargs: Any) -> PreTrainedTokenizerBase:
        """The student's tokenizer; options of [`load_tokenizer`].

        Raises:
            [`LayerPruneError`]: if it cannot be loaded.
        """
        return load_tokenizer(self.name, **self._options(kwargs))

    def _options(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {"revision": self.revision, "token": self.token} | kwargs


def load_run(name: str | Path, revision: str | None = None, token: str | None = None) -> PulledRun:
    """The plan and the report of a pushed student, or of a run on this machine; its weights stay where they are.

    Args:
        name (`str` or `Path`): Hub id, maybe with `@revision`; the output folder of a run; or a downloaded student.
        revision (`str`, *optional*): branch, tag (such as `28-layers`) or commit on the Hub; main by default.
        token (`str`, *optional*): for a private repository; by default `HF_TOKEN` or the stored login.

    Raises:
        [`LayerPruneError`]: if there is no such student, or plan and report are not valid or do not belong together.
    """
    folder = Path(name)
    if folder.is_dir():
        files = {file: folder / file for file in (PLAN_FILE, REPORT_FILE)}
        if missing := [file for file, path in files.items() if not path.is_file()]:
            raise LayerPruneError(f"{name} holds no finished run: it has no {' and no '.join(missing)}")
        source, commit = str(folder / "model" if (folder / "model").is_dir() else folder), None
    else:
        source, revision = split_revision(str(name))[0], one_revision(str(name), revision)
        check_names(source, None)
        plan_path = _download(source, PLAN_FILE, revision, token)
        commit = plan_path.parent.name  # the cache keeps a folder per commit
        files = {PLAN_FILE: plan_path, REPORT_FILE: _download(source, REPORT_FILE, commit, token)}
    plan = read_plan(files[PLAN_FILE], f"{name}/{PLAN_FILE}")
    report = read_report(files[REPORT_FILE], f"{name}/{REPORT_FILE}")
    if not report["rounds"] or LayerPlan.from_dict(report["rounds"][-1]["plan"]) != plan:
        raise LayerPruneError(f"{name}: the last round of {REPORT_FILE} has another plan than {PLAN_FILE}")
    return PulledRun(source, commit, plan, report, token)


def _download(repo_id: str, file: str, revision: str | None, token: str | None) -> Path:
    """A file of a student, unless it is larger than it can be."""
    what = f"reading {file} of {repo_id}"
    try:
        try:
            url = hf_hub_url(repo_id, file, revision=revision)
            size = patiently(what, get_hf_file_metadata, url, token=token, purpose=READING).size
            if size is not None and size > SIZE_LIMITS[file]:
                raise LayerPruneError(f"{what}: it has {size:,} bytes; at most {SIZE_LIMITS[file]:,} are read")
        except LayerPruneError as error:
            if not isinstance(error.__cause__, OfflineModeIsEnabled):  # then the cache has it, or nothing has
                raise
        options = {"revision": revision, "token": token, "purpose": READING}
        return Path(patiently(what, hf_hub_download, repo_id, file, **options))
    except LayerPruneError as error:
        if isinstance(error.__cause__, RemoteEntryNotFoundError):
            raise LayerPruneError(
                f"{repo_id} holds no {file}; give a student that was pushed by hf-layerprune push"
            ) from error.__cause__
        raise
