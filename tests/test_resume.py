"""train.py after an interruption: a resumed run ends as an uninterrupted one, bit by bit."""
import argparse
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

import evaluate
import train
from data import InputError
from short_runs import FAST, HIVG, computed, last_weights, read_log, run, same, up_and_down

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.usefixtures("cpu_with_dropout")


class Dying:
    """A stand-in for write_atomically that stops the run in place of one of its writes.

    write: the number of the write, from 1; None counts the writes and stops none. file: count the
    writes of this file alone.
    """

    def __init__(self, write, file=None):
        self.write = write
        self.file = file
        self.real = train.write_atomically
        self.writes = 0

    def __call__(self, path, write):
        if self.file is None or Path(path).name == self.file:
            self.writes += 1
        if self.writes == self.write:
            Path(f"{path}.1.partial").write_bytes(b"half")
            raise KeyboardInterrupt
        self.real(path, write)


def die(monkeypatch, dying, out, *flags):
    """Begin a run that stops at a write."""
    with monkeypatch.context() as patch:
        patch.setattr(train, "write_atomically", dying)
        with pytest.raises(KeyboardInterrupt):
            run(out, *flags)


def assert_same_run(a, b):
    """Logs (but for times), last weights and best weights are equal bit by bit."""
    assert computed(a) == computed(b)
    assert same(last_weights(a), last_weights(b))
    assert same(load_file(a / "best.safetensors"), load_file(b / "best.safetensors"))


# --- Interruptions --------------------------------------------------------------------------------


def writes_of(out):
    """How many files a run has written, by its log: args.json, then in each epoch last.pt,
    best.safetensors if no epoch before was better, log.jsonl, and last.pt again."""
    writes = 1
    best = 0.0
    for line in read_log(out):
        writes += 3
        if line["val_acc@0.5"] >= best:
            writes += 1
            best = line["val_acc@0.5"]
    return writes


@pytest.mark.parametrize("write", range(1, 14))
def test_a_run_that_dies_at_any_write_resumes_to_the_same_weights(tmp_path, monkeypatch, m2ist_run,
                                                                 write):
    """Three epochs write 11 to 13 files; how many epochs are better than those before is luck."""
    if write > writes_of(m2ist_run):
        pytest.skip("this run writes fewer files")
    dead = tmp_path / "dead"
    die(monkeypatch, Dying(write), dead)

    # Before args.json is written, there is no run to be resumed.
    flags = FAST if write == 1 else ["--resume"]
    train.main([*flags, "--out", str(dead)])

    assert_same_run(m2ist_run, dead)
    resumed, _ = evaluate.load_checkpoint(dead)
    whole, _ = evaluate.load_checkpoint(m2ist_run)
    assert same(resumed.state_dict(), whole.state_dict())


def test_a_run_makes_the_writes_that_its_log_tells_of(tmp_path, monkeypatch):
    """So the test above meets every write."""
    counting = Dying(write=None)
    monkeypatch.setattr(train, "write_atomically", counting)
    out = run(tmp_path / "a")
    assert counting.writes == writes_of(out)
    assert 11 <= counting.writes <= 13


@pytest.mark.parametrize("write, file", [
    (3, "last.pt"),      # the last epoch of the warm-up is trained, and last.pt does not know
    (4, "last.pt"),      # the warm-up is over, and last.pt says that it is not evaluated
    (3, "log.jsonl"),    # the first epoch of stage 1 is trained, and not in the log
    (8, "last.pt"),      # stage 1 is over, and last.pt says that it is not evaluated
    (5, "log.jsonl"),    # the first epoch of stage 2 is trained, and not in the log
    (12, "last.pt"),     # at the very end
])
def test_hivg_that_dies_at_a_write_resumes_into_the_right_stage(tmp_path, monkeypatch, hivg_run,
                                                                write, file):
    """A run of HiLoRA goes on in the stage and with the pairs that it had."""
    monkeypatch.setattr(train, "scores", up_and_down)
    dead = tmp_path / "dead"
    die(monkeypatch, Dying(write, file), dead, *HIVG)
    train.main(["--out", str(dead), "--resume", "--stages", "2"])    # a flag that the run has
    assert_same_run(hivg_run, dead)


