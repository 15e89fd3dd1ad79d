"""Push the students of a run to the Hub: what a stranger needs, and nothing local, in one commit each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml
from huggingface_hub import CommitInfo, HfApi, ModelCard, ModelCardData, get_token
from huggingface_hub.errors import RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..errors import LayerPruneError
from ..files import write_atomically
from ..plan import LayerPlan
from ..record import PLAN_FILE, REPORT_FILE, RunRecord, from_json_value
from ..report import PLOTS, write_report
from ..tasks import TaskResult
from .card import Target, base_facts, run_card
from .paths import check_nothing_local, hub_id
from .runs import RECIPE_FILE, Run, hub_errors, load_run

MAIN = "main"
BENCHMARKS = {"gsm8k": ("openai/gsm8k", 1319)}
"""Name of a task, in lm-eval, in `TaskReport.results` and in a data set's `eval.yaml`, to the Hub id of that data set,
which has a leaderboard, and the rows of its test split; a result on fewer is another number. The leaderboard reads
`.eval_results`: https://huggingface.co/docs/hub/eval-results."""
Results = dict[str, TaskResult]
STUDENT_FILES = [
    "config.json", "generation_config.json", "configuration_pruned_qwen2.py", "modeling_pruned_qwen2.py",
    "tokenizer_config.json", "tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "chat_template.jinja", "model.safetensors", "model-?????-of-?????.safetensors",
    "model.safetensors.index.json",
]  # fmt: skip
"""Files of a saved student that are pushed."""
OWN = [*STUDENT_FILES, PLAN_FILE, RECIPE_FILE, REPORT_FILE, "report.md", *PLOTS]
OWN += [f".eval_results/{name}.yaml" for name in BENCHMARKS]
"""Files of an earlier push, which the next one deletes unless it brings them again."""


def depth_tag(depth: int) -> str:
    """The tag of a student: `"28-layers"`."""
    return f"{depth}-layers"


def push_run(
    output_dir: str | Path,
    repo_id: str,
    *,
    round: int | None = None,
    revision: str | None = None,
    depth_tags: bool = False,
    collection: bool = False,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    base_model: str | None = None,
    tags: Sequence[str] = (),
    datasets: Sequence[str] = (),
    evaluation: str | Path | None = None,
    on_message: Callable[[str], None] = lambda text: None,
) -> CommitInfo:
    """Push a student with everything a stranger needs: weights, tokenizer, plan, recipe, report, plots and card.

    Args:
        output_dir (`str` or `Path`): output folder of a run of `compress`, `parallelize` or the trainer.
        repo_id (`str`): `user/name`, or a name in the token's own namespace. Replaces a student pushed there before.
        round (`int`, *optional*): push the student of this round; by default the last one.
        revision (`str`, *optional*): branch to push to; main by default.
        depth_tags (`bool`, *optional*, defaults to `False`): push every round up to that one, deepest first, each in
            a commit with a tag such as `28-layers`.
        collection (`bool`, *optional*, defaults to `False`): push every round up to that one, each to a repository
            such as `user/name-28-layers`, and put them into the Collection `name`.
        private (`bool`, *optional*): whether a new repository is private; by default the account's setting.
        token (`str`, *optional*): by default `HF_TOKEN` or the stored login.
        commit_message (`str`, *optional*): by default the depth and the name of the teacher.
        base_model (`str`, *optional*): Hub id of the model the run started from; by default what the run says.
        tags (`Sequence[str]`, *optional*): tags of the card, added to the library's own.
        datasets (`Sequence[str]`, *optional*): Hub ids of the data, added to those in the run's settings.
        evaluation (`str` or `Path`, *optional*): an `evaluation.json` of the student, written by `evaluate`, for the
            Hub's leaderboards.
        on_message (`Callable`, *optional*): called with each progress message.

    Raises:
        [`LayerPruneError`]: if the folder holds no such student, the branch holds another model, the evaluation is of
            another student, or the Hub refuses or cannot be reached. Push again after an interruption.
    """
    if depth_tags and collection:
        raise LayerPruneError("depth_tags and collection are two ways to push every depth; choose one of them")
    if not Path(output_dir).is_dir():
        raise LayerPruneError(f"{output_dir} is not a folder; give the output folder of a run")
    run, api, branch = load_run(output_dir), HfApi(token=token), revision or MAIN
    if hub_id(base_model):
        run = run.started_from(base_model)
    record = run.record.until(len(run.record.rounds) if round is None else round)
    repo_id, source = full_name(api, repo_id), base_model or run.settings.get("model")
    targets = _targets(record, repo_id, branch, depth_tags, collection)
    depths = {target.tag for target in targets if depth_tags}
    _check_tags(depths, {branch})
    students = {target: run.student(target.number) for target in targets}
    if not run.is_finished:
        on_message(f"{output_dir} holds a run that is not finished: it has got as far as {run.plan.depth} layers")
    benchmarks = read_evaluation(evaluation, run, [target.number for target in targets]) if evaluation else {}
    facts, why = base_facts(source, token) if source else (ModelCardData(), "the run does not name it: --base_model")
    if why:
        on_message(f"the card names no license: that of {source or 'the original'} cannot be read ({why})")
    options = {"base_model": base_model, "tags": tags, "datasets": datasets, "facts": facts, "pushed": True}
    with TemporaryDirectory(prefix="hf-layerprune-") as temporary:
        folders = {target: Path(temporary) / target.tag for target in targets}
        for target, folder in folders.items():  # all of them, before anything is sent
            others = [other for other in targets if other != target]
            card = run_card(run, target.number, target.repo_id, revision=target.revision, others=others, **options)
            _write_folder(folder, students[target], run, target.number, card, benchmarks.get(target.number, {}))
            check_nothing_local(folder, (run.folder, Path.home(), Path.cwd()), token or get_token())
        with hub_errors(f"pushing to {repo_id}"):
            for name in dict.fromkeys(target.repo_id for target in targets):
                open_repo(api, name, private=private)
                _open_branch(api, name, branch, depths)
            for target, folder in folders.items():
                depth = target.tag.replace("-", " ")
                on_message(f"pushing {depth} to {target.repo_id}")
                title = commit_message or f"{depth} of {record.teacher.name}"
                commit = _upload(api, target.repo_id, folder, branch, title, target.tag if depth_tags else None)
            if collection:
                names = [target.repo_id for target in targets]
                on_message(f"collection: {_collect(api, repo_id, names, private, record.teacher.name)}")
    return commit


