"""Interpreter settings of a batch, and their restoration."""

from __future__ import annotations

import gc
import sys

import pytest

from flux_prefect.batch.interpreter import tuned_interpreter


def test_the_settings_are_restored() -> None:
    """Also if the batch fails."""
    interval = sys.getswitchinterval()

    def fail() -> None:
        with tuned_interpreter():
            assert sys.getswitchinterval() < interval
            assert gc.get_freeze_count() > 1000
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert sys.getswitchinterval() == interval
    assert gc.get_freeze_count() == 0


def test_garbage_of_the_batch_itself_is_collected() -> None:
    """Only objects from before the batch are excluded."""

    class Node:
        me: Node

    with tuned_interpreter():
        node = Node()
        node.me = node
        del node
        assert gc.collect() > 0


def test_a_shorter_interval_is_kept() -> None:
    """An interval below half a millisecond is not raised."""
    interval = sys.getswitchinterval()
    try:
        sys.setswitchinterval(0.0001)
        with tuned_interpreter():
            assert sys.getswitchinterval() == pytest.approx(0.0001, rel=0.05)
    finally:
        sys.setswitchinterval(interval)
