"""Claims of the papers, tried on `shapes`: which runs they need, what is done with the results."""
import json
import math

import pytest
import torch

import data
import train


# --- The claims and their runs --------------------------------------------------------------------


def test_claims_compare_two_rows_of_one_paper():
    """Each claim is about two different rows, which exist, and no two claims are about the same."""
    pairs = [(claim.higher, claim.lower) for claim in train.CLAIMS]
    assert len(set(pairs)) == len(pairs)
    for higher, lower in pairs:
        assert higher in train.ROWS and lower in train.ROWS
        assert higher.partition("/")[0] == lower.partition("/")[0]


def test_the_rows_of_a_claim_are_different_models():
    """Two rows that are the same at tiny size could show nothing."""
    runs = train.runs_of(train.CLAIMS, 2, {})
    for claim in train.CLAIMS:
        assert runs[claim.higher, 0] != runs[claim.lower, 0], claim


def test_the_rows_of_a_paper_have_as_many_epochs_and_the_same_samples():
    """Rows without HiLoRA, or with fewer stages, have a longer warm-up."""
    runs = train.runs_of(train.CLAIMS, 2, {})
    for (row, seed), flags in runs.items():
        args = train.resolve(flags)
        own = train.resolve({"method": row.partition("/")[0]})
        assert train.plan(args)[-1].last == train.plan(own)[-1].last, row
        assert args.seed == seed
        for name in ("batch_size", "lr", "lr_drop", "schedule", "warmup", "weight_decay",
                     "expressions_per_image", "attention_loss"):
            assert getattr(args, name) == getattr(own, name), (row, name)
    assert runs["hivg/5/1", 0]["epochs"] == 6
    assert runs["hivg/5/2", 0]["epochs"] == 5


def test_equal_rows_share_their_runs():
    """M²IST itself is a row of six tables; it is run once for each seed, whatever is asked for."""
    runs = train.runs_of(train.CLAIMS, 3, {"limit": 8})
    for row in ("m2ist/V/f", "m2ist/VI/d", "m2ist/VII/c", "m2ist/II/128"):
        assert runs[row, 1] == {"row": "m2ist/I/m2ist", "seed": 1, "limit": 8}
    alone = train.runs_of(train.chosen_claims(["m2ist/VII"]), 3, {"limit": 8})
    assert alone["m2ist/VII/c", 1] == runs["m2ist/I/m2ist", 1]


def test_the_seeds_come_one_after_the_other():
    seeds = [seed for _, seed in train.runs_of(train.CLAIMS, 3, {})]
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


@pytest.mark.parametrize("higher, lower, least, verdict", [
    ([90, 91, 92], [80, 82, 81], 0, "seen"),
    ([80, 82, 81], [90, 91, 92], 0, "contradicted"),
    ([90, 80, 92], [80, 91, 91], 0, "not seen"),
    ([90.0, 91.0, 92.1], [90.1, 91.0, 92.0], 0, "not seen"),
    ([90.0, 91.0, 92.1], [90.1, 91.0, 92.0], -1, "seen"),    # not more than one point worse
    ([80, 82, 81], [90, 91, 92], -1, "contradicted"),
    # The seeds differ a lot, the pairs do not.
    ([60, 75, 90], [58, 73.2, 87.9], 0, "seen")])
def test_the_verdict_follows_from_the_interval_of_paired_differences(higher, lower, least, verdict):
    accuracies = {}
    for seed in range(3):
        accuracies["a", seed] = higher[seed]
        accuracies["b", seed] = lower[seed]
    found = train.find(train.Claim("a beats b", "a", "b", least), accuracies, 3)

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
        assert chart.getpixel((round(x), 24 * number + 12)) == colours[colour]


# --- The command ----------------------------------------------------------------------------------


