"""A job that stands still is seen; one whose model goes on computing is not disturbed."""

import time
from queue import Empty, Queue

import pytest
import torch
from torch import nn

from fedlora.client.deployment.progress import ProgressWatch


@pytest.fixture
def stalled() -> "Queue[str]":
    """What was found to stand still."""
    return Queue()


def test_a_job_that_stands_still_is_told(stalled: "Queue[str]") -> None:
    watch = ProgressWatch(0.2, stalled.put)
    watch.start()
    with watch.working_on("training"):
        assert stalled.get(timeout=60) == "training"


def test_a_model_that_computes_is_progress_and_between_jobs_none_is_needed(stalled: "Queue[str]") -> None:
    watch, net = ProgressWatch(2.0, stalled.put), nn.Linear(1, 1)
    watch.follow(net)
    watch.start()
    with watch.working_on("training"):
        end = time.monotonic() + 2.5
        while time.monotonic() < end:
            net(torch.zeros(1))
            time.sleep(0.05)
    with pytest.raises(Empty):
        stalled.get(timeout=2.5)