def test_an_epoch_that_could_not_be_evaluated_is_not_lost(tmp_path, monkeypatch, m2ist_run):
    """What was trained is on disk before val is looked at; --resume goes on with the evaluation."""
    out = tmp_path / "a"
    with monkeypatch.context() as patch:
        def broken(*_):
            raise InputError("val/7.jpg: the file cannot be decoded as a picture")
        patch.setattr(train, "validate", broken)
        with pytest.raises(InputError, match="7.jpg"):
            run(out)
    assert not (out / "best.safetensors").exists()
    last = torch.load(out / "last.pt", weights_only=True)
    assert (last["progress"]["epoch"], last["progress"]["evaluated"]) == (1, False)

    trained = []
    real = train.train_epoch

    def watched(under_way, *rest):
        trained.append(under_way.progress.epoch + 1)
        return real(under_way, *rest)

    monkeypatch.setattr(train, "train_epoch", watched)
    train.main(["--out", str(out), "--resume"])
    assert trained == [2, 3]
    assert_same_run(m2ist_run, out)


def test_frozen_weights_are_hashed_once_a_run(tmp_path, monkeypatch):
    """At full size a hash takes seconds."""
    calls = []
    real = train.frozen_fingerprint

    def counted(model):
        calls.append(model.stage)
        return real(model)

    monkeypatch.setattr(train, "frozen_fingerprint", counted)
    run(tmp_path / "a", *HIVG)
    assert calls == [0]


def test_the_scaler_of_fp16_goes_on_where_it_was(tmp_path, monkeypatch):
    """The scaler counts the steps without overflow: one in each of two epochs. With the attention
    loss the first step overflows at the scale that torch starts from."""
    dead = tmp_path / "dead"
    die(monkeypatch, Dying(3, "last.pt"), dead, "--amp", "fp16", "--epochs", "2", "--limit", "8",
        "--attention-loss", "0")
    train.main(["--out", str(dead), "--resume"])
    last = torch.load(dead / "last.pt", weights_only=True)
    assert last["scaler"]["_growth_tracker"] == 2


RESUME_ONE_AND_RUN_ANOTHER = """
import sys, train
killed, whole, *flags = sys.argv[1:]
train.main(["--out", killed, "--resume"])
train.main([*flags, "--out", whole])
"""


