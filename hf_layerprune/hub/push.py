"""Push the students of a run to the Hub, each in one commit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, get_token
from huggingface_hub.errors import RevisionNotFoundError

from ..errors import LayerPruneError
from .client import patiently, status_of
from .metadata import BaseFacts, base_facts
from .run_folder import RunFolder
from .staging import is_own, stage
from .target import MAIN, STAGING, Target, check_names, check_target, holds_other

GIT_ATTRIBUTES = ".gitattributes"
"""Says which files are large; comes with a repository and stays."""


def depth_tag(depth: int) -> str:
    """The tag of a student: `"28-layers"`."""
    return f"{depth}-layers"


def push_run(
    output_dir: str | Path,
    repo_id: str,
    *,
    round: int | str | None = None,
    revision: str | None = None,
    depth_tags: bool = False,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    base_model: str | None = None,
    tags: Sequence[str] = (),
    datasets: Sequence[str] = (),
    on_message: Callable[[str], None] = lambda text: None,
) -> CommitInfo:
    """Push a student with everything a stranger needs: weights, tokenizer, plan, recipe, report, plots and card.

    Everything that can be checked is checked before anything is sent. Each revision becomes visible whole, by one
    commit; a push that was interrupted is completed by pushing again, and what is there already is not sent twice.

    Args:
        output_dir (`str` or `Path`): output folder of a run of `compress`, `parallelize` or the trainer.
        repo_id (`str`): `user/name`, or a name in the token's own namespace. Made if it is not there; a student that
            was pushed there before is replaced, the history keeps it.
        round (`int` or `str`, *optional*): push the student of this round; by default the last one.
        revision (`str`, *optional*): branch to push to; main by default.
        depth_tags (`bool`, *optional*, defaults to `False`): push every round up to that one as well, and tag each
            with its depth, such as `28-layers`.
        private (`bool`, *optional*): whether a repository that is made is private; by default the account's setting.
        token (`str`, *optional*): by default `HF_TOKEN` or the stored login.
        commit_message (`str`, *optional*): by default the depth and what it was made from.
        base_model (`str`, *optional*): Hub id of the model the run started from; by default what the run says.
        tags (`Sequence[str]`, *optional*): tags of the card, beside the library's own.
        datasets (`Sequence[str]`, *optional*): Hub ids of the data, beside those the run names.
        on_message (`Callable`, *optional*): told what is found and done, a sentence at a time.

    Returns:
        `CommitInfo`: the commit that holds the student.

    Raises:
        [`LayerPruneError`]: if the folder holds no such student, a name is invalid, the token has not the right, the
            repository holds something else, or the Hub cannot be reached.
    """
    check_names(repo_id, revision)
    run = RunFolder.open(output_dir)
    last = run.number_of(round)
    latest = {depth_tag(run.plan(number).depth): number for number in range(1 if depth_tags else last, last + 1)}
    rounds = {number: tag for tag, number in latest.items()}  # of several rounds of one depth the last
    for number in rounds:
        run.student(number)
    api = HfApi(token=token)
    names = list(rounds.values()) if depth_tags else []
    target = check_target(api, repo_id, revision, names)
    if private and target.exists and not target.private:
        raise LayerPruneError(
            f"{target.repo_id} exists and is public, so private=True cannot be kept; make it private on the Hub first"
        )
    if target.exists:
        on_message(f"{target.repo_id} is there already; {_what_happens(target, revision or MAIN)}")
    facts = _facts(base_model or run.base_model, token, on_message)
    with TemporaryDirectory(prefix="hf-layerprune-") as temporary:
        folders = {number: Path(temporary) / f"{number:02d}" for number in rounds}
        for number, folder in folders.items():  # all of them, before anything is sent
            folder.mkdir()
            where = revision if number == last else rounds[number]
            options = {"revision": None if where == MAIN else where, "revisions": names, "token": token or get_token()}
            stage(run, number, folder, target.repo_id, base_model, tags, datasets, facts, **options)
        card = ModelCard.load(folders[last] / "README.md")  # what the others' metadata differ in are numbers
        patiently(f"checking the card of {target.repo_id}", card.validate)
        push = _Push(api, target)
        push.create(private)
        for number, folder in folders.items():
            on_message(f"pushing {run.plan(number).depth} layers to {target.repo_id}")
            title = commit_message or _title(run, number)
            if number < last:
                push.tagged(folder, rounds[number], title)
                continue
            commit = push.to_branch(folder, revision or MAIN, title)
            if depth_tags:
                push.tag(rounds[number], commit.oid)
    return commit


class _Push:
    """The steps of a push, each of which may be repeated."""

    def __init__(self, api: HfApi, target: Target) -> None:
        self.api = api
        self.repo_id = target.repo_id
        self.target = target

    def create(self, private: bool | None) -> None:
        if not self.target.exists:
            patiently(f"making {self.repo_id}", self.api.create_repo, self.repo_id, private=private, exist_ok=True)

    def to_branch(self, folder: Path, branch: str, title: str) -> CommitInfo:
        """Commit to a branch; one that is new appears with its commit."""
        if branch == MAIN or branch in self.target.branches:
            return self._commit(folder, branch, title)
        commit = self._aside(folder, branch, None, title)
        what = f"making the branch {branch} of {self.repo_id}"
        patiently(what, self.api.create_branch, self.repo_id, branch=branch, revision=commit.oid, exist_ok=True)
        self._drop(STAGING + branch)
        return commit

    def tagged(self, folder: Path, tag: str, title: str) -> None:
        """Commit beside all branches and tag the commit."""
        commit = self._aside(folder, tag, self.target.tags.get(tag), title)
        self.tag(tag, commit.oid)
        self._drop(STAGING + tag)

    def tag(self, tag: str, commit: str) -> None:
        """Let a tag point at a commit. The Hub cannot move one: it is deleted, then made."""
        patiently(f"tagging {tag} in {self.repo_id}", self._tag_once, tag, commit)

    def _tag_once(self, tag: str, commit: str) -> None:
        """Asks first what is there now: an answer may have been lost, or somebody else have set the tag."""
        now = {ref.name: ref.target_commit for ref in self.api.list_repo_refs(self.repo_id).tags}.get(tag)
        if now == commit:
            return
        if now is not None:
            self.api.delete_tag(self.repo_id, tag=tag)
        self.api.create_tag(self.repo_id, tag=tag, revision=commit)

    def _aside(self, folder: Path, name: str, start: str | None, title: str) -> CommitInfo:
        """Commit to a branch of its own, made from the commit `start`, or from main."""
        branch, what = STAGING + name, f"preparing {name} in {self.repo_id}"
        patiently(what, self.api.create_branch, self.repo_id, branch=branch, revision=start, exist_ok=True)
        return self._commit(folder, branch, title)

    def _drop(self, branch: str) -> None:
        """Delete a branch; one that is not there, perhaps since an answer got lost, is deleted."""
        try:
            patiently(f"tidying up {self.repo_id}", self.api.delete_branch, self.repo_id, branch=branch)
        except LayerPruneError as error:
            if not isinstance(error.__cause__, RevisionNotFoundError) and status_of(error) != 404:
                raise

    def _commit(self, folder: Path, branch: str, title: str) -> CommitInfo:
        return patiently(f"pushing to {self.repo_id}", self._commit_once, folder, branch, title)

    def _commit_once(self, folder: Path, branch: str, title: str) -> CommitInfo:
        """One commit on what the branch holds now: one whose answer was lost is not made again."""
        now = self.api.model_info(self.repo_id, revision=branch)
        there = {file.rfilename for file in now.siblings or ()}
        brought = sorted(path.name for path in folder.iterdir())
        gone = _superseded(there, branch.startswith(STAGING)) - {GIT_ATTRIBUTES, *brought}
        operations = [
            *(CommitOperationAdd(name, str(folder / name)) for name in brought),
            *(CommitOperationDelete(name) for name in sorted(gone)),
        ]
        options = {"commit_message": title, "revision": branch, "parent_commit": now.sha}
        return self.api.create_commit(self.repo_id, operations, **options)


def _superseded(there: set[str], aside: bool) -> set[str]:
    """What a commit takes away: files of earlier pushes; of a branch made aside from something else, everything."""
    return set(there) if aside and holds_other(there) else {name for name in there if is_own(name)}


def _what_happens(target: Target, branch: str) -> str:
    if branch not in target.branches:
        return f"its branch {branch} will be made"
    return f"its branch {branch} holds {target.holds or 'no model yet'} and will be updated"


def _facts(source: str | None, token: str | None, on_message: Callable[[str], None]) -> BaseFacts:
    if not source:
        on_message("the run does not say what it was made from, so the card names no license; base_model= does")
        return BaseFacts()
    facts, why = base_facts(source, token)
    if why:
        on_message(f"the card names no license: that of {source} could not be read ({why})")
    return facts


def _title(run: RunFolder, number: int) -> str:
    return f"{run.plan(number).depth} layers of {run.report_until(number)['teacher']['name'] or 'the original'}"
