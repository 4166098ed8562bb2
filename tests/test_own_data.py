"""One's own data: a run that starts from another one, short runs, data that moved, and messages."""
import json
import shutil
from collections import namedtuple

import pytest
import torch
from PIL import Image

import data
import evaluate
import train
from short_runs import HIVG, last_weights, read_log, run, same

WORDS = ("red", "green", "blue", "left", "right", "small")


def write_own(folder, images=6):
    """A .jsonl with two expressions for each of a few images -> its path."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(images):
        Image.new("RGB", (40 + number, 30), (40 * number, 90, 120)).save(folder / f"{number}.png")
        for k in range(2):
            lines.append({"image": f"{number}.png", "text": f"the {WORDS[(number + k) % 6]} one",
                          "box": [3 + k, 2, 20 + number, 25],
                          "split": "val" if number == images - 1 else "train"})
    path = folder / "own.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_run_starts_from_the_tuned_weights_of_another(tmp_path, capsys, monkeypatch):
    """All of them, with LoRA merged. evaluate.py rebuilds what came out, and names where it began."""
    rising = iter(range(100))    # so that the last stage has the best weights
    monkeypatch.setattr(train, "scores", lambda ious: {"acc@0.5": next(rising), "mean_iou": 0.0})
    first = run(tmp_path / "first", *HIVG)
    own = write_own(tmp_path / "own")
    second = run(tmp_path / "second", "--method", "hivg", "--dataset", str(own), "--init-from",
                 str(first), "--batch-size", "5", "--stages", "0", "--lr", "0", "--lr-encoder", "0",
                 "--epochs", "1")
    old, _ = evaluate.load_checkpoint(first)
    new, config = evaluate.load_checkpoint(second)
    assert same(old.state_dict(), new.state_dict())    # rates of 0 keep all that was taken over
    merged = [name for name in evaluate.tuned_state(new) if name.endswith("layers.0.q.weight")]
    assert "clip.vision.layers.0.q.weight" in merged
    assert config["args"]["init_from"] == str(first)
    out = tmp_path / "found.json"
    found = evaluate.main([str(second), "--json", str(out), "--device", "cpu", "--workers", "0"])
    assert found["trained_on"] == str(own) and found["init_from"] == str(first)
    assert f"trained on {own} from {first}" in capsys.readouterr().out


def test_a_run_of_another_method_is_no_start(tmp_path, m2ist_run):
    with pytest.raises(data.InputError, match="--init-from.*m2ist.*frozen"):
        run(tmp_path / "x", "--method", "frozen", "--init-from", str(m2ist_run))


def test_predictions_name_what_was_trained_on(tmp_path, m2ist_run):
    path = tmp_path / "boxes.jsonl"
    evaluate.main([str(m2ist_run), "--split", "val", "--limit", "3", "--predictions", str(path),
                   "--device", "cpu"])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["trained_on"] for line in lines] == ["shapes"] * 3


def test_a_warm_up_is_a_tenth_of_its_phase_at_most(tmp_path, capsys):
    """Three steps an epoch, ten epochs: the rate is whole after three steps of 100."""
    out = run(tmp_path / "x", "--warmup", "100", "--epochs", "10", "--schedule", "step",
              "--lr-drop", "50", "--lr", "0.002", "--log-every", "1")
    rates = [line["lr"] for line in read_log(out) if "step" in line]
    assert rates[:4] == pytest.approx([0.002 / 3, 0.004 / 3, 0.002, 0.002])
    assert "its warm-up is 3 steps" in capsys.readouterr().out


def test_a_batch_that_does_not_fit_the_data_and_a_contrast_of_one_are_said(tmp_path, capsys):
    run(tmp_path / "x", "--limit", "5", "--epochs", "1")
    assert "--batch-size is 8, but there are 5 samples" in capsys.readouterr().out
    run(tmp_path / "y", "--limit", "13", "--epochs", "1")
    assert "each epoch leaves out 5 expressions" in capsys.readouterr().out
    run(tmp_path / "z", *HIVG, "--micro-batch", "1", "--limit", "8")
    printed = capsys.readouterr().out
    assert "contrast among one sample is 0" in printed and "leaves out" not in printed


def test_a_loss_that_stands_still_is_said_once(tmp_path, capsys):
    run(tmp_path / "x", "--lr", "0", "--lr-encoder", "0", "--log-every", "1", "--epochs", "20")
    assert capsys.readouterr().out.count("the training loss has not moved") == 1
    run(tmp_path / "y", "--lr", "0.003", "--lr-encoder", "0.003", "--log-every", "1", "--epochs", "20")
    assert "has not moved" not in capsys.readouterr().out


def test_a_full_dev_shm_is_named_before_the_first_epoch(monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(evaluate.os.path, "isdir", lambda path: True)
    monkeypatch.setattr(evaluate.shutil, "disk_usage", lambda path: usage(64 * 2 ** 20))
    evaluate.check_shared_memory(64, 32, 2)    # 2 MB fit
    with pytest.raises(data.InputError, match="--workers 0.*--shm-size"):
        evaluate.check_shared_memory(640, 64, 2)


def test_data_that_moved_is_resumed_and_other_data_is_not(tmp_path):
    own = write_own(tmp_path / "here")
    flags = ["--dataset", str(own), "--batch-size", "5"]
    whole = run(tmp_path / "whole", *flags)
    out = run(tmp_path / "x", *flags, "--epochs", "2")
    shutil.move(tmp_path / "here", tmp_path / "there")
    data.samples_by_split.cache_clear()
    moved = tmp_path / "there" / "own.jsonl"
    train.main(["--out", str(out), "--resume", "--dataset", str(moved), "--epochs", "3"])
    assert len(read_log(out)) == 3 and last_weights(out).keys() == last_weights(whole).keys()

    text = moved.read_text().replace("the red one", "the pink one")
    moved.write_text(text)
    data.samples_by_split.cache_clear()
    with pytest.raises(data.InputError, match="other samples"):
        train.main(["--out", str(out), "--resume", "--dataset", str(moved), "--epochs", "4"])


def test_an_accuracy_of_1_on_four_images_is_reached():
    """README's habit before a long run, with fewer epochs: the loss of twelve expressions falls."""
    args = train.parse_args(["--limit", "12", "--batch-size", "12", "--device", "cpu"])
    samples = data.load_samples("shapes", "train", limit=12)
    assert len({sample.image for sample in samples}) == 4
    torch.manual_seed(0)
    model = train.build_model(**train.model_arguments(args))
    loader = evaluate.make_loader(samples, model, args, train=True)
    optimizer = train.make_optimizer(model, args, train.plan(args)[0])
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    losses = []
    for epoch in range(60):
        loader.dataset.epoch.fill_(epoch)
        loader.batch_sampler.epoch = epoch
        [batch] = loader
        metrics, _ = train.train_step(model.train(), batch, optimizer, scaler, args)
        losses.append(metrics["train_loss"])
    assert losses[-1] < 0.5 * losses[0]


def test_long_texts_are_shortened_in_messages(capsys):
    samples = [data.Sample(5_000_000, "word " * 10_000, (0.0, 0.0, 9.0, 9.0), 5_000_000)]
    train.warn_truncated(samples, data.Tokenizer(20))
    assert len(capsys.readouterr().out) < 300
    assert data.shortened("short") == "'short'"


def test_a_path_of_windows_gets_a_hint(tmp_path):
    sample = data.Sample(tmp_path / "a\\1.jpg", "a cup", (0.0, 0.0, 9.0, 9.0), "a\\1.jpg")
    with pytest.raises(data.InputError, match="write / in place of"):
        data.check_images_exist([sample])