def _targets(record: RunRecord, repo_id: str, branch: str, depth_tags: bool, collection: bool) -> list[Target]:
    """Where the students of a run go, deepest first: the last one alone, or with all before it."""
    every = depth_tags or collection
    rounds = {depth_tag(one.depth): one.number for one in record.rounds[0 if every else -1 :]}
    named = {tag: f"{repo_id}-{tag}" if collection else repo_id for tag in rounds}
    last = next(reversed(rounds))  # of several of one depth the last round counts, here and above
    found = {tag: tag if depth_tags and tag != last else branch for tag in rounds}
    return [Target(rounds[tag], tag, named[tag], None if found[tag] == MAIN else found[tag]) for tag in rounds]


def _collect(api: HfApi, repo_id: str, repos: Iterable[str], private: bool | None, teacher: str) -> str:
    """Put repositories into the Collection that is named like `repo_id`; returns its address."""
    namespace, title = repo_id.split("/")
    description = f"{teacher} at several depths, made by hf_layerprune"[:150]
    collection = api.create_collection(
        title, namespace=namespace, description=description, private=bool(private), exists_ok=True
    )
    for name in repos:
        api.add_collection_item(collection.slug, name, "model", exists_ok=True)
    return collection.url


def _upload(api: HfApi, repo_id: str, folder: Path, branch: str, title: str, tag: str | None) -> CommitInfo:
    """Send a folder in one commit, and point a tag to it."""
    commit = api.upload_folder(
        repo_id=repo_id, folder_path=folder, revision=branch, commit_message=title, delete_patterns=OWN
    )
    if tag is not None:
        with suppress(RevisionNotFoundError):
            api.delete_tag(repo_id, tag=tag)  # the Hub cannot move one
        api.create_tag(repo_id, tag=tag, revision=commit.oid)
    return commit


def full_name(api: HfApi, repo_id: str) -> str:
    """The name of a repository with its namespace, which by default is that of the token."""
    with hub_errors(f"looking at {repo_id}"):
        validate_repo_id(repo_id)
        user = api.whoami()["name"]
    return repo_id if "/" in repo_id else f"{user}/{repo_id}"


