"""Models for the tests of the demo: a run of three rounds, made by hand in a second, and a demo that shows it."""

from __future__ import annotations

from pathlib import Path

import yaml
from conftest import byte_tokenizer, tiny_model

from hf_layerprune import Edit, Scores, prune
from hf_layerprune.demo import DemoService, DemoSettings, Limits, ModelEntry, open_catalog
from hf_layerprune.demo.settings import embedded_entry
from hf_layerprune.evaluation import EvaluationReport
from hf_layerprune.hub.paths import without_local_paths
from hf_layerprune.record import Healing, RoundRecord, RunRecord, TeacherRecord
from hf_layerprune.surgery import plan_of

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DEPTHS = (6, 5, 4, 3)


def chat_tokenizer():
    """The byte-level tokenizer with control tokens and a template."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def endless(model):
    """A model that never ends an answer by itself."""
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    return model


def make_run(folder: Path, chat: bool = False) -> Path:
    """A run of three rounds and the teacher it started from: `run` and `teacher` in a folder."""
    tokenizer = chat_tokenizer() if chat else byte_tokenizer()
    teacher = endless(tiny_model(DEPTHS[0], vocab_size=len(tokenizer), max_position_embeddings=4096))
    teacher.save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    name, quality = str(folder / "teacher"), EvaluationReport(3.9, 49.0, None, None, 100)
    run = RunRecord(
        {"trained_layers": "neighbours", "model": "0123456789abcdef"},
        TeacherRecord.of(teacher, quality, name=without_local_paths(name), evaluated_on="a text"),
        environment={"hardware": "a CPU"},
    )
    student = teacher
    for number, layer in enumerate((1, 3, 2), 1):
        costs = {Edit.remove(other): 0.1 * other + 0.01 for other in plan_of(student).layers}
        student = prune(student, [layer])
        place = folder / "run" / "rounds" / f"{number:02d}"
        student.save_pretrained(place)
        tokenizer.save_pretrained(place)
        record = RoundRecord.of(
            student,
            EvaluationReport(4.0, 50.0 + number, 0.1, 0.9, 100),
            number=number,
            edits=(Edit.remove(layer),),
            criterion="kl",
            scores=(Scores("kl", costs),),
            unhealed=EvaluationReport(4.1, 60.0 + number, 0.3, None, 100),
            before_healing=EvaluationReport(4.05, 55.0 + number, 0.2, None, 100),
            healing=Healing(1000, 1.0),
        )
        run = run.with_round(record)
    student.save_pretrained(folder / "run" / "model")
    tokenizer.save_pretrained(folder / "run" / "model")
    (folder / "run" / "recipe.yaml").write_text(yaml.safe_dump({"model": name, "teacher": None}))
    (folder / "run" / "report.json").write_text(run.to_json())
    (folder / "run" / "plan.json").write_text(plan_of(student).to_json())
    return folder / "run"


def make_service(folder: Path, **limits) -> DemoService:
    """A demo of the embedded teacher, a run and a chat run; the runs are made where they are not there yet."""
    for kind in ("text", "chat"):
        if not (folder / kind).exists():
            make_run(folder / kind, chat=kind == "chat")
    models = [
        embedded_entry(),
        ModelEntry("tiny run", run=str(folder / "text" / "run"), description="Three <b>rounds</b>."),
        ModelEntry("tiny chat", run=str(folder / "chat" / "run")),
    ]
    settings = DemoSettings(models, limits=Limits(**limits))
    return DemoService(settings, open_catalog(settings))
