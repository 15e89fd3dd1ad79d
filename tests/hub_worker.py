"""A process that pushes, pulls and runs verbs against a test Hub, told by lines of JSON.

The client reads HF_ENDPOINT and HF_HUB_DISABLE_XET when it is imported, so each kind of client is a process; it serves
many calls, since importing takes seconds. The client is as it is, only its waits between attempts are shortened.
"""

import contextlib
import gc
import io
import json
import os
import sys
import time
import warnings

from hf_layerprune import data

embedded_dataset = data.embedded_dataset
if "EMBEDDED_MODEL" in os.environ:  # with less text; before anything imports them from there
    data.EMBEDDED_MODEL = os.environ["EMBEDDED_MODEL"]
    data.embedded_dataset = lambda name: embedded_dataset(name).select(range(100))

import quick  # noqa: E402, F401

from hf_layerprune import IterativeLayerDistillTrainer, LayerPruneError, cli  # noqa: E402
from hf_layerprune.demo import DemoSettings, ModelEntry, open_catalog  # noqa: E402
from hf_layerprune.hub import load_run, push_run  # noqa: E402

gc.freeze()  # what the imports made is not looked through at every later collection
sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.02))


@contextlib.contextmanager
def without(name):
    value = os.environ.pop(name)
    try:
        yield
    finally:
        os.environ[name] = value


def call(request):
    kind = request.pop("call")
    if kind == "push":
        messages = []
        commit = push_run(**request, on_message=messages.append)
        return {"oid": commit.oid, "url": commit.commit_url, "messages": messages}
    if kind == "open":
        pairing = open_catalog(DemoSettings([ModelEntry("pushed", **request)]))["pushed"]
        return {"depths": pairing.depths, "teacher": pairing.teacher.name}
    if kind == "load":
        without_token = request.pop("without_token", False)
        with without("HF_TOKEN") if without_token else contextlib.nullcontext():
            run = load_run(**request)
        return {"plan": run.plan.to_dict(), "report": json.loads(run.record.to_json()), "revision": run.revision}
    if kind == "train":
        return train(**request)
    if kind == "python":
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            exec(request["code"], {})
        return {}
    if request["argv"][0] == "demo":
        from hf_layerprune.demo import page, service

        page.launch_page = lambda built, **options: None  # else it serves until it is interrupted
        service.SECONDS_FOR_EXAMPLE = 0
    out, err = io.StringIO(), io.StringIO()
    token = without("HF_TOKEN") if request["without_token"] else contextlib.nullcontext()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), token:
        status = cli.main(request["argv"])
    return {"status": status, "out": out.getvalue(), "err": err.getvalue()}


def train(model, output_dir, **changes):
    """A run of one round by the trainer, which pushes; then once more, otherwise."""
    from conftest import short_texts, tiny_config

    texts = short_texts(8)
    args = tiny_config(output_dir, target_num_layers=5, max_steps=1, measure_speed=False, **changes)
    trainer = IterativeLayerDistillTrainer(model=model, args=args, train_dataset=texts)
    trainer.train()
    again = trainer.push_to_hub(commit_message="Again", tags="mine", dataset_name="user/books", blocking=False)
    return {"oid": again.result().oid}


answers = sys.stdout
sys.stdout = sys.stderr
for line in sys.stdin:
    try:
        answer = call(json.loads(line))
    except LayerPruneError as error:
        answer = {"error": str(error)}
    except Exception as error:
        answer = {"crash": repr(error)}
    answers.write(json.dumps(answer) + "\n")
    answers.flush()
