"""Where a push goes: may it, and what is there already? Asked before anything is uploaded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..errors import LayerPruneError
from .client import patiently
from .reading import PLAN_FILE, REPORT_FILE

MAIN = "main"
STAGING = "hf-layerprune-staging-"
"""Begins the name of a branch that holds a commit until the tag or branch it is for points at it."""
REVISION = re.compile(r"(?!refs/|[0-9a-f]{40}$)[A-Za-z0-9_][\w.-]*(/[\w-][\w.-]*)*")
HARMLESS = re.compile(r"\.gitattributes|\.gitignore|README\.md|LICEN[CS]E(\.\w+)?|NOTICE(\.\w+)?", re.IGNORECASE)
"""Files of a repository that was made on the Hub's site and holds no model yet."""


@dataclass(frozen=True)
class Target:
    """A repository as it is before a push.

    Attributes:
        repo_id (`str`): with its namespace.
        exists (`bool`): whether it is there.
        private (`bool`): whether it is there and private.
        branches (`dict[str, str]`): its branches and their commits.
        tags (`dict[str, str]`): its tags and their commits.
        holds (`str`): what is in the revision that the push will replace; empty if nothing is.
    """

    repo_id: str
    exists: bool
    private: bool
    branches: dict[str, str]
    tags: dict[str, str]
    holds: str = ""


def check_names(repo_id: str, revision: str | None) -> None:
    """Raise [`LayerPruneError`] unless both could be names on the Hub."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise LayerPruneError(
            f"repo_id={repo_id!r} is no name of a repository; give user/name in letters, digits, '-', '_' and '.', at "
            "most 96 characters"
        ) from None
    if revision is not None and not (REVISION.fullmatch(revision) and ".." not in revision):
        raise LayerPruneError(f"revision={revision!r} is no name of a branch; give one such as 28-layers")


def check_target(api: HfApi, repo_id: str, revision: str | None = None, tags: Sequence[str] = ()) -> Target:
    """Look at the token and the repository.

    Args:
        api (`HfApi`): with the token in use, if it is not the stored one.
        repo_id (`str`): `user/name`, or a name in the token's own namespace.
        revision (`str`, *optional*): branch to push to; main by default.
        tags (`Sequence[str]`, *optional*): tags that will be set.

    Raises:
        [`LayerPruneError`]: if a name is invalid, there is no token or it may not write there, or the repository holds
            something that no push of this library made.
    """
    check_names(repo_id, revision)
    repo_id = check_account(api, repo_id)
    branch = revision or MAIN
    try:
        info = patiently(f"looking at {repo_id}", api.model_info, repo_id)
    except LayerPruneError as error:
        if not isinstance(error.__cause__, RepositoryNotFoundError) or isinstance(error.__cause__, GatedRepoError):
            raise
        return Target(repo_id, False, False, {}, {})
    refs = patiently(f"looking at {repo_id}", api.list_repo_refs, repo_id)
    branches = {ref.name: ref.target_commit for ref in refs.branches}
    found = {ref.name: ref.target_commit for ref in refs.tags}
    if branch in found:
        raise LayerPruneError(f"revision={branch!r} is a tag of {repo_id}, which no push can change; name a branch")
    if both := sorted(set(tags) & set(branches)):
        raise LayerPruneError(
            f"{repo_id} has a branch {both[0]!r}, so depth_tags cannot set that tag; delete it first"
        )
    holds = ""
    heads = {*found.values(), *(commit for name, commit in branches.items() if not name.startswith(STAGING))}
    left = [STAGING + name for name in (branch, *tags) if branches.get(STAGING + name, "") not in {"", *heads}]
    for name in [name for name in (branch, *tags, *left) if name in {**branches, **found}]:
        content = _content(api, repo_id, name)
        holds = content if name == branch else holds
    return Target(repo_id, True, bool(info.private), branches, found, holds)


def check_account(api: HfApi, repo_id: str) -> str:
    """The full name of a repository that the token in use may write to.

    Raises:
        [`LayerPruneError`]: if there is no token, or it may not write there.
    """
    if (api.token if isinstance(api.token, str) else get_token()) is None:
        raise LayerPruneError("no token for the Hub; set HF_TOKEN or log in with `hf auth login`")
    return _writable(patiently("checking the token", api.whoami), repo_id)


def _content(api: HfApi, repo_id: str, revision: str) -> str:
    """What a revision holds: nothing, or what an earlier push left there."""
    files = patiently(f"looking at {repo_id}", api.list_repo_files, repo_id, revision=revision)
    if not holds_other(files):
        return "a student that was pushed before" if PLAN_FILE in files else ""
    files = [name for name in files if not HARMLESS.fullmatch(name)]
    raise LayerPruneError(
        f"{repo_id} exists and its revision {revision} holds something else ({', '.join(sorted(files)[:3])}, ...), no "
        f"student with a {PLAN_FILE} and a {REPORT_FILE}; choose another name, or another revision"
    )


def holds_other(files: Iterable[str]) -> bool:
    """Whether these are the files of something that no push of this library made."""
    files = {name for name in files if not HARMLESS.fullmatch(name)}
    return bool(files) and not {PLAN_FILE, REPORT_FILE} <= files


def _writable(account: dict[str, Any], repo_id: str) -> str:
    """The full name of a repository that an account's token may write to."""
    user = str(account.get("name"))
    namespace, name = repo_id.split("/") if "/" in repo_id else (user, repo_id)
    organizations = {org.get("name"): org for org in account.get("orgs", [])}
    if namespace != user and namespace not in organizations:
        raise LayerPruneError(f"the token is {user}'s, who cannot write to {namespace}/{name}; push to {user}/{name}")
    if organizations.get(namespace, {}).get("roleInOrg") == "read":
        raise LayerPruneError(f"{user} may only read in {namespace}; ask for write access, or push to {user}/{name}")
    token = account.get("auth", {}).get("accessToken", {})
    role = token.get("role")
    if role == "read":
        raise LayerPruneError("the token for the Hub may only read; make one with write access and set HF_TOKEN to it")
    if role == "fineGrained" and not _granted(token.get("fineGrained", {}), namespace, f"{namespace}/{name}"):
        raise LayerPruneError(
            f"the fine-grained token for the Hub may not write to {namespace}/{name}; give it write access to "
            f"{namespace}'s repositories"
        )
    return f"{namespace}/{name}"


def _granted(grants: dict[str, Any], namespace: str, repo_id: str) -> bool:
    """Whether a fine-grained token has the right to write, anywhere, in the namespace or in the repository."""
    permissions = list(grants.get("global", []))
    for scope in grants.get("scoped", []):
        if scope.get("entity", {}).get("name") in (namespace, repo_id):
            permissions += scope.get("permissions", [])
    return "repo.write" in permissions
