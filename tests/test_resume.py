"""train.py after an interruption: a resumed run ends as an uninterrupted one, bit by bit."""
import argparse
import errno
import fcntl
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import data
import evaluate
import train
from data import InputError
from short_runs import (FAST, HIVG, add_dropout, computed, last_weights, read_log, run, same,
                        up_and_down)

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module", autouse=True)
def dropout():
    with pytest.MonkeyPatch.context() as patch:
        add_dropout(patch)
        yield


def resume(out, *flags):
    train.main(["--out", str(out), "--resume", *flags])


def read_state(out):
    return train.State(**torch.load(out / "last.pt", weights_only=True))


def assert_same_run(a, b):
    """Logs (but for times), last weights and best weights are equal bit by bit."""
    assert computed(a) == computed(b)
    assert same(last_weights(a), last_weights(b))
    assert same(load_file(a / "best.safetensors"), load_file(b / "best.safetensors"))


# --- Interruptions --------------------------------------------------------------------------------


def dies_at_write(monkeypatch, write, argv):
    """Run train.py with a stand-in for write_atomically that kills the run in place of one of its
    writes, from 1 -> whether it was killed, before it ended."""
    writes = itertools.count(1)
    real = data.write_atomically

    def write_or_die(path, write_file):
        if next(writes) == write:
            Path(f"{path}.1.partial").write_bytes(b"half")
            raise KeyboardInterrupt
        real(path, write_file)

    with monkeypatch.context() as patch:
        patch.setattr(data, "write_atomically", write_or_die)
        try:
            train.main(argv)
        except KeyboardInterrupt:
            return True
    return False


@pytest.mark.parametrize("method", ["m2ist", "hivg"])
def test_a_run_that_dies_again_and_again_is_the_run_that_was_left_alone(tmp_path, monkeypatch,
                                                                        request, method):
    """--save-minutes 0 writes last.pt after each step. Each life of the run is killed a few writes
    after its start: before args.json, within an epoch, before and after evaluation, and between two
    stages. Order, transforms, dropout, factors of LoRA and means of the log then go on."""
    whole = request.getfixturevalue(f"{method}_run")
    out = tmp_path / "dead"
    flags = [*FAST, "--out", str(out), "--log-every", "2", "--save-minutes", "0"]
    if method == "hivg":
        flags += HIVG
        monkeypatch.setattr(train, "scores", up_and_down)

    assert dies_at_write(monkeypatch, 1, flags)
    assert dies_at_write(monkeypatch, 2, flags)
    found = set()    # (epoch, step, evaluated) where a life began
    for write in itertools.cycle([3, 4, 6, 5]):
        if not dies_at_write(monkeypatch, write, ["--out", str(out), "--resume"]):
            break
        state = read_state(out)
        found.add((state.epoch, state.step, state.evaluated))

    assert_same_run(whole, out)
    assert not list(out.glob("*.partial"))
    steps, evaluated = {step for _, step, _ in found}, {done for *_, done in found}
    assert steps == {0, 1, 2, 3} and evaluated == {False, True}
    if method == "hivg":
        assert found & {(2, 0, True), (4, 0, True)}, "no life began between two phases"
    resumed, alone = (evaluate.load_checkpoint(folder)[0] for folder in (out, whole))
    assert same(resumed.state_dict(), alone.state_dict())


def test_the_scaler_of_fp16_goes_on_where_it_was(tmp_path, monkeypatch):
    """The scaler counts the steps without overflow: one in each of two epochs. With the attention
    loss the first step overflows at the scale that torch starts from."""
    flags = ["--amp", "fp16", "--epochs", "2", "--limit", "8", "--attention-loss", "0"]
    assert dies_at_write(monkeypatch, 6, [*FAST, "--out", str(tmp_path / "a"), *flags])
    resume(tmp_path / "a")
    assert read_state(tmp_path / "a").scaler["_growth_tracker"] == 2


# --- Signals --------------------------------------------------------------------------------------