def open_repo(api: HfApi, repo_id: str, *, private: bool | None = None, **options: str) -> None:
    """Make a repository unless it exists, and check that the token may write to it; other options of `create_repo`."""
    kind = options.get("repo_type")
    api.create_repo(repo_id, private=private, exist_ok=True, **options)
    api.auth_check(repo_id, repo_type=kind, write=True)
    if private and not api.repo_info(repo_id, repo_type=kind).private:
        raise LayerPruneError(f"{repo_id} exists and is public; make it private first, or choose another name")


def check_content(files: Sequence[str], mark: str, what: str) -> None:
    """Refuse `files` that are more than a card, but lack the one that every push leaves there."""
    if mark not in files and (other := sorted({*files} - {".gitattributes", "README.md", "LICENSE"})):
        raise LayerPruneError(f"{what} holds something else ({', '.join(other[:3])}, no {mark}); choose another name")


def _check_tags(tags: set[str], branches: set[str]) -> None:
    """Refuse tags that have the name of a branch, which would mean two things as a revision."""
    if taken := tags & branches:
        raise LayerPruneError(
            f"{min(taken)} would be a tag and a branch; choose another revision, or push without depth_tags"
        )


def _open_branch(api: HfApi, repo_id: str, branch: str, tags: set[str]) -> None:
    """Make a branch, empty until its first student, unless it exists; check that no branch has the name of a tag."""
    refs = api.list_repo_refs(repo_id)
    names = {ref.name for ref in refs.branches}
    _check_tags(tags | ({ref.name for ref in refs.tags} & {branch}), names | {branch})
    if branch in names:
        check_content(api.list_repo_files(repo_id, revision=branch), PLAN_FILE, f"{repo_id}, revision {branch},")
    else:
        first = api.list_repo_commits(repo_id)[-1]
        api.create_branch(repo_id, branch=branch, revision=first.commit_id)


def _write_folder(folder: Path, student: Path, run: Run, number: int, card: ModelCard, results: Results) -> None:
    """Write the folder to push: the student's files as links, what says how it was made, a file for each result."""
    folder.mkdir()
    for path in (path for pattern in STUDENT_FILES for path in student.glob(pattern)):
        try:
            (folder / path.name).symlink_to(path.resolve())
        except OSError:  # a file system, or an account on Windows, without links
            shutil.copyfile(path, folder / path.name)
    write_atomically(folder / PLAN_FILE, run.record.rounds[number - 1].plan.to_json() + "\n")
    if run.settings:
        recipe = run.recipe(number) | {"output_dir": card.data.model_name}
        write_atomically(folder / RECIPE_FILE, yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))
    write_report(folder, run.public_record(number))
    write_atomically(folder / "README.md", str(card))
    for name, result in results.items():
        entry = {
            "dataset": {"id": BENCHMARKS[name][0], "task_id": name},
            "value": round(100 * result.quality, 2),  # in percent, as leaderboards show it
            "notes": f"{result.measure}, measured by hf-layerprune evaluate",
        }
        (folder / ".eval_results").mkdir(exist_ok=True)
        write_atomically(folder / ".eval_results" / f"{name}.yaml", yaml.safe_dump([entry], sort_keys=False))


def read_evaluation(path: str | Path, run: Run, numbers: Sequence[int]) -> dict[int, Results]:
    """What an `evaluation.json` says of benchmarks, by the number of the round whose student it measured."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        plan = LayerPlan.from_dict(content["plan"])
        results = from_json_value(Results, content["tasks"], "tasks")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise LayerPruneError(
            f"evaluation {path} is not an evaluation.json with tasks ({error!r:.80}); hf-layerprune evaluate --tasks "
            "... --output_dir writes one"
        ) from None
    of_plan = [number for number in numbers if run.record.rounds[number - 1].plan == plan]
    if not of_plan:
        raise LayerPruneError(f"evaluation {path} is of a student with other layers than those that are pushed")
    if run.record.teacher.tasks and (chose := sorted(results.keys() & run.record.teacher.tasks.results.keys())):
        raise LayerPruneError(f"evaluation {path} holds {', '.join(chose)}, which chose the layers; leave it out")
    known = {name: f"{name} on {num_examples:,} examples" for name, (_, num_examples) in BENCHMARKS.items()}
    for name, result in results.items():
        if (measured := f"{name} on {result.num_examples:,} examples") != known.get(name):
            raise LayerPruneError(
                f"evaluation {path} holds {measured}, which no leaderboard takes; give {', '.join(known.values())}"
            )
    return {of_plan[-1]: results}
