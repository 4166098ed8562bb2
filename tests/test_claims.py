"""Claims of the papers, tried on `shapes`: which runs they need, what is done with the results."""
import json
import math
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import data
import train


# --- The claims and their runs --------------------------------------------------------------------


def runs_of(claims, seeds, given):
    """The runs of claims with the rates of the recipes."""
    rows = train.rows_of(claims, given)
    return train.runs_of(rows, dict.fromkeys(rows, 1), range(seeds))


def test_claims_compare_two_rows_of_one_paper():
    """Each claim is about two different rows, which exist, and no two claims are about the same."""
    pairs = [(claim.higher, claim.lower) for claim in train.CLAIMS]
    assert len(set(pairs)) == len(pairs)
    for higher, lower in pairs:
        assert higher in train.ROWS and lower in train.ROWS
        assert higher.partition("/")[0] == lower.partition("/")[0]


def test_the_rows_of_a_claim_are_different_models():
    """Two rows that are the same at tiny size could show nothing."""
    runs = runs_of(train.CLAIMS, 2, {})
    for claim in train.CLAIMS:
        assert runs[claim.higher, 0] != runs[claim.lower, 0], claim


def test_the_rows_of_a_paper_have_as_many_epochs_and_the_same_samples():
    """Rows without HiLoRA, or with fewer stages, have a longer warm-up."""
    runs = runs_of(train.CLAIMS, 2, {})
    for (row, seed), flags in runs.items():
        args = train.resolve(flags)
        own = train.resolve({"method": row.partition("/")[0]})
        assert train.plan(args)[-1].last == train.plan(own)[-1].last, row
        assert args.seed == seed
        for name in ("batch_size", "lr", "lr_drop", "schedule", "warmup", "weight_decay",
                     "expressions_per_image", "attention_loss", "limit"):
            assert getattr(args, name) == getattr(own, name), (row, name)
    assert runs["hivg/5/1", 0]["epochs"] == 4
    assert runs["hivg/5/2", 0]["epochs"] == 3


def test_equal_rows_share_their_runs():
    """M²IST itself is a row of six tables; it is run once for each seed, whatever is asked for."""
    runs = runs_of(train.CLAIMS, 3, {"limit": 8})
    for row in ("m2ist/V/f", "m2ist/VI/d", "m2ist/VII/c", "m2ist/II/128"):
        assert runs[row, 1] == {"row": "m2ist/I/m2ist", "seed": 1, "limit": 8}
    alone = runs_of(train.chosen_claims(["m2ist/VII"]), 3, {"limit": 8})
    assert alone["m2ist/VII/c", 1] == runs["m2ist/I/m2ist", 1]


def test_the_seeds_come_one_after_the_other():
    seeds = [seed for _, seed in runs_of(train.CLAIMS, 3, {})]
    assert seeds == sorted(seeds)


@pytest.mark.parametrize("names, tables", [
    (["m2ist/V"], {"m2ist/V"}),
    (["m2ist/VII", "hivg/5"], {"m2ist/VII", "hivg/5"}),
    (["hivg"], {"hivg/3", "hivg/4", "hivg/5", "hivg/9", "hivg/11", "hivg/fig4d"})])
def test_a_name_chooses_the_claims_of_a_paper_or_a_table(names, tables):
    """m2ist/V is Table V, and not Table VI or VII."""
    chosen = train.chosen_claims(names)
    assert {claim.higher.rpartition("/")[0] for claim in chosen} == tables


def test_without_a_name_all_claims_are_tried():
    assert train.chosen_claims([]) == train.CLAIMS


# --- What the runs come to ------------------------------------------------------------------------


def test_t95_is_where_95_percent_of_students_t_lie():
    """The density of Student's t, integrated numerically."""
    for seeds, bound in train.T95.items():
        free = seeds - 1
        t = torch.linspace(-bound, bound, 200_001, dtype=torch.float64)
        scale = math.gamma((free + 1) / 2) / math.sqrt(free * math.pi) / math.gamma(free / 2)
        density = scale * (1 + t ** 2 / free) ** (-(free + 1) / 2)
        assert torch.trapezoid(density, t).item() == pytest.approx(0.95, abs=1e-4)


