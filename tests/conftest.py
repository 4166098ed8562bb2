"""Fixtures that several files of tests share."""
import os

# The models of the tests are so small that one thread is faster than two. Processes that the tests
# start have it from here, too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest    # noqa: E402

import evaluate
import train
from short_runs import HIVG, add_dropout, run, up_and_down


@pytest.fixture
def cpu(monkeypatch):
    """A machine without a GPU."""
    for module in (train, evaluate):
        monkeypatch.setattr(module, "default_device", lambda: "cpu")


@pytest.fixture(scope="session")
def m2ist_run(tmp_path_factory):
    """The folder of a whole run of m2ist, three epochs long, with dropout."""
    with pytest.MonkeyPatch.context() as patch:
        add_dropout(patch)
        return run(tmp_path_factory.mktemp("m2ist") / "whole", "--log-every", "2")


@pytest.fixture(scope="session")
def hivg_run(tmp_path_factory):
    """The folder of a whole run of hivg with dropout, a warm-up and two stages, whose accuracy on
    val goes up and down."""
    with pytest.MonkeyPatch.context() as patch:
        add_dropout(patch)
        patch.setattr(train, "scores", up_and_down)
        return run(tmp_path_factory.mktemp("hivg") / "whole", *HIVG, "--log-every", "2")
