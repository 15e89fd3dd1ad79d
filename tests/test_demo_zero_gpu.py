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
import types

import pytest
import torch
from demo_models import make_service

from hf_layerprune import LayerPruneError
from hf_layerprune.demo import catalog
from hf_layerprune.demo.service import seconds_on_gpu

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="ZeroGPU forks")
SHORT = {"max_new_tokens": 12}
FORK = multiprocessing.get_context("fork" if hasattr(os, "fork") else None)


def work(function, arguments, results, stop):
    """The forked process."""
    torch.set_num_threads(1)  # the threads of the parent are not in it
    try:
        running = function(*pickle.loads(arguments))
        if not inspect.isgenerator(running):
            running = iter([running])
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

    def results_of(function, seconds_asked, arguments):
        seconds.append(seconds_asked)
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

    def gpu(duration):
        def mark(function):
            @functools.wraps(function)
            def forked(*arguments):
                running = results_of(function, duration(*arguments), arguments)
                return running if inspect.isgeneratorfunction(function) else list(running)[0]

            return forked

        return mark

    stand_in = types.ModuleType("spaces")
    stand_in.GPU = gpu
    stand_in.__spec__ = importlib.machinery.ModuleSpec("spaces", None)
    monkeypatch.setitem(sys.modules, "spaces", stand_in)
    monkeypatch.setenv("SPACES_ZERO_GPU", "1")
    return seconds


@pytest.fixture
def service(calls, demo_folder):
    return make_service(demo_folder, max_prompt_tokens=200)


def last(service, prompt="It was", model="tiny run", sampling=SHORT, **options):
    *_, comparison = service.stream(prompt, model, sampling=sampling, **options)
    return comparison


def test_both_calls_run_in_the_forked_process_with_models_that_were_loaded_before(service, calls, monkeypatch):
    service.warm_up()
    assert len(service.store.sizes) == 4  # as many as there is room for
    here, load = os.getpid(), catalog.load_model

    def load_here(*arguments, **options):
        assert os.getpid() == here, "a model is loaded in time on the GPU"
        return load(*arguments, **options)

    monkeypatch.setattr(catalog, "load_model", load_here)
    comparison = last(service, depth=4)
    assert comparison.ended and comparison.compressed.num_tokens == 12 and comparison.compressed.num_layers == 4
    assert len(service.inspect("It was a night", "tiny run", 3)) == 14
    assert calls == [16, 15]


def test_what_is_refused_says_why_and_costs_no_call(service, calls):
    for options, told in (
        ({"prompt": "word " * 300}, "to 200 are read"),
        ({"prompt": "a", "chat": True}, "no chat template"),
        ({"prompt": "a", "sampling": {"max_new_tokens": 513}}, "max_new_tokens=513"),
    ):
        with pytest.raises(LayerPruneError, match=told):
            next(service.stream(model="tiny run", **options))
    with pytest.raises(LayerPruneError, match="to 128 are read"):
        service.inspect("x" * 200, "tiny run", 4)
    assert calls == []


def test_a_call_is_as_long_as_what_is_asked_for_and_stopping_ends_its_process(service, calls):
    assert [seconds_on_gpu(tokens) for tokens in (0, 100, 512)] == [15, 25, 60]
    stream = service.stream("It was", "tiny run", sampling={"max_new_tokens": 512})
    next(stream), next(stream)
    stream.close()
    assert calls == [60] and not multiprocessing.active_children()