@pytest.mark.parametrize("higher, lower, margin, verdict", [
    ([90, 91, 92], [80, 82, 81], 0, "seen"),
    ([80, 82, 81], [90, 91, 92], 0, "contradicted"),
    ([90, 80, 92], [80, 91, 91], 0, "not seen"),
    ([90.0, 91.0, 92.1], [90.1, 91.0, 92.0], 0, "not seen"),
    ([90.0, 91.0, 92.1], [90.1, 91.0, 92.0], -1, "seen"),    # not more than one point worse
    ([80, 82, 81], [90, 91, 92], -1, "contradicted"),
    # The seeds differ a lot, the pairs do not.
    ([60, 75, 90], [58, 73.2, 87.9], 0, "seen")])
def test_the_verdict_follows_from_the_interval_of_paired_differences(higher, lower, margin, verdict):
    accuracies = {}
    for seed in range(3):
        accuracies["a", seed] = higher[seed]
        accuracies["b", seed] = lower[seed]
    found = train.judge(train.Claim("a beats b", "a", "b", margin), accuracies, 3)

    higher = torch.tensor(higher, dtype=torch.float64)
    differences = higher - torch.tensor(lower, dtype=torch.float64)
    half = 4.303 * differences.std().item() / math.sqrt(3)
    assert found.difference == pytest.approx(differences.mean().item())
    assert found.half == pytest.approx(half)
    assert found.verdict == verdict


def test_the_chart_has_a_point_and_an_interval_for_each_claim():
    """Green is clear of its threshold upwards, red downwards; the point is at its value."""
    bars = [("up", 4.0, 1.0, 0.0), ("down", -4.0, 1.0, 0.0), ("neither", 0.5, 2.0, 0.0)]
    chart = data.interval_chart(bars)
    colours = {"green": (0, 128, 0), "red": (255, 0, 0), "dimgrey": (105, 105, 105)}
    left = chart.width - 420 - 12
    for number, (value, colour) in enumerate([(4.0, "green"), (-4.0, "red"), (0.5, "dimgrey")]):
        x = left + (value + 5) / 10 * 420    # the axis goes from -5 to 5
        y = 24 * number + 12
        assert chart.getpixel((round(x), y)) == colours[colour]
        half = bars[number][2] / 10 * 420
        assert chart.getpixel((round(x - 0.8 * half), y)) == colours[colour]
        assert chart.getpixel((round(x - 1.3 * half), y)) != colours[colour]


def test_the_chart_names_each_claim_with_letters_that_its_font_has(monkeypatch):
    """Pillow draws a box in place of a letter that its own font lacks, such as ²."""
    monkeypatch.setattr(data, "interval_chart", lambda bars: [text for text, *_ in bars])
    texts = train.chart([train.Finding(claim, 1.0, 0.5, "seen") for claim in train.CLAIMS])
    assert texts[0] == "M2IST is no worse than full fine-tuning: seen"
    assert all(text.isascii() for text in texts)


# --- The command ----------------------------------------------------------------------------------


@pytest.fixture
def one_claim(monkeypatch, tmp_path):
    """A single claim, and the folder in whose `runs` its runs are made."""
    monkeypatch.chdir(tmp_path)
    claim = train.Claim("LEA helps", "m2ist/V/b", "m2ist/V/a")
    monkeypatch.setattr(train, "CLAIMS", [claim])
    return tmp_path