def test_a_run_killed_by_sigkill_resumes_to_the_same_weights(tmp_path):
    """SIGKILL, which no program can catch, leaves a folder that can be resumed."""
    killed = tmp_path / "killed"
    whole = tmp_path / "whole"
    flags = [*FAST, "--epochs", "6", "--limit", "80"]
    command = [sys.executable, str(ROOT / "train.py"), *flags, "--out", str(killed)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not (killed / "log.jsonl").exists() and time.time() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 1 <= len(read_log(killed)) < 6

    command = [sys.executable, "-c", RESUME_ONE_AND_RUN_ANOTHER, str(killed), str(whole), *flags]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    assert_same_run(whole, killed)


@pytest.mark.parametrize("write", [2, 5, 9])
@pytest.mark.parametrize("method", ["m2ist", "hivg"])
def test_a_run_that_dies_within_an_epoch_goes_on_at_the_next_batch(tmp_path, monkeypatch, method,
                                                                   m2ist_run, hivg_run, write):
    """--save-minutes 0 writes last.pt after each step. What dies at one of these writes goes on at
    the step before, with the order, the transforms and the dropout that were to come."""
    flags, whole = ([], m2ist_run)
    if method == "hivg":
        flags, whole = (HIVG, hivg_run)
        monkeypatch.setattr(train, "scores", up_and_down)
    dead = tmp_path / "dead"
    die(monkeypatch, Dying(write, "last.pt"), dead, *flags, "--save-minutes", "0")
    # An epoch has three steps, and five writes: after each step, and before and after val.
    progress = torch.load(dead / "last.pt", weights_only=True)["progress"]
    writes = 5 * progress["epoch"] + progress["step"]
    if progress["epoch"] > 0 and not progress["evaluated"]:
        writes -= 1
    assert writes == write - 1
    train.main(["--out", str(dead), "--resume"])
    assert_same_run(whole, dead)


def test_the_log_of_steps_goes_on_as_if_nothing_had_happened(tmp_path, monkeypatch):
    """The means of a line of the log are over all of its steps, those before the interruption,
    too."""
    flags = ["--log-every", "2", "--epochs", "2"]
    whole = run(tmp_path / "whole", *flags)
    dead = tmp_path / "dead"
    die(monkeypatch, Dying(8, "last.pt"), dead, *flags, "--save-minutes", "0")
    train.main(["--out", str(dead), "--resume"])
    assert computed(dead) == computed(whole)
    assert [line.get("step") for line in read_log(dead)] == [2, None, 2, None]


@pytest.mark.parametrize("number, workers", [(signal.SIGTERM, "0"), (signal.SIGINT, "2")])
def test_a_signal_ends_a_run_with_one_line(tmp_path, number, workers):
    """Ctrl-C and SIGTERM, which reach the workers too: last.pt is written, nothing else is said,
    and the exit status is that of the signal."""
    out = tmp_path / "a"
    flags = [*FAST, "--epochs", "50", "--limit", "3000", "--workers", workers, "--log-every", "1"]
    command = [sys.executable, str(ROOT / "train.py"), *flags, "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    deadline = time.time() + 120
    while not (out / "log.jsonl").exists() and time.time() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in said
    said = said.replace("\r", "\n").strip().splitlines()
    stops = [line for line in said if "stopped in epoch 1; python train.py --out" in line]
    assert len(stops) == 1 and stops[0].endswith("--resume goes on from there")
    assert torch.load(out / "last.pt", weights_only=True)["progress"]["step"] > 0


def test_a_worker_is_silent_when_its_process_is_gone_and_no_other_time(capfd):
    """A signal can come while the process fetches a batch. The thread of the worker that sends the
    batch then sees a connection that is reset, and hands the error to sys.excepthook."""
    for error in (ConnectionResetError(104, "reset by peer"), EOFError(), ValueError("of the worker")):
        train.tell_unless_disconnected(type(error), error, None)
    assert capfd.readouterr().err == "ValueError: of the worker\n"

    samples = train.load_splits(train.parse_args([*FAST, "--workers", "1"]))[0]
    loader = torch.utils.data.DataLoader(samples, collate_fn=lambda batch: sys.excepthook.__name__,
                                         num_workers=1, worker_init_fn=train.begin_worker)
    hooks = list(loader)    # to the end, so that no worker is left where this test fails
    assert set(hooks) == {"tell_unless_disconnected"}


def test_a_signal_within_a_step_waits_for_its_end():
    """Weights and optimizer change together, or not at all."""
    class UnderWay:
        progress = train.Progress()
        out = Path("runs/x")

    with pytest.raises(SystemExit) as stopped, train.Signals(UnderWay()) as signals:
        with signals.held():
            signal.raise_signal(signal.SIGTERM)
            finished = True
        raise AssertionError("the run must have stopped")
    assert finished
    assert stopped.value.code == 143


def test_a_finished_run_is_not_trained_again(tmp_path, capsys):
    """--resume of a finished run says where the run stopped, and changes no file of training."""
    out = run(tmp_path / "a", "--epochs", "1")
    names = ("args.json", "log.jsonl", "last.pt", "best.safetensors")
    before = {name: (out / name).read_bytes() for name in names}
    train.main(["--out", str(out), "--resume"])
    assert "resumed after epoch 1" in capsys.readouterr().out
    assert {name: (out / name).read_bytes() for name in names} == before


def test_resume_of_a_folder_without_a_run_is_refused(tmp_path):
    """A mistyped --out must not become a new run."""
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "gone"):
        with pytest.raises(InputError, match=f"--resume: {out} holds no run.*leave --resume out"):
            run(out, "--resume")
    assert list(tmp_path.iterdir()) == [tmp_path / "empty"]
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_folder_with_args_json_alone_can_be_started_again(tmp_path):
    """A run may be killed between its first file and its first last.pt. Either command begins it
    again, --resume with the options of the run."""
    whole = run(tmp_path / "whole", "--epochs", "1")
    for flags in (["--resume"], [*FAST, "--epochs", "1"]):
        out = tmp_path / flags[0]
        out.mkdir()
        shutil.copy(whole / "args.json", out)
        train.main(["--out", str(out), *flags])
        assert computed(out) == computed(whole)


def test_a_finished_run_can_be_made_longer(tmp_path, capsys):
    """With the schedule `step`, whose rates do not depend on the end of the run, a run that is made
    longer is the run that was long from the start. The change stays in args.json."""
    flags = ["--schedule", "step", "--lr-drop", "9"]
    whole = run(tmp_path / "whole", *flags, "--epochs", "2")
    out = run(tmp_path / "a", *flags, "--epochs", "1")
    capsys.readouterr()
    train.main(["--out", str(out), "--resume", "--epochs", "2"])
    said = capsys.readouterr().out
    assert "the run goes on to epoch 2; up to now its end was 1" in said
    assert "its rates are those of a run of 2 epochs" in said
    assert_same_run(whole, out)
    assert train.parse_args(["--out", str(out), "--resume"]).epochs == 2


def test_a_run_cannot_be_made_shorter_and_one_in_stages_not_longer(tmp_path, hivg_run):
    """Fewer epochs would leave out what is trained already. The stages of a run in stages would
    begin later than they did."""
    out = run(tmp_path / "a", "--epochs", "2")
    with pytest.raises(InputError, match="--epochs is 1, but the run in --out has 2"):
        train.main(["--out", str(out), "--resume", "--epochs", "1"])
    with pytest.raises(InputError, match="--epochs is 9, but the run in --out has 2"):
        train.main(["--out", str(hivg_run), "--resume", "--epochs", "9"])


def test_a_resumed_run_may_change_what_makes_no_difference(tmp_path):
    """--device and --workers are not part of what a run computes."""
    out = run(tmp_path / "a", "--epochs", "1")
    args = train.parse_args(["--out", str(out), "--resume", "--device", "cpu", "--workers", "2"])
    assert args.workers == 2
    assert args.epochs == 1


def test_a_run_of_an_older_version_gets_the_defaults_of_newer_options(tmp_path):
    """args.json of an older version lacks the newest options."""
    saved = train.parse_args(FAST)
    del saved.weight_decay
    saved.out = str(tmp_path / "a")
    (tmp_path / "a").mkdir()
    train.write_args(tmp_path / "a", saved)
    args = train.parse_args(["--out", str(tmp_path / "a"), "--resume"])
    assert args.weight_decay == 1e-4
    assert args.batch_size == 8


# --- Runs that cannot be resumed ------------------------------------------------------------------


def test_a_folder_that_holds_a_run_is_never_overwritten(tmp_path):
    """A second run into a folder, or a resumed run with other options, is refused."""
    out = run(tmp_path / "a", "--epochs", "1")
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    with pytest.raises(InputError, match="--resume"):
        run(out)
    for flag, value in (("--lr", "0.5"), ("--method", "frozen"), ("--size", "base")):
        with pytest.raises(InputError, match=f"{flag} is {value}"):
            train.main(["--out", str(out), "--resume", flag, value])

    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def claim(out, resume=False):
    """The context in which a run has its folder."""
    return train.hold_folder(argparse.Namespace(out=str(out), resume=resume))


def test_a_file_that_was_half_written_is_no_run(tmp_path):
    """A folder that holds nothing but args.json and .partial files takes a new run, which removes
    the latter."""
    (tmp_path / "args.json").write_bytes(b"whole")
    (tmp_path / "last.pt.1.partial").write_bytes(b"half")
    with claim(tmp_path):
        assert sorted(os.listdir(tmp_path)) == ["args.json", "lock"]


def test_a_folder_that_holds_anything_else_is_refused(tmp_path):
    """A photo of the user's is no run, but it might be overwritten."""
    (tmp_path / "val.png").write_bytes(b"mine")
    with pytest.raises(InputError, match="already holds val.png: give another --out"):
        with claim(tmp_path):
            pass
    assert (tmp_path / "val.png").read_bytes() == b"mine"


def test_a_folder_in_which_no_run_was_begun_is_removed(tmp_path):
    """A wrong flag may be found after the folder was made."""
    with pytest.raises(InputError):
        with claim(tmp_path / "a"):
            raise InputError("a flag is wrong")
    assert not (tmp_path / "a").exists()


def test_a_folder_of_a_run_cannot_be_a_file(tmp_path):
    """--out names the file that stands in the path."""
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "a"):
        with pytest.raises(InputError, match="file is a file, not a folder"):
            with claim(out):
                pass