def stopped_by(monkeypatch, module, name, call, *numbers):
    """Patch a function so that these signals come at the beginning of one of its calls, from 1."""
    calls = itertools.count(1)
    real = getattr(module, name)

    def interrupted(*args, **options):
        if next(calls) == call:
            for number in numbers:
                signal.raise_signal(number)
        return real(*args, **options)

    monkeypatch.setattr(module, name, interrupted)


def run_stopped(out, *flags):
    """Begin a run that is stopped by a signal -> its exit status."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        run(out, "--log-every", "2", *flags)
    assert signal.getsignal(signal.SIGTERM) is before
    return stopped.value.code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_within_an_epoch_ends_the_run_after_its_step(tmp_path, monkeypatch, capsys, number,
                                                              m2ist_run):
    """Weights and optimizer change together, and last.pt is written."""
    with monkeypatch.context() as patch:
        stopped_by(patch, train, "train_step", 5, number)
        assert run_stopped(tmp_path / "a") == 128 + number
    said = capsys.readouterr().err.strip()
    assert said == f"stopped; python train.py --out {tmp_path / 'a'} --resume goes on from there"
    state = read_state(tmp_path / "a")
    assert (state.epoch, state.step) == (1, 2)
    resume(tmp_path / "a")
    assert_same_run(m2ist_run, tmp_path / "a")


def test_a_second_signal_ends_a_run_at_once(tmp_path, monkeypatch, m2ist_run):
    """The step under way is lost, and is made again."""
    with monkeypatch.context() as patch:
        stopped_by(patch, train, "train_step", 5, signal.SIGINT, signal.SIGTERM)
        assert run_stopped(tmp_path / "a", "--save-minutes", "0") == 128 + signal.SIGTERM
    assert read_state(tmp_path / "a").step == 1
    resume(tmp_path / "a")
    assert_same_run(m2ist_run, tmp_path / "a")


@pytest.mark.parametrize("module, name, call", [(train, "add_step", 6), (train, "predict", 1),
                                                (torch, "save", 2)])
def test_a_signal_between_epochs_ends_a_run_at_once(tmp_path, monkeypatch, m2ist_run, module, name,
                                                    call):
    """After the last step, in evaluation, and in the write of last.pt that follows it: what was
    trained is saved, and no file is half written."""
    with monkeypatch.context() as patch:
        stopped_by(patch, module, name, call, signal.SIGTERM)
        assert run_stopped(tmp_path / "a") == 128 + signal.SIGTERM
    state = read_state(tmp_path / "a")
    assert (state.epoch, state.evaluated) == (1, False)
    assert not list((tmp_path / "a").glob("*.partial"))
    resume(tmp_path / "a")
    assert_same_run(m2ist_run, tmp_path / "a")


def test_a_signal_before_the_first_step_leaves_no_folder(tmp_path, monkeypatch, capsys):
    """While encoders are loaded, say. There is nothing to resume, and no such thing is said."""
    stopped_by(monkeypatch, train, "build_model", 1, signal.SIGINT)
    assert run_stopped(tmp_path / "a") == 128 + signal.SIGINT
    assert not (tmp_path / "a").exists()
    assert capsys.readouterr().err.strip() == "stopped"


def test_ctrl_c_reaches_the_workers_and_is_one_line_all_the_same(tmp_path):
    """A terminal sends Ctrl-C to all processes of a command."""
    out = tmp_path / "a"
    flags = [*FAST, "--limit", "3000", "--workers", "2", "--log-every", "1", "--out", str(out)]
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *flags],
                               start_new_session=True, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    deadline = time.time() + 120
    while not (out / "log.jsonl").exists() and time.time() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert said.strip() == f"stopped; python train.py --out {out} --resume goes on from there"
    assert read_state(out).step > 0


def test_a_worker_leaves_signals_to_its_process_but_for_a_second_sigterm():
    """A worker that hangs can be ended by the second SIGTERM, which ends what hangs."""
    reading, writing = os.pipe()
    worker = os.fork()
    if worker == 0:
        evaluate.begin_worker(0)
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(number)
        os.write(writing, b"alive")
        signal.raise_signal(signal.SIGTERM)
        os._exit(0)
    _, status = os.waitpid(worker, 0)
    assert os.read(reading, 5) == b"alive"
    assert os.WTERMSIG(status) == signal.SIGTERM


# --- What may be resumed, and how -----------------------------------------------------------------


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """A run of one epoch, for tests that leave its files as they are or copy them."""
    return run(tmp_path_factory.mktemp("short") / "a", "--epochs", "1")


def files_of(out):
    return {name: (out / name).read_bytes()
            for name in ("log.jsonl", "last.pt", "best.safetensors", "val.png")}


def test_a_finished_run_is_not_trained_again(short_run, capsys):
    """--resume of a finished run changes no result, and may have flags that make no difference."""
    before = files_of(short_run)
    resume(short_run, "--device", "cpu", "--batch-size", "8", "--workers", "1")
    assert "resumed: 1 epochs are done" in capsys.readouterr().out
    assert files_of(short_run) == before


def test_a_folder_that_holds_a_run_is_never_overwritten(short_run, hivg_run):
    """A second run into a folder, and a resumed run with other options, are refused. So are fewer
    epochs than the run has, and more of a run in stages, which would begin later than they did."""
    before = files_of(short_run)
    with pytest.raises(InputError, match="already holds best.safetensors.*--resume"):
        run(short_run)
    for flag, value in (("--lr", "0.5"), ("--method", "frozen"), ("--size", "base")):
        with pytest.raises(InputError, match=f"{flag} is {value}, but the run in --out has"):
            resume(short_run, flag, value)
    assert files_of(short_run) == before
    with pytest.raises(InputError, match="--epochs is 1, but the run in --out has 2"):
        resume(hivg_run, "--epochs", "1")
    with pytest.raises(InputError, match="--epochs is 9, but the run in --out has 2"):
        resume(hivg_run, "--epochs", "9")
    with pytest.raises(InputError, match="--micro-batch is 2"):    # it changes HiVG's contrast
        resume(hivg_run, "--micro-batch", "2")


def test_a_finished_run_can_be_made_longer(tmp_path, capsys):
    """With the schedule `step`, whose rates do not depend on the end of the run, a run that is made
    longer is the run that was long from the start. The change stays in args.json."""
    flags = ["--schedule", "step", "--lr-drop", "9"]
    whole = run(tmp_path / "whole", *flags, "--epochs", "2")
    out = run(tmp_path / "a", *flags, "--epochs", "1")
    capsys.readouterr()
    resume(out, "--epochs", "2")
    assert "the run goes on to epoch 2; up to now its end was 1" in capsys.readouterr().out
    assert_same_run(whole, out)
    assert train.parse_args(["--out", str(out), "--resume"]).epochs == 2


def test_resume_of_a_folder_without_a_run_is_refused(tmp_path):
    """A mistyped --out must not become a new run."""
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "gone"):
        with pytest.raises(InputError, match=f"--resume: {out} holds no run.*leave --resume out"):
            resume(out)
    assert os.listdir(tmp_path) == ["empty"] and os.listdir(tmp_path / "empty") == []


def test_a_folder_with_args_json_alone_can_be_started_again(tmp_path, short_run):
    """A run may be killed between its first file and its first last.pt. Either command begins it
    again, --resume with the options of the run, and with the defaults of options that args.json
    lacks, because it is of an older version."""
    saved = json.loads((short_run / "args.json").read_text())
    del saved["args"]["clip_norm"], saved["args"]["title"]
    for flags in (["--resume"], [*FAST, "--epochs", "1"]):
        out = tmp_path / flags[0]
        out.mkdir()
        (out / "args.json").write_text(json.dumps(saved))
        (out / "last.pt.1.partial").write_bytes(b"half")
        train.main(["--out", str(out), *flags])
        assert computed(out) == computed(short_run)
        assert {path.name for path in out.iterdir()} == {path.name for path in short_run.iterdir()}


@pytest.mark.parametrize("file, content, message", [
    ("last.pt", lambda whole: whole[:1000], "damaged"),
    ("last.pt", lambda whole: (ROOT / "assets/tiny-clip.safetensors").read_bytes(), "damaged"),
    ("args.json", lambda whole: b"{", "not what train.py writes"),
    ("args.json", lambda whole: b'{"args": [1]}', "not what train.py writes"),
    ("args.json", lambda whole: b"[1]", "not what train.py writes"),
])
def test_damaged_files_are_named(tmp_path, short_run, file, content, message):
    """A file that train.py cannot read gives one line with the name of the file."""
    out = shutil.copytree(short_run, tmp_path / "a")
    (out / file).write_bytes(content((out / file).read_bytes()))
    with pytest.raises(InputError, match=f"{file}: {message}"):
        resume(out)


@pytest.mark.parametrize("name, words", [("frozen_fingerprint", "other encoder weights"),
                                         ("fingerprint", "other samples")])
def test_other_encoders_and_other_samples_are_named(short_run, monkeypatch, name, words):
    """As if other files stood behind --vision-weights or --dataset by now."""
    monkeypatch.setattr(train, name, lambda _: "another")
    with pytest.raises(InputError, match=f"last.pt: the run began with {words}"):
        resume(short_run)


# --- The folder of a run --------------------------------------------------------------------------


def hold(out):
    """The context in which a run has its folder."""
    return train.hold_folder(argparse.Namespace(out=str(out), resume=False))


def test_a_folder_that_cannot_take_a_run_is_refused(tmp_path):
    """A photo of the user's is no run, but it might be overwritten; a file is no folder."""
    (tmp_path / "val.png").write_bytes(b"mine")
    with pytest.raises(InputError, match="already holds val.png: give another"), hold(tmp_path):
        pass
    assert (tmp_path / "val.png").read_bytes() == b"mine"
    with pytest.raises(InputError, match="val.png is a file"), hold(tmp_path / "val.png" / "a"):
        pass