@pytest.fixture
def made(one_claim, monkeypatch):
    """What the command runs, [(row, seed, lr)]. No run is trained; only its results are written. The
    accuracy on testA and testB grows with the seed, and is ten points higher for m2ist/V/b. On val
    both rows are best with half of their rates, m2ist/V/b by 1 point and m2ist/V/a by 0.5, before
    the last epoch."""
    made = []

    def fake_run(flags, stopping):
        args = train.resolve(flags)
        made.append((args.row, args.seed, args.lr))
        folder = one_claim / train.default_out(flags)
        folder.mkdir(parents=True)
        assert flags["device"] == "cpu"
        base = 0.695 + 0.01 * args.seed
        if args.row == "m2ist/V/b":
            base += 0.1
        splits = {"testA": {"acc@0.5": base + 0.1}, "testB": {"acc@0.5": base - 0.1}}
        (folder / "test.json").write_text(json.dumps(splits))
        val = {0.5e-3: 0.9, 1e-3: 0.895, 2e-3: 0.8}[args.lr]
        if args.row == "m2ist/V/b" and args.lr == 1e-3:
            val = 0.89
        records = [{"epoch": 1, "step": 100, "train_acc@0.5": 0.99},
                   {"epoch": 1, "val_acc@0.5": val}, {"epoch": 2, "val_acc@0.5": 0.7}]
        (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    monkeypatch.setattr(train, "run_alone", fake_run)
    return made


def test_the_command_runs_what_is_missing_and_prints_a_table(one_claim, made, capsys):
    """A run that is there is not made again; the accuracy is the mean over testA and testB."""
    with pytest.raises(SystemExit):
        train.main(["--claims", "--seeds", "2", "--rates", "1"])
    assert sorted(made) == [("m2ist/I/frozen", 0, 1e-3), ("m2ist/I/frozen", 1, 1e-3),
                            ("m2ist/V/b", 0, 1e-3), ("m2ist/V/b", 1, 1e-3)]
    printed = capsys.readouterr().out
    assert "| LEA helps | m2ist/V/b - m2ist/V/a | +10.0 ± 0.0 | seen |" in printed
    assert "| row | rates | seed 0 | seed 1 | mean ± deviation |\n|---|---|---|---|---|\n" in printed
    assert "| m2ist/V/a | x 1 | 69.5 | 70.5 | 70.0 ± 0.7 |" in printed
    assert (one_claim / "runs" / "claims.png").is_file()

    made.clear()
    with pytest.raises(SystemExit):
        train.main(["--claims", "--seeds", "3", "--rates", "1", "1", "--out", "three.png"])
    assert sorted(made) == [("m2ist/I/frozen", 2, 1e-3), ("m2ist/V/b", 2, 1e-3)]
    assert (one_claim / "three.png").is_file()


def test_each_row_chooses_its_rates_on_val_with_another_seed(one_claim, made, capsys):
    """Each row tries half, once and twice its rates, with a seed that the table does not use. It leaves
    its recipe for other rates only if these are better by more than one standard error."""
    with pytest.raises(SystemExit):
        train.main(["--claims", "--seeds", "2"])
    assert train.SEED_OF_TRIES not in range(max(train.T95))
    tries = [(row, seed, lr) for row, seed, lr in made if seed == train.SEED_OF_TRIES]
    assert sorted(tries) == [(row, 100, lr) for row in ("m2ist/I/frozen", "m2ist/V/b")
                             for lr in (0.5e-3, 1e-3, 2e-3)]
    in_table = sorted(run for run in made if run[1] != train.SEED_OF_TRIES)
    assert in_table == [("m2ist/I/frozen", 0, 1e-3), ("m2ist/I/frozen", 1, 1e-3),
                        ("m2ist/V/b", 0, 0.5e-3), ("m2ist/V/b", 1, 0.5e-3)]
    printed = capsys.readouterr().out
    assert "| row | x 0.5 | x 1 | x 2 | taken |\n|---|---|---|---|---|\n" in printed
    assert "| m2ist/V/b | 90.0 | 89.0 | 80.0 | x 0.5 |" in printed
    assert "| m2ist/V/a | 90.0 | 89.5 | 80.0 | x 1 |" in printed
    assert "| m2ist/V/b | x 0.5 | 79.5 | 80.5 | 80.0 ± 0.7 |" in printed
    assert "| m2ist/V/a | x 1 | 69.5 | 70.5 | 70.0 ± 0.7 |" in printed


@pytest.mark.parametrize("reached, taken", [
    ({0.5: 80.0, 1.0: 90.0, 2.0: 89.9}, 1.0),
    ({0.5: 80.0, 1.0: 89.2, 2.0: 90.0}, 1.0),    # the standard error is 0.87
    ({0.5: 80.0, 1.0: 89.1, 2.0: 90.0}, 2.0),
    ({0.25: 90.0, 0.5: 89.5, 1.0: 80.0}, 0.5),
    ({2.0: 89.5, 4.0: 90.0}, 2.0),               # --rates without 1
    ({0.5: 89.2, 1.0: 80.0, 2.0: 90.0}, 2.0)])   # equally near: the better one
def test_a_difference_within_one_standard_error_does_not_count(reached, taken):
    """That of a share p of n samples is (p (1 - p) / n) ** 0.5; val has 1,200 expressions."""
    assert train.val_size({"row": "m2ist/V/b"}) == 1200
    assert train.within_one_standard_error(reached, 1200) == taken


@pytest.mark.parametrize("row, scaled", [
    ("m2ist/I/m2ist", {"lr": 2e-3, "lr_encoder": 2e-3}),
    ("m2ist/I/full", {"lr": 2e-3, "lr_encoder": 2e-4}),    # pretrained encoders: a tenth
    ("hivg/3/4", {"lr": 4e-3, "lr_encoder": 4e-3, "stage_lr": [3e-3, 2e-3, 1.4e-3]}),
    ("hivg/3/2", {"lr": 4e-3, "lr_encoder": 4e-3})])       # no LoRA, and so no stages
def test_a_factor_scales_all_rates_of_a_row(row, scaled):
    """By one and the same factor; factor 1 leaves the row without flags, and so in its folder."""
    assert train.scaled_rates({"row": row}, 2.0) == scaled
    train.resolve({"row": row, **scaled})
    assert train.scaled_rates({"row": row}, 1.0) == {}


def test_every_row_takes_its_scaled_rates_on_the_command_line():
    """A row without stages, such as LoRA on DETR and BERT, has no rates of stages to be given."""
    for row, flags in train.rows_of(train.CLAIMS, {}).items():
        scaled = train.scaled_rates(flags, 2.0)
        args = train.parse_args(train.words_of({**flags, **scaled}))
        recipe = train.resolve(flags)
        assert args.lr == 2 * recipe.lr, row
        assert args.lr_encoder == 2 * recipe.lr_encoder, row
        if "stage_lr" in scaled:
            assert args.stage_lr == [2 * rate for rate in recipe.stage_lr], row


def test_a_run_of_a_claim_is_that_of_the_same_row(one_claim, capsys):
    """What is trained in a process of its own, and stopped before its test, is the same as
    `train.py --row` with these flags; what it prints is beside its folder."""
    flags = {"row": "m2ist/V/b", "seed": 1, "limit": 32, "epochs": 1}
    train.run_alone(flags, threading.Event())
    out = one_claim / train.default_out(flags)
    splits = json.loads((out / "test.json").read_text())
    assert list(splits) == ["testA", "testB"]
    assert "m2ist/V/b" in (out.parent / f"{out.name}.txt").read_text()
    saved = train.read_args(out)
    for name, value in vars(train.resolve(flags)).items():
        if name not in train.MAY_CHANGE:
            assert saved[name] == value, name

    # Stopped before its test, a run goes on from there.
    trained = (out / "best.safetensors").stat().st_mtime_ns
    (out / "test.json").unlink()
    train.run_alone(flags, threading.Event())
    assert json.loads((out / "test.json").read_text()) == splits
    assert (out / "best.safetensors").stat().st_mtime_ns == trained


def test_a_run_that_fails_is_named_with_the_file_of_what_it_printed(one_claim):
    """The command says where to look."""
    bad = {"row": "m2ist/V/b", "seed": 0, "device": "nowhere"}
    with pytest.raises(data.InputError, match=r"shapes-m2ist-V-b-0.*\.txt says why"):
        train.run_side_by_side([bad])
    [log] = (one_claim / "runs").glob("*.txt")
    assert "--device nowhere cannot be used" in log.read_text()


def test_after_a_run_that_fails_no_other_begins(one_claim, monkeypatch):
    """One run at a time, and the first one fails: the others leave nothing behind."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    bad = {"row": "m2ist/V/b", "limit": 8, "epochs": 1, "device": "nowhere"}
    with pytest.raises(data.InputError, match="says why"):
        train.run_side_by_side([{**bad, "seed": seed} for seed in range(4)])
    [log] = Path("runs").iterdir()
    assert log.name.startswith("shapes-m2ist-V-b-0") and log.suffix == ".txt"


def test_stopping_the_command_stops_its_runs(one_claim):
    """No run goes on without the command, and each has written last.pt, or had not begun."""
    command = [sys.executable, train.__file__, "--claims", "m2ist/V/b", "--epochs", "200",
               "--limit", "64"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not list(Path("runs").glob("*/log.jsonl")):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on with what is missing" in printed
    for log in Path("runs").glob("*.txt"):
        assert "goes on from there" in log.read_text()
    for epochs in Path("runs").glob("*/log.jsonl"):
        assert (epochs.parent / "last.pt").is_file()


def test_a_folder_of_another_recipe_is_refused_before_any_run(one_claim, monkeypatch):
    """Its accuracy would be compared with those of runs that were made otherwise. The refusal comes
    before the tries of the rates, which take hours."""
    monkeypatch.setattr(train, "run_side_by_side", None)
    flags = {"row": "m2ist/V/b", "seed": 0, "limit": 8, "epochs": 1}
    args = train.resolve(flags)
    args.out = train.default_out(flags)
    Path(args.out).mkdir(parents=True)
    train.write_args(Path(args.out), args)
    train.check_is_run_of(flags)

    del args.draft    # by an older version, which had no --draft
    Path(args.out, "args.json").unlink()
    train.write_args(Path(args.out), args)
    train.check_is_run_of(flags)

    args.weight_decay = 0.5
    Path(args.out, "args.json").unlink()
    train.write_args(Path(args.out), args)
    with pytest.raises(data.InputError, match="holds a run with weight_decay 0.5, and --claims needs"):
        train.main(["--claims", "--limit", "8", "--epochs", "1"])


def test_claims_with_help_shows_the_help(one_claim, capsys):
    with pytest.raises(SystemExit):
        train.main(["--claims", "--seeds", "3", "--help"])
    assert "--claims [NAME ...]" in capsys.readouterr().out
    assert list(one_claim.iterdir()) == []


def test_a_flag_of_one_paper_is_for_the_claims_of_that_paper():
    """Rows that the claims do not need are not asked what they think of a flag."""
    runs = runs_of(train.chosen_claims(["hivg/3"]), 2, {"contrast": 0.5})
    assert {flags["contrast"] for flags in runs.values()} == {0.5}


@pytest.mark.parametrize("flags, words", [
    (["--claims", "m2ist/XX"], ["m2ist/XX", "m2ist/VII", "hivg/5"]),
    (["--claims", "--seeds", "1"], ["--seeds is 1", "2 to 10"]),
    (["--claims", "--row", "m2ist/V/b"], ["--row is not for --claims"]),
    (["--claims", "--dataset", "refcoco"], ["--dataset is not for --claims"]),
    (["--seeds", "3"], ["--seeds is for --claims"]),
    (["--rates", "1", "2"], ["--rates is for --claims"]),
    (["--claims", "--rates", "1", "0"], ["--rates has 0", "above 0"]),
    (["--claims", "--rates", "nan"], ["--rates has nan", "above 0"]),
    (["--claims", "m2ist/I", "--contrast", "0.5"], ["m2ist/I/m2ist", "--contrast"]),
    (["--claims", "hivg/5", "--epochs", "1"], ["hivg/5/5", "--epochs"]),
    (["--claims", "--out", "folder"], ["folder", ".png"])])
def test_wrong_flags_are_refused_before_anything_is_run(flags, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(data.InputError) as error:
        train.main(flags)
    for word in words:
        assert word in str(error.value)
    assert list(tmp_path.iterdir()) == []