def test_two_runs_cannot_have_one_folder(tmp_path):
    """While a run is under way, another process is told which process holds the folder. Afterwards
    the folder is free, also if the process was killed."""
    out = tmp_path / "a"
    command = [sys.executable, str(ROOT / "train.py"), "--out", str(out), *FAST]
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE,
                             cwd=ROOT, text=True)
    assert first.stdout.readline() == "holding\n"
    second = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert second.returncode == 2
    assert second.stderr.startswith(f"error: --out {out} is in use by process {first.pid} on ")
    first.kill()
    first.wait()
    with claim(out):
        assert f"process {os.getpid()} on" in (out / "lock").read_text()


HOLD = """
import argparse, sys, time, train
with train.hold_folder(argparse.Namespace(out=sys.argv[1], resume=False)):
    print("holding", flush=True)
    time.sleep(60)
"""


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """A run of one epoch, for tests that leave its files as they are or put them back."""
    return run(tmp_path_factory.mktemp("short") / "a", "--epochs", "1")


def test_other_encoders_are_named(short_run, monkeypatch):
    """A run is not resumed with other encoders, as if another file stood behind --vision-weights
    by now."""
    monkeypatch.setattr(train, "frozen_fingerprint", lambda model: "another")
    with pytest.raises(InputError, match="last.pt: the run began with other encoder weights"):
        train.main(["--out", str(short_run), "--resume"])


