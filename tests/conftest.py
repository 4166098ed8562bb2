"""Fixtures that several files of tests share."""
import pytest
import torch

import train
from short_runs import HIVG, add_dropout, run, up_and_down


@pytest.fixture
def cpu_with_dropout(monkeypatch):
    """A machine without a GPU, and tiny models with dropout."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    add_dropout(monkeypatch)


@pytest.fixture(scope="session")
def m2ist_run(tmp_path_factory):
    """The folder of a whole run of m2ist, three epochs long."""
    with pytest.MonkeyPatch.context() as patch:
        add_dropout(patch)
        return run(tmp_path_factory.mktemp("m2ist") / "whole")


@pytest.fixture(scope="session")
def hivg_run(tmp_path_factory):
    """The folder of a whole run of hivg, a warm-up and two stages, whose accuracy on val goes up
    and down."""
    with pytest.MonkeyPatch.context() as patch:
        add_dropout(patch)
        patch.setattr(train, "scores", up_and_down)
        return run(tmp_path_factory.mktemp("hivg") / "whole", *HIVG)
