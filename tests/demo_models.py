"""Models for the tests of the demo: a run of three rounds, made by hand in a second, and a demo that shows it."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from conftest import byte_tokenizer, tiny_model

from hf_layerprune import LayerPlan, prune
from hf_layerprune.demo import DemoService, DemoSettings, Limits, ModelEntry, open_catalog
from hf_layerprune.demo.settings import embedded_entry
from hf_layerprune.evaluation import EvaluationReport
from hf_layerprune.hub.paths import absolute_if_local
from hf_layerprune.trainer.records import teacher_record

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
    student, records = teacher, []
    for number, layer in enumerate((1, 3, 2), 1):
        scores = {str(other): 0.1 * other + 0.01 for other in LayerPlan.from_dict(plan_of(student)).layers}
        student = prune(student, [layer])
        place = folder / "run" / "rounds" / f"{number:02d}"
        student.save_pretrained(place)
        tokenizer.save_pretrained(place)
        records.append(
            {"round": number, "num_layers": 6 - number, "edits": [str(layer)], "criterion": "kl", "scores": scores}
            | {"num_parameters": student.num_parameters(), "loss": 4.0, "perplexity": 50.0 + number, "kl": 0.1}
            | {"agreement": 0.9, "plan": plan_of(student), "num_tokens": 100, "perplexity_unhealed": 60.0 + number}
            | {"loss_unhealed": 4.1, "perplexity_before_healing": 55.0 + number, "loss_before_healing": 4.05}
        )  # fmt: skip
    student.save_pretrained(folder / "run" / "model")
    tokenizer.save_pretrained(folder / "run" / "model")
    quality, name = EvaluationReport(3.9, 49.0, None, None, 100), absolute_if_local(str(folder / "teacher"))
    report = {
        "teacher": teacher_record(name, teacher, quality, "a text"),
        "rounds": records,
        "settings": {"trained_layers": "neighbours", "model": "0123456789abcdef"},
        "environment": {"hardware": "a CPU"},
    }
    (folder / "run" / "recipe.yaml").write_text(yaml.safe_dump({"model": name, "teacher": None}))
    (folder / "run" / "report.json").write_text(json.dumps(report))
    (folder / "run" / "plan.json").write_text(json.dumps(plan_of(student)))
    return folder / "run"


def plan_of(model) -> dict:
    return getattr(model.config, "layer_plan", None) or LayerPlan.identity(model.config.num_hidden_layers).to_dict()


def make_service(folder: Path, **limits) -> DemoService:
    """A demo of the embedded teacher, a run and a chat run."""
    models = (
        embedded_entry(),
        ModelEntry("tiny run", run=str(make_run(folder / "text")), description="Three <b>rounds</b>."),
        ModelEntry("tiny chat", run=str(make_run(folder / "chat", chat=True))),
    )
    settings = DemoSettings(models, limits=Limits(**limits))
    return DemoService(settings, open_catalog(settings))