def test_a_folder_in_which_no_run_was_begun_is_removed(tmp_path):
    """A wrong flag may be found after the folder was made."""
    with pytest.raises(InputError, match="a flag is wrong"), hold(tmp_path / "a"):
        raise InputError("a flag is wrong")
    assert not (tmp_path / "a").exists()


HOLD = """
import argparse, sys, time, train
with train.hold_folder(argparse.Namespace(out=sys.argv[1], resume=False)):
    print("holding", flush=True)
    time.sleep(60)
"""


def test_two_runs_cannot_have_one_folder(tmp_path):
    """While a run is under way, another process is told which process holds the folder. Afterwards
    the folder is free, also if the process was killed."""
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE,
                             cwd=ROOT, text=True)
    assert first.stdout.readline() == "holding\n"
    with pytest.raises(InputError, match=f"{tmp_path} is in use by process {first.pid} on "):
        run(tmp_path)
    first.kill()
    first.wait()
    with hold(tmp_path):
        assert f"process {os.getpid()} on" in (tmp_path / "lock").read_text()


def test_a_disk_without_locks_takes_runs_all_the_same(tmp_path, monkeypatch):
    """Some network disks have no locks."""
    def no_locks(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    assert [line["epoch"] for line in read_log(run(tmp_path / "a", "--epochs", "1"))] == [1]


def test_a_refused_start_leaves_the_files_of_a_folder_alone(tmp_path):
    """Half-written files of a run are removed, other .partial files are not; and what is refused on
    --resume changes no option of the run."""
    (tmp_path / "film.partial").write_text("mine")
    with pytest.raises(InputError, match="already holds film.partial"):
        run(tmp_path)
    assert (tmp_path / "film.partial").read_text() == "mine"

    out = run(tmp_path / "x", "--epochs", "1")
    before = (out / "args.json").read_text()
    (out / "last.pt.123.partial").write_text("half")
    (out / "last.pt").write_bytes(b"damaged")
    with pytest.raises(InputError, match="damaged"):
        train.main(["--out", str(out), "--resume", "--epochs", "2"])
    assert (out / "args.json").read_text() == before
    assert not (out / "last.pt.123.partial").exists()
