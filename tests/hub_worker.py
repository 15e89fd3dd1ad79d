"""A process that pushes, pulls and runs verbs against a test Hub, told by lines of JSON.

The client reads HF_ENDPOINT and HF_HUB_DISABLE_XET when it is imported, so each kind of client is a process; it serves
many calls, since importing takes seconds. The client is as it is, only its waits between attempts are shortened.
"""

import contextlib
import io
import json
import sys
import time

from hf_layerprune import LayerPruneError, cli
from hf_layerprune.hub import load_run, push_run

sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.02))


def call(request):
    kind = request.pop("call")
    if kind == "push":
        messages = []
        commit = push_run(**request, on_message=messages.append)
        return {"oid": commit.oid, "url": commit.commit_url, "messages": messages}
    if kind == "load":
        run = load_run(**request)
        return {"plan": run.plan.to_dict(), "report": run.report, "revision": run.revision}
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main(request["argv"])
    return {"status": status, "out": out.getvalue(), "err": err.getvalue()}


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