@pytest.mark.parametrize("file, content, message", [
    ("last.pt", b"PK, the beginning of an archive", "last.pt: damaged"),
    ("args.json", b"{", "args.json: not what train.py writes"),
    ("args.json", b"{}", "args.json: not what train.py writes"),
    ("args.json", b"[1]", "args.json: not what train.py writes"),
    ("args.json", b'{"args": [1]}', "args.json: not what train.py writes"),
])
def test_damaged_files_are_named(short_run, file, content, message):
    """A file that train.py cannot read gives one line with the name of the file."""
    assert_named(short_run, file, content, message)


def test_a_truncated_last_pt_is_named(short_run):
    """The first thousand bytes of last.pt are no last.pt."""
    half = (short_run / "last.pt").read_bytes()[:1000]
    assert_named(short_run, "last.pt", half, "last.pt: damaged")


def test_a_last_pt_that_lacks_a_part_is_named(short_run, tmp_path):
    """A file that torch.save wrote may still lack the weights."""
    torch.save({"epoch": 1}, tmp_path / "part.pt")
    part = (tmp_path / "part.pt").read_bytes()
    assert_named(short_run, "last.pt", part, "last.pt: damaged")


def assert_named(out, file, content, message):
    """With this content in one of its files a run is not resumed, and the message says why."""
    whole = (out / file).read_bytes()
    (out / file).write_bytes(content)
    try:
        with pytest.raises(InputError, match=message):
            train.main(["--out", str(out), "--resume"])
    finally:
        (out / file).write_bytes(whole)
