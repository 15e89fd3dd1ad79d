"""The model card of a run: every number in it is from the run's report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from ..data import EMBEDDED_TEXTS
from ..layer_map import layer_map_text, made_edits, plan_of_record
from ..loading import EMBEDDED
from ..report import (
    EDIT_BAR,
    SPEED_EXPLAINED,
    criterion_unit,
    millions,
    quality_table,
    speed_measured,
    summary,
    task_table,
    was_healed,
    weighed_by,
)
from .metadata import BaseFacts, base_facts, card_metadata
from .run_folder import RECIPE_FILE, RunFolder, start_depth
from .scrub import hub_id, without_places

TEMPLATE = Path(__file__).parent.parent / "templates" / "model_card.md.jinja"
SPEED = {
    "prefill_tokens_per_second": "prefill, tokens/s",
    "decode_tokens_per_second": "decode, tokens/s",
    "time_to_first_token": "time to first token, ms",
    "peak_memory_bytes": "memory, MB",
    "kv_bytes_per_token": "KV cache, bytes per token",
}
"""Entries of a record that say how fast and how large a model is, and their names in the card."""
BLIND = ("tail", "random")
"""Criteria that look at no text."""


def model_card(
    report: dict[str, Any],
    model_name: str,
    base_model: str | None,
    tags: Sequence[str] = (),
    *,
    datasets: Sequence[str] = (),
    facts: BaseFacts | None = None,
    command: str = "",
    command_explained: str = "",
    revision: str | None = None,
    revisions: Sequence[str] = (),
    evaluated_on: str | None = None,
    data: str = "",
) -> ModelCard:
    """The card of the student a report ends with.

    Args:
        report (`dict`): teacher, rounds, settings and environment of a run (the content of `report.json`).
        model_name (`str`): name of the student on the Hub.
        base_model (`str`, *optional*): the model it was made from; named in the metadata only if it is on the Hub.
        tags (`Sequence[str]`, *optional*): added to the library's own.
        datasets (`Sequence[str]`, *optional*): Hub ids of the data it was made with.
        facts ([`BaseFacts`], *optional*): license and languages of the base model.
        command (`str`, *optional*): what makes the student again; without it the card has no such section.
        command_explained (`str`, *optional*): what the command needs.
        revision (`str`, *optional*): the revision it is in, if that is not main.
        revisions (`Sequence[str]`, *optional*): revisions that hold other depths.
        evaluated_on (`str`, *optional*): Hub id of the data the quality was measured on.
        data (`str`, *optional*): a sentence about the text that was used.
    """
    teacher, rounds, env = report["teacher"], report["rounds"], report["environment"]
    record = rounds[-1]
    plan = plan_of_record(record)
    kinds = {edit.kind for edit in made_edits(rounds)}
    healed = any(was_healed(one) for one in rounds)
    before = "original" if teacher["num_layers"] == plan.num_teacher_layers else "before this run"
    from_teacher = start_depth(report) == teacher["num_layers"]
    speed = all(name in record for name in (*SPEED, "prefill_ratio", "decode_ratio"))
    return ModelCard.from_template(
        card_metadata(report, model_name, hub_id(base_model), tags, datasets, facts, evaluated_on),
        template_path=str(TEMPLATE),
        title=f"{teacher['name']}: {teacher['num_layers']} layers to {record['num_layers']}",
        lead=_lead(report, base_model or teacher["name"]),
        summary=summary(teacher, record),
        glance=[_glance(before, teacher), _glance("this model", record)],
        model_name=model_name,
        named=f"{model_name}@{revision}" if revision else model_name,
        at=f', revision="{revision}"' if revision else "",
        revision_option=_revision_option(revision),
        short_name=model_name.split("/")[-1],
        original=(hub_id(base_model) if from_teacher else None) or teacher["name"],
        parallel=bool(plan.parallel_pairs),
        architecture=_architecture(record),
        revisions=list(revisions),
        layer_map=layer_map_text(plan),
        layers_explained=_layers_explained(rounds),
        choices=_choices(rounds),
        cost_explained=_cost_explained(report),
        quality_table=quality_table(teacher, rounds),
        task_table=task_table([teacher, *rounds]) if "tasks" in teacher else "",
        healed=healed,
        speed=[_speed_row(before, teacher), _speed_row("this model", record)] if speed else [],
        speed_columns=list(SPEED.values()),
        hardware=env["hardware"],
        measured=speed_measured(record) or f"batch {record.get('batch_size', 1)}",
        speed_explained=SPEED_EXPLAINED,
        version=env.get("hf-layerprune", ""),
        data=data,
        command=command,
        command_explained=command_explained,
        versions=", ".join(f"{name} {value}" for name, value in env.items() if name != "hardware"),
        num_tokens=f"{teacher['num_tokens']:,}",
        evaluated_on=teacher["evaluated_on"] + (f" ({evaluated_on})" if evaluated_on else ""),
        how=_how(kinds, healed),
    )


def run_card(
    run: RunFolder,
    number: int,
    model_name: str,
    base_model: str | None = None,
    tags: Sequence[str] = (),
    *,
    datasets: Sequence[str] = (),
    facts: BaseFacts | None = None,
    pushed: bool = False,
    revision: str | None = None,
    revisions: Sequence[str] = (),
) -> ModelCard:
    """The card of a round's student, with what the run's folder says of where it comes from.

    Args:
        run ([`RunFolder`]): the run.
        number (`int`): the round, from 1.
        model_name (`str`): name of the student on the Hub, or the folder it lies in.
        base_model (`str`, *optional*): the model it was made from; by default the one the run's settings name.
        tags (`Sequence[str]`, *optional*): added to the library's own.
        datasets (`Sequence[str]`, *optional*): Hub ids of data, beside those the run's settings name.
        facts ([`BaseFacts`], *optional*): what it inherits; by default what a card on this machine says.
        pushed (`bool`, *optional*, defaults to `False`): whether the card goes to the Hub, with a recipe beside it.
        revision (`str`, *optional*): the revision it goes to, if that is not main.
        revisions (`Sequence[str]`, *optional*): revisions that hold other depths.
    """
    base = base_model or run.base_model
    if facts is None and base and hub_id(base) is None:
        facts, _ = base_facts(base)
    command = _command(run, model_name, pushed, revision) if pushed or (run.folder / RECIPE_FILE).is_file() else ""
    return model_card(
        run.report_until(number),
        model_name,
        base,
        tags,
        datasets=list(dict.fromkeys([*run.datasets, *datasets])),
        facts=facts,
        command=command,
        command_explained=_command_explained(run),
        revision=revision,
        revisions=[name for name in revisions if name != revision],
        evaluated_on=run.evaluation_dataset,
        data=_data(run),
    )


def _revision_option(revision: str | None) -> str:
    return f" --revision {revision}" if revision else ""


def _command(run: RunFolder, model_name: str, pushed: bool, revision: str | None) -> str:
    repeat = f"hf-layerprune {run.verb} --config {RECIPE_FILE}"
    if not run.names_its_text:
        repeat += " --dataset TEXT"
    if not pushed:
        return repeat
    download = f"hf download {model_name} {RECIPE_FILE}{_revision_option(revision)} --local-dir ."
    return f"{download}\n{repeat} --output_dir {model_name.split('/')[-1]}"


def _command_explained(run: RunFolder) -> str:
    parts = [f"`{RECIPE_FILE}` holds the settings of the run."]
    if not run.names_its_text:
        parts.append("It was started in Python: put the text it worked on in the place of TEXT.")
    if names := run.local_inputs:
        verb = "is a file or folder" if len(names) == 1 else "are files or folders"
        parts.append(f"{', '.join(f'`{name}`' for name in names)} {verb} of the author's and not part of this model.")
    return " ".join(parts)


def _data(run: RunFolder) -> str:
    """Which text the run worked on, as far as its recipe says."""
    settings, rounds = run.settings, run.report["rounds"]
    if not run.names_its_text:
        return ""
    own = settings.get("dataset") is None  # then it worked on the texts of the package
    names = zip(("calibration_dataset", "dataset", "eval_dataset"), EMBEDDED_TEXTS, strict=True)
    calibration, text, evaluation = (
        _text(settings.get(name) or (f"{EMBEDDED}:{text}" if own else None)) for name, text in names
    )
    tasks, parts = _text(settings.get("tasks")), []
    if any(record["scores"] and record["criterion"] not in BLIND for record in rounds):
        parts.append(f"scored on {f'the tasks {tasks}' if tasks else calibration or text}")
    if any(was_healed(record) for record in rounds):
        parts.append(f"healed on {text}")
    held_out = "rows of it that were held out" if parts and parts[-1].endswith(f"on {text}") else None
    parts.append(f"measured on {evaluation or held_out or f'held-out rows of {text}'}")
    told = f"Text: {', '.join(parts)}."
    return f"{told} What is called `{EMBEDDED}` comes with hf_layerprune." if f"`{EMBEDDED}:" in told else told


def _text(name: str | None) -> str | None:
    """How a data set or file is called in the card."""
    if name is None:
        return None
    if repo_id := hub_id(name):
        return f"[{repo_id}](https://huggingface.co/datasets/{repo_id})"
    return f"`{without_places({'tasks': name})['tasks']}`"


def _lead(report: dict[str, Any], base: str) -> str:
    """What this is and what it was made from."""
    rounds, plan = report["rounds"], plan_of_record(report["rounds"][-1])
    edits = made_edits(rounds)
    removed = sum(edit.kind == "remove" for edit in edits)
    did = [f"{removed} layer{'s' * (removed != 1)} left out"] if removed else []
    merged = [set(edit.layers) for edit in edits if edit.kind == "parallelize"]
    if pairs := [block for block in plan.parallel_pairs if any(set(block) <= layers for layers in merged)]:
        did.append(f"{sum(map(len, pairs))} layers run in parallel, in {len(pairs)} block{'s' * (len(pairs) != 1)}")
    healed = "healed by distillation" if any(was_healed(record) for record in rounds) else "without training"
    start, total = start_depth(report), plan.num_teacher_layers
    lead = (
        f"A {_architecture(report['teacher'])} language model {plan.depth} layers deep, made from {_origin(base)} "
        f"({start} layers): {', '.join([*did, healed])}."
    )
    return lead if start == total else f"{lead} It holds {len(plan.layers)} of the {total} layers of the original."


def _architecture(record: dict[str, Any]) -> str:
    """The family of a model; reports of the time when there was but one do not say."""
    return record.get("architecture", "Qwen2")


def _origin(base: str) -> str:
    """A link to what the run started from; of what is not on the Hub the name."""
    if repo_id := hub_id(base):
        revision = base.partition("@")[2]
        return f"[{base}](https://huggingface.co/{repo_id}{'/tree/' * bool(revision)}{revision})"
    return "the model that comes with hf_layerprune" if base == EMBEDDED else without_places(base) or "its original"


def _glance(name: str, record: dict[str, Any]) -> list[str]:
    speed = f"{record['decode_ratio']:.2f}x" if "decode_ratio" in record else "not measured"
    return [
        name,
        str(record["num_layers"]),
        millions(record["num_parameters"]),
        f"{record['perplexity']:.2f}",
        speed,
    ]


def _layers_explained(rounds: Sequence[dict[str, Any]]) -> str:
    plan, edits = plan_of_record(rounds[-1]), made_edits(rounds)
    removed = [edit.layers[0] for edit in edits if edit.kind == "remove"]
    parts = [f"Numbers are the original's {plan.num_teacher_layers} layers, from 0."]
    if plan.removed_layers:
        parts.append("A dot is a layer that was removed.")
    if removed:
        parts.append(f"Removed, in this order: {', '.join(map(str, removed))}.")
    if before := sorted(set(plan.removed_layers) - set(removed)):
        parts.append(f"Removed before this run: {', '.join(map(str, before))}.")
    if plan.parallel_pairs:
        groups = ", ".join("|".join(map(str, block)) for block in plan.parallel_pairs)
        parts.append(f"In brackets, in parallel as one layer: {groups}.")
    return " ".join(parts)


def _choices(rounds: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Why each edit was made: its cost, and that of the cheapest other one in the same scoring."""
    rows = []
    for record in rounds:
        every = record.get("all_scores") or ([{"values": record["scores"]}] if record["scores"] else [])
        for label, scores in zip(record["edits"], every, strict=False):
            costs = {key: cost for key, cost in scores["values"].items() if cost is not None}
            if label in costs:
                rows.append([str(record["round"]), *_beside_next(label, costs)])
    return [[cell.replace("|", EDIT_BAR) for cell in row] for row in rows]


