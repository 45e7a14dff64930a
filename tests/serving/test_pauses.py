"""Garbage: what a collection has to search while requests are served, and what is let go of with them."""

from __future__ import annotations

import gc
import weakref

from tdc_fast.serving import Engine, Request
from tdc_fast.serving.pauses import short_pauses
from tests.serving.models import SHAPE, Scripted, process


def test_what_was_there_before_is_not_searched_within_the_block_and_is_again_after_it():
    old = [[]]
    with short_pauses():
        young = [[]]
        searched = {id(one) for one in gc.get_objects()}
    assert id(old) not in searched and id(young) in searched
    assert gc.get_freeze_count() == 0 and id(old) in {id(one) for one in gc.get_objects()}


def test_whoever_keeps_a_generation_does_not_keep_what_the_engine_had_of_its_request():
    model = Scripted()
    model.gate.clear()
    engine = Engine(model, process(), SHAPE, deterministic=False)
    with engine:
        generation = engine.submit(Request(steps=3))
        live = weakref.ref(engine._live[0])
        model.gate.set()
    gc.collect()
    assert live() is None and generation.result(0).samples.shape == (1, *SHAPE)
    generation.cancel()  # as before
