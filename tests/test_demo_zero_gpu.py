"""The demo on ZeroGPU, with a stand-in for the `spaces` package, which does its work on the Hub's own machines alone.

As `spaces` does, it forks a process for the marked function, pickles what goes in and comes out, and of an exception
there hands over the kind and no more.
"""

import contextlib
import functools
import importlib.machinery
import inspect
import multiprocessing
import os
import pickle
import queue
import sys
import threading
import types

import pytest
import torch
from demo_models import make_service

from hf_layerprune import LayerPruneError
from hf_layerprune.demo import store
from hf_layerprune.demo.comparison import AT_ONCE, Request
from hf_layerprune.demo.generation import DONE, STOPPED

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="ZeroGPU forks")
SHORT = {"max_new_tokens": 12}
FORK = multiprocessing.get_context("fork" if hasattr(os, "fork") else None)


def work(function, arguments, results, stop):
    """The forked process."""
    torch.set_num_threads(1)  # the threads of the parent are not in it
    try:
        running = function(*pickle.loads(arguments))
        for result in running:
            if stop.is_set():
                running.close()
                break
            results.put(("result", pickle.dumps(result)))
        results.put(("end", None))
    except BaseException as error:
        results.put(("error", type(error).__name__))


@pytest.fixture
def calls(monkeypatch):
    """What was asked of the GPU, in seconds."""
    seconds = []

    def gpu(duration):
        def mark(function):
            assert inspect.isgeneratorfunction(function)

            @functools.wraps(function)
            def forked(*arguments):
                seconds.append(duration(*arguments))
                results, stop = FORK.Queue(), FORK.Event()
                process = FORK.Process(target=work, args=(function, pickle.dumps(arguments), results, stop))
                process.start()
                try:
                    kind, content = results.get(timeout=60)
                    while kind == "result":
                        yield pickle.loads(content)
                        kind, content = results.get(timeout=60)
                    if kind == "error":
                        raise RuntimeError(f"ZeroGPU worker error: {content}")
                finally:
                    stop.set()
                    while process.is_alive():  # it ends when all that it sent was read
                        with contextlib.suppress(queue.Empty):
                            results.get(timeout=0.05)
                    process.join()

            return forked

        return mark

    stand_in = types.ModuleType("spaces")
    stand_in.GPU = gpu
    stand_in.__spec__ = importlib.machinery.ModuleSpec("spaces", None)
    monkeypatch.setitem(sys.modules, "spaces", stand_in)
    monkeypatch.setenv("SPACES_ZERO_GPU", "1")
    return seconds


@pytest.fixture
def service(calls, tmp_path):
    return make_service(tmp_path, max_prompt_tokens=200)


def last(service, prompt="It was", model="tiny run", **options):
    sampling = options.pop("sampling", SHORT)
    return list(service.stream(Request(prompt, model, sampling=sampling, **options)))[-1]


def test_both_jobs_run_in_the_forked_process_with_models_that_were_loaded_before(service, calls, monkeypatch):
    service.warm_up()
    assert len(service.store.loaded) == 4  # as many as there is room for
    here, load = os.getpid(), store.load_model

    def load_here(*arguments, **options):
        assert os.getpid() == here, "a model is loaded in time on the GPU"
        return load(*arguments, **options)

    monkeypatch.setattr(store, "load_model", load_here)
    for order in (None, AT_ONCE):
        snapshot = last(service, depth=4, **({"order": order} if order else {}))
        assert snapshot.original.state == snapshot.compressed.state == DONE, snapshot.compressed.error
        assert snapshot.compressed.num_tokens == 12 and snapshot.compressed.num_layers == 4
    assert len(service.inspect("It was a night", "tiny run", 3)) == 14
    assert calls == [16, 16, 15]


def test_what_is_refused_says_why_and_costs_no_call(service, calls):
    for request, told in (
        (Request("word " * 300, "tiny run"), "at most 200"),
        (Request("a", "tiny run", chat=True), "no chat template"),
        (Request("a", sampling={"max_new_tokens": 513}), "max_new_tokens=513"),
    ):
        with pytest.raises(LayerPruneError, match=told):
            next(service.stream(request))
    with pytest.raises(LayerPruneError, match="at most 128"):
        service.inspect("x" * 200, "tiny run", 4)
    assert calls == []


def test_a_call_is_as_long_as_what_is_asked_for_and_never_too_long(service, calls):
    asked = service.comparer.prepare(Request("a", "tiny run", sampling={"max_new_tokens": 512}))
    stream = service._on_device(asked)
    next(stream)
    stream.close()
    assert calls == [60] and 2 * asked.max_seconds < 60


def test_a_lock_that_was_held_at_the_fork_holds_nobody_up(service, calls):
    """Another visitor loads a model while the process is made, and that process must load one too."""
    asked = service.comparer.prepare(Request("It was", "tiny run", depth=5, sampling=SHORT))
    with store.LOCKS.models, store.LOCKS.tokenizers:
        *_, snapshot = service._on_device(asked)
    assert snapshot.original.state == snapshot.compressed.state == DONE
    assert service.store.loaded == []  # they are in the other process


def test_stop_ends_the_process(service, calls):
    stop = threading.Event()
    stream = service.stream(Request("It was", "tiny run", sampling={"max_new_tokens": 512}), stop)
    next(stream)
    stop.set()
    *_, snapshot = stream
    assert STOPPED in (snapshot.original.state, snapshot.compressed.state)
    assert not multiprocessing.active_children()