def _beside_next(label: str, costs: dict[str, float]) -> list[str]:
    others = {key: cost for key, cost in costs.items() if key != label}
    if not others:
        return [label, f"{costs[label]:.4f}", "", ""]
    following = min(others, key=lambda key: others[key])
    return [label, f"{costs[label]:.4f}", following, f"{others[following]:.4f}"]


def _cost_explained(report: dict[str, Any]) -> str:
    criterion, saved = report["rounds"][-1].get("criterion", ""), weighed_by(report["settings"])
    unit = criterion_unit(criterion).replace("without the layer", "with the edit made")
    return unit + (f", weighed by the {saved} an edit saves" if saved else "")


def _speed_row(name: str, record: dict[str, Any]) -> list[str]:
    return [
        name,
        f"{record['prefill_tokens_per_second']:,.0f} ({record['prefill_ratio']:.2f}x)",
        f"{record['decode_tokens_per_second']:,.0f} ({record['decode_ratio']:.2f}x)",
        f"{1000 * record['time_to_first_token']:.1f}",
        f"{record['peak_memory_bytes'] / 1e6:,.1f}",
        f"{record['kv_bytes_per_token']:,}",
    ]


def _how(kinds: set[str], healed: bool) -> str:
    """Which of the two papers this run is."""
    used = {
        ("remove",): "This run removed layers, as in the first",
        ("parallelize",): "This run put layers in parallel, as in the second",
        ("parallelize", "remove"): "This run removed layers and put others in parallel, as in both",
    }.get(tuple(sorted(kinds)))
    if used is None:
        return "This run healed a student that was made before, and made no edit of its own."
    return used + (", and healed after every round." if healed else ", and did not heal.")