@pytest.fixture
def one_claim(monkeypatch, tmp_path):
    """A single claim, and a folder in which the runs are made."""
    monkeypatch.chdir(tmp_path)
    claim = train.Claim("LEA helps", "m2ist/V/b", "m2ist/V/a")
    monkeypatch.setattr(train, "CLAIMS", [claim])
    return tmp_path


def test_the_command_runs_what_is_missing_and_prints_a_table(one_claim, monkeypatch, capsys):
    """A run that is there is not made again; the accuracy is the mean over testA and testB."""
    made = []

    def fake_run(flags):
        made.append((flags["row"], flags["seed"]))
        folder = one_claim / train.default_out(flags)
        folder.mkdir(parents=True)
        base = 0.8 if flags["row"] == "m2ist/V/b" else 0.7
        splits = {"testA": {"acc@0.5": base + 0.1}, "testB": {"acc@0.5": base - 0.1}}
        (folder / "test.json").write_text(json.dumps(splits))

    monkeypatch.setattr(train, "run_alone", fake_run)
    with pytest.raises(SystemExit):
        train.main(["--claims", "--seeds", "2"])
    assert sorted(made) == [("m2ist/I/frozen", 0), ("m2ist/I/frozen", 1),
                            ("m2ist/V/b", 0), ("m2ist/V/b", 1)]
    printed = capsys.readouterr().out
    assert "| LEA helps | m2ist/V/b - m2ist/V/a | +10.0 ± 0.0 | seen |" in printed
    assert "| m2ist/V/a | 70.0 ± 0.0 |" in printed
    assert (one_claim / "runs" / "claims.png").is_file()

    made.clear()
    with pytest.raises(SystemExit):
        train.main(["--claims", "--seeds", "3", "--out", "three.png"])
    assert sorted(made) == [("m2ist/I/frozen", 2), ("m2ist/V/b", 2)]
    assert (one_claim / "three.png").is_file()


def test_a_run_of_a_claim_is_that_of_the_same_row(one_claim, capsys):
    """What is trained in a process of its own, and stopped before its test, is the same as
    `train.py --row` with these flags; what it prints is beside its folder."""
    flags = {"row": "m2ist/V/b", "seed": 1, "limit": 32, "epochs": 1}
    train.run_alone(flags)
    out = one_claim / train.default_out(flags)
    splits = json.loads((out / "test.json").read_text())
    assert list(splits) == ["testA", "testB"]
    assert "m2ist/V/b" in (out.parent / f"{out.name}.txt").read_text()
    assert json.loads((out / "args.json").read_text())["args"]["attention_port"] == "none"

    # Stopped before its test, a run goes on from there.
    trained = (out / "best.safetensors").stat().st_mtime_ns
    (out / "test.json").unlink()
    train.run_alone(flags)
    assert json.loads((out / "test.json").read_text()) == splits
    assert (out / "best.safetensors").stat().st_mtime_ns == trained


def test_a_run_that_fails_is_named_with_the_file_of_what_it_printed(one_claim):
    """The command says where to look, and does not begin further runs."""
    bad = {"row": "m2ist/V/b", "seed": 0, "device": "nowhere"}
    with pytest.raises(data.InputError, match=r"shapes-m2ist-V-b-0.*\.txt says why"):
        train.run_side_by_side([bad])
    [log] = (one_claim / "runs").glob("*.txt")
    assert "--device nowhere cannot be used" in log.read_text()


@pytest.mark.parametrize("flags, words", [
    (["--claims", "m2ist/XX"], ["m2ist/XX", "m2ist/VII", "hivg/5"]),
    (["--claims", "--seeds", "1"], ["--seeds is 1", "2 to 10"]),
    (["--claims", "--row", "m2ist/V/b"], ["--row is not for --claims"]),
    (["--claims", "--out", "folder"], ["folder", ".png"])])
def test_wrong_flags_are_refused_before_anything_is_run(flags, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(data.InputError) as error:
        train.main(flags)
    for word in words:
        assert word in str(error.value)
    assert list(tmp_path.iterdir()) == []
