"""train.py as a user meets it: whole runs, recipes and phases, checkpoints, people's datasets."""
import itertools
import json
import math
import time

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import data
import evaluate
import hilora
import losses
import model as m
import train
from data import InputError
from short_runs import (FAST, HIVG, SPEED, add_dropout, begin_run, computed, inputs_of,
                        last_weights, one_epoch, read_log, run, same, write_refcoco)
from test_data import as_refer, coco

pytestmark = pytest.mark.usefixtures("cpu_with_dropout")


# --- Whole runs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", ["12345678901234567890", "-3"])
def test_any_whole_number_is_a_seed(tmp_path, seed):
    """Seeds of torch have 64 bits; what is derived from a longer one is brought into their range,
    and still differs from the default's."""
    out = run(tmp_path / "a", "--epochs", "1", "--limit", "32", "--seed", seed)
    default = run(tmp_path / "b", "--epochs", "1", "--limit", "32")
    assert read_log(out)[0]["train_loss"] != read_log(default)[0]["train_loss"]


def test_too_little_memory_is_one_line(tmp_path):
    """A model of a terabyte, a GPU that is full, and an array that numpy cannot have: the line has
    the peak and what to try. Other errors stay as they are."""
    with pytest.raises(InputError, match=r"^out of memory; the peak was \d+\.\d GiB .*you tried to "
                                         r"allocate.*: try --micro-batch 4, or --amp bf16$"):
        run(tmp_path / "a", "--bottleneck", "1000000000")
    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), MemoryError()):
        with pytest.raises(InputError, match="out of memory; .*: try less"):
            with train.memory_explained("cpu", "less"):
                raise error
    assert train.half_of("--micro-batch", 9) == "--micro-batch 4, or --amp bf16"
    assert "is 1 already" in train.half_of("--micro-batch", 1)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        with train.memory_explained("cpu", "less"):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_a_run_writes_what_its_docstring_says(m2ist_run):
    """A run leaves five files, and one line of the log for each epoch."""
    assert {path.name for path in m2ist_run.iterdir()} == {
        "args.json", "lock", "log.jsonl", "best.safetensors", "last.pt", "val.png"}
    assert [line["epoch"] for line in read_log(m2ist_run)] == [1, 2, 3]
    assert set(read_log(m2ist_run)[0]) == {
        "epoch", "phase", "lr", "lr_encoder", "train_loss", "l1", "giou", "attention",
        "train_acc@0.5", "grad_norm", "val_acc@0.5", "val_mean_iou", "leaky_pretraining", *SPEED}

    written = json.loads((m2ist_run / "args.json").read_text())
    assert set(written["args"]) == set(train.OPTIONS)
    assert set(written["environment"]) == {"torch", "torchvision", "transformers", "device"}
    assert torch.__version__.startswith(written["environment"]["torch"])
    assert written["environment"]["device"] == "cpu"


def test_evaluate_gives_the_accuracy_of_the_log(m2ist_run, tmp_path, capsys):
    """The best accuracy on val is that of best.safetensors, in batches of any size."""
    best = max(line["val_acc@0.5"] for line in read_log(m2ist_run))
    result = evaluate.main([str(m2ist_run), "--json", str(tmp_path / "r.json"),
                            "--figures", str(tmp_path / "figures")])
    assert f"Acc@0.5 {best:.4f}" in capsys.readouterr().out
    assert result == json.loads((tmp_path / "r.json").read_text())
    assert result["dataset"] == "shapes"
    assert result["method"] == "m2ist"
    assert result["leaky_pretraining"] is False
    assert set(result["splits"]) == {"val", "testA", "testB"}

    val = result["splits"]["val"]
    assert set(val) == {"acc@0.5", "mean_iou", "expressions", "images", "seconds"}
    assert val["acc@0.5"] == best
    assert val["expressions"] == 28
    assert val["images"] == 10
    figures = {path.name for path in (tmp_path / "figures").iterdir()}
    assert figures == {"val.png", "testA.png", "testB.png"}

    checkpoint = str(m2ist_run / "best.safetensors")
    one_by_one = evaluate.main([checkpoint, "--split", "val", "--batch-size", "1"])
    assert list(one_by_one["splits"]) == ["val"]
    assert one_by_one["splits"]["val"]["acc@0.5"] == best


def test_one_seed_gives_one_log_and_another_seed_another(tmp_path, m2ist_run):
    """All that is random in a run depends on --seed."""
    again = run(tmp_path / "a")
    other = run(tmp_path / "b", "--seed", "1")
    assert computed(again) == computed(m2ist_run)
    assert computed(other) != computed(m2ist_run)
    assert same(last_weights(again), last_weights(m2ist_run))
    assert not same(last_weights(other), last_weights(m2ist_run))


class Counted:
    """A stand-in for a function or class that counts its calls."""

    def __init__(self, real):
        self.real = real
        self.calls = 0

    def __call__(self, *args, **options):
        self.calls += 1
        return self.real(*args, **options)


def test_a_run_builds_one_model_and_three_loaders(tmp_path, monkeypatch):
    """One model; one loader for train, one for val, one for val.png; nothing is thrown away."""
    build_model = Counted(train.build_model)
    loader = Counted(train.DataLoader)
    monkeypatch.setattr(train, "build_model", build_model)
    monkeypatch.setattr(train, "DataLoader", loader)
    run(tmp_path / "a", *SHORT_HIVG)
    assert build_model.calls == 1
    assert loader.calls == 3


def test_a_run_begins_with_its_recipe_and_with_what_it_trains(tmp_path, capsys):
    """The resolved options come first, a line for each group, then the data and the counts."""
    run(tmp_path / "a", *SHORT_HIVG)
    lines = capsys.readouterr().out.splitlines()
    groups = [line.partition(":")[0] for line in lines[:7]]
    assert groups == ["run", "data", "weights", "training", "HiVG", "losses", "machine"]
    assert "method hivg, dataset shapes, size tiny" in lines[0]
    assert "lr 0.002" in lines[3]
    assert "stages 2, rank 4, alpha 16.0" in lines[4]
    assert "M²IST" not in "".join(lines[:7])    # no option of this group is for hivg

    assert lines[7].startswith("hivg tiny on shapes: 32 expressions to train on (0 left out")
    assert lines[8].startswith("parameters {'total': ")
    assert [line.split(" trains ")[0] for line in lines if " trains " in line] == [
        "warm-up", "stage 1", "stage 2"]


def without_dropout(count, *flags):
    """Options, a new model and a loader of the first samples, with no random number in a step."""
    args = train.parse_args([*FAST, *flags])
    torch.manual_seed(0)
    model = m.build_model(**train.model_arguments(args))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    samples = data.load_samples("shapes", "train", limit=count)
    return args, model, train.make_loader(samples, model, args, train=True)


def test_the_loss_and_the_accuracy_of_the_log_are_means_over_the_samples(monkeypatch, tmp_path):
    """The loss of a micro-batch counts by its share, and an IoU of one half is right."""
    args, model, loader = without_dropout(10, "--batch-size", "10", "--micro-batch", "4")
    train.set_epoch(loader, 1)
    batch = next(iter(loader))
    found = model(**inputs_of(batch), attention=True)
    expected = losses.total_loss(found, batch["boxes"], args.l1, args.giou,
                                 attention=args.attention_loss).item()

    real = losses.iou_and_giou

    def chosen_ious(pred, target):
        _, giou = real(pred, target)
        return torch.tensor([0.5, 0.49, 0.8, 0.0])[:len(pred)], giou

    monkeypatch.setattr(losses, "iou_and_giou", chosen_ious)
    train.set_epoch(loader, 1)
    line = one_epoch(*begin_run(model, args, tmp_path), loader)
    assert line["train_loss"] == pytest.approx(expected, rel=1e-5)
    parts = line["l1"] + line["giou"] + line["attention"]
    assert parts == pytest.approx(expected, rel=1e-5)
    # Micro-batches of 4, 4 and 2 samples have 2, 2 and 1 with an IoU of 0.5 or more.
    assert line["train_acc@0.5"] == pytest.approx(5 / 10)


def test_a_step_has_the_gradient_of_its_own_batch_alone(tmp_path):
    """At a rate of 0, the gradients after an epoch are those of its last batch."""
    args, model, loader = without_dropout(8, "--batch-size", "4", "--lr", "0", "--lr-encoder", "0")
    under_way, phase = begin_run(model, args, tmp_path)

    train.set_epoch(loader, 1)
    _, last = list(loader)
    found = model(**inputs_of(last), attention=True)
    sum(train.weighted_losses(found, last["boxes"], args).values()).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    train.set_epoch(loader, 1)
    one_epoch(under_way, phase, loader)
    for name, gradient in expected.items():
        assert torch.allclose(model.get_parameter(name).grad, gradient, atol=1e-6), name


def test_micro_batches_add_up_to_the_batch():
    """Gradients of micro-batches of 5, 5 and 2 samples sum to those of the batch of 12, as M²IST's
    loss is a mean."""
    gradients = []
    for micro in ("12", "5"):
        args, model, loader = without_dropout(12, "--batch-size", "12", "--micro-batch", micro)
        optimizer = train.make_optimizer(model, args, train.plan(args)[0])
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        train.set_epoch(loader, 1)
        train.train_step(model, next(iter(loader)), optimizer, scaler, args)
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    whole, parts = gradients
    for name in whole:
        assert torch.allclose(whole[name], parts[name], rtol=1e-3, atol=1e-6), name


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    """The message names the epoch, the step and the samples, and last.pt if there is one."""
    def no_number(pred, *_, **__):
        return pred.sum() * float("nan"), pred.sum()

    out = run(tmp_path / "b", "--epochs", "1")
    monkeypatch.setattr(losses, "box_terms", no_number)
    with pytest.raises(InputError, match=r"train_loss is nan at epoch 1, step 1, samples \[\d+, .*"
                                         r"--lr, with --clip-norm 1, or with --amp off$"):
        run(tmp_path / "a")
    assert not (tmp_path / "a" / "last.pt").exists()

    saved = json.loads((out / "args.json").read_text())
    saved["args"]["epochs"] = 2    # one more epoch, which will fail
    (out / "args.json").write_text(json.dumps(saved))
    with pytest.raises(InputError, match="at epoch 2, step 1, .*last.pt holds what came before"):
        train.main(["--out", str(out), "--resume"])


def break_gradients(model, when):
    """From now on a gradient of the model is infinite in each backward pass of which `when` says
    so. when: a function of the number of the pass, from 1."""
    passes = 0

    def hook(gradient):
        nonlocal passes
        passes += 1
        if when(passes):
            return gradient * float("inf")
        return gradient

    next(p for p in model.parameters() if p.requires_grad).register_hook(hook)


def test_gradients_that_are_not_finite_stop_the_run_before_anything_is_written(tmp_path,
                                                                              monkeypatch):
    """In the last step of an epoch, too: no weight, no checkpoint and no log has seen them."""
    real = m.build_model

    def broken(*names, **options):
        model = real(*names, **options)
        break_gradients(model, when=lambda number: number == 6)    # the last step of epoch 2
        return model

    with monkeypatch.context() as patch:
        patch.setattr(train, "build_model", broken)
        with pytest.raises(InputError, match="grad_norm is (inf|nan) at epoch 2, step 3, samples"):
            run(tmp_path / "a")
    assert [line["epoch"] for line in read_log(tmp_path / "a")] == [1]
    for value in last_weights(tmp_path / "a").values():
        assert value.isfinite().all()
    train.main(["--out", str(tmp_path / "a"), "--resume"])    # and the run goes on from there


def test_fp16_skips_steps_that_overflow_and_counts_them(tmp_path, monkeypatch):
    """A skipped step changes no weight; the norm in the log is that of the other steps."""
    args, model, loader = without_dropout(12, "--batch-size", "4", "--amp", "fp16",
                                          "--attention-loss", "0")
    break_gradients(model, when=lambda number: number != 2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    under_way, phase = begin_run(model, args, tmp_path)
    line = one_epoch(under_way, phase, loader)
    assert line["skipped_steps"] == 2
    assert math.isfinite(line["grad_norm"])
    assert under_way.scaler.get_scale() == 2.0 ** 16 / 4    # halved by each overflow
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.isfinite().all() for p in model.parameters())
    steps = {int(state["step"]) for state in under_way.optimizer.state.values()}
    assert steps == {1}


def test_weights_that_are_not_finite_are_never_written(tmp_path):
    """last.pt stays as it was, and the message names the weight."""
    args = train.parse_args(FAST)
    model = m.build_model(**train.model_arguments(args))
    under_way, _ = begin_run(model, args, tmp_path)
    under_way.progress.epoch = 5
    model.grounding.reg.data[0, 3] = float("nan")
    with pytest.raises(InputError, match="grounding.reg is not finite after epoch 5: .*--lr"):
        train.save_last(under_way)
    assert list(tmp_path.iterdir()) == []


def gradient_norm(model):
    """The norm of all gradients of a model, written out."""
    squares = [p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]
    return math.sqrt(sum(squares))


def test_the_norm_of_the_gradients_is_logged_and_clipped_if_asked_for():
    """--clip-norm scales all gradients down to the norm; without it they stay as they are."""
    norms = {}
    for clip in ("0", "0.01"):
        args, model, loader = without_dropout(4, "--batch-size", "4", "--clip-norm", clip)
        optimizer = train.make_optimizer(model, args, train.plan(args)[0])
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        train.set_epoch(loader, 1)
        values, updated = train.train_step(model, next(iter(loader)), optimizer, scaler, args)
        assert updated
        norms[clip] = (values["grad_norm"], gradient_norm(model))
    logged, whole = norms["0"]
    assert logged == pytest.approx(whole, rel=1e-5)
    assert whole > 0.1
    logged_again, clipped = norms["0.01"]
    assert logged_again == pytest.approx(logged, rel=1e-5)    # the norm before it was clipped
    assert clipped == pytest.approx(0.01, rel=1e-3)


def test_the_log_has_a_line_each_log_every_steps(tmp_path):
    """Means over the steps since the last line, with the rates and the speed."""
    out = run(tmp_path / "a", "--epochs", "2", "--log-every", "2", "--schedule", "step")
    log = read_log(out)
    assert [(line["epoch"], line.get("step")) for line in log] == [
        (1, 2), (1, None), (2, 2), (2, None)]
    first, whole = log[0], log[1]
    assert set(first) == {
        "epoch", "phase", "step", "lr", "lr_encoder", "train_loss", "l1", "giou", "attention",
        "train_acc@0.5", "grad_norm", *SPEED}
    parts = first["l1"] + first["giou"] + first["attention"]
    assert parts == pytest.approx(first["train_loss"], rel=1e-5)
    assert first["lr"] == first["lr_encoder"] == 1e-3
    assert first["seconds"] > 0
    assert first["samples_per_second"] == pytest.approx(16 / first["seconds"])
    assert first["peak_bytes"] > 2 ** 20
    assert whole["samples_per_second"] == pytest.approx(24 / whole["seconds"])

    # Each line of the log can be read while the run goes on, and none is there twice after a
    # resume.
    saved = json.loads((out / "args.json").read_text())
    saved["args"]["epochs"] = 3
    (out / "args.json").write_text(json.dumps(saved))
    train.main(["--out", str(out), "--resume", "--log-every", "1"])
    assert [(line["epoch"], line.get("step")) for line in read_log(out)[4:]] == [
        (3, 1), (3, 2), (3, 3), (3, None)]


def test_the_log_says_how_long_the_loop_waited_for_data(tmp_path, monkeypatch):
    """Three batches that take a tenth of a second each to load are waited for so long."""
    real = data.GroundingDataset.__getitems__

    def slow(dataset, indices):
        if dataset.train:
            time.sleep(0.1)
        return real(dataset, indices)

    monkeypatch.setattr(data.GroundingDataset, "__getitems__", slow)
    line, = read_log(run(tmp_path / "a", "--epochs", "1"))
    assert 0.3 <= line["seconds_waiting_for_data"] < line["seconds"]


def test_a_redirected_log_has_lines_and_no_bars(tmp_path, capsys):
    """A file gets a line each --log-every steps and each epoch; a terminal gets a bar instead."""
    run(tmp_path / "a", "--epochs", "2", "--log-every", "2")
    said = capsys.readouterr()
    assert "step/s" not in said.err
    steps = [line for line in said.out.splitlines() if line.startswith("epoch ")]
    assert ["step 2 " in line for line in steps] == [True, False, True, False]


def test_val_is_evaluated_in_micro_batches(tmp_path, monkeypatch):
    """What fits on the device in training fits in evaluation, too."""
    sizes = set()
    real = m.DetrBert.forward

    def watched(model, images, image_padding, tokens, *inputs, **options):
        sizes.add((model.training, len(tokens)))
        return real(model, images, image_padding, tokens, *inputs, **options)

    monkeypatch.setattr(m.DetrBert, "forward", watched)
    out = run(tmp_path / "a", "--epochs", "1", "--micro-batch", "4")
    assert {size for training, size in sizes if training} == {4}
    assert {size for training, size in sizes if not training} == {4, 1}    # 1: val.png
    whole = evaluate.main([str(out), "--split", "val", "--batch-size", "28", "--device", "cpu"])
    assert read_log(out)[0]["val_mean_iou"] == pytest.approx(
        whole["splits"]["val"]["mean_iou"], abs=1e-5)


def test_full_size_with_random_weights_on_the_cpu(tmp_path):
    """One's own pictures at 640 pixels, with both encoders whole; the checkpoint evaluates."""
    lines = []
    for split in ("train", "val"):
        for sample in data.load_samples("shapes", split, limit=2):
            name = f"{split}-{len(lines)}.png"
            data.render(sample.image).save(tmp_path / name)
            lines.append(json.dumps({"image": name, "text": sample.text, "box": sample.box,
                                     "split": split}))
    (tmp_path / "my.jsonl").write_text("\n".join(lines))
    out = tmp_path / "out"
    train.main(["--method", "m2ist", "--dataset", str(tmp_path / "my.jsonl"), "--size", "base",
                "--weights", "random", "--batch-size", "2", "--limit", "2", "--epochs", "1",
                "--device", "cpu", "--out", str(out)])
    result = evaluate.main([str(out), "--device", "cpu"])
    assert result["splits"]["val"]["expressions"] == 2
    # 11.4M tuned parameters of 152M.
    assert (out / "best.safetensors").stat().st_size < 50e6


# --- Whole runs of CLIP ---------------------------------------------------------------------------


def test_a_run_of_hivg_logs_its_phases(hivg_run):
    """A warm-up without LoRA, then the stages; each rate falls to zero on a cosine."""
    log = read_log(hivg_run)
    assert [(line["epoch"], line["phase"]) for line in log] == [
        (1, "warm-up"), (2, "warm-up"), (3, "stage 1"), (4, "stage 1"), (5, "stage 2"),
        (6, "stage 2")]

    # Otherwise no epoch would be worse than the one before, and the resumed runs of
    # test_resume.py would prove less.
    accuracies = [line["val_acc@0.5"] for line in log]
    assert accuracies != sorted(accuracies)

    # An epoch has 3 steps, a phase 6. The log has the rate of an epoch's last step.
    peaks = [2e-3, 2e-3, 1.5e-3, 1.5e-3, 1e-3, 1e-3]
    steps = [2, 5, 2, 5, 2, 5]
    for line, peak, step in zip(log, peaks, steps, strict=True):
        assert line["lr"] == pytest.approx(peak * (1 - step / 6))


def test_a_checkpoint_of_hivg_has_no_pair(hivg_run):
    """The pairs are merged, also at the end of the run, which ends with its best weights."""
    best = load_file(hivg_run / "best.safetensors")
    last = last_weights(hivg_run)
    for name in [*best, *last]:
        assert not name.endswith((".A", ".B"))
    for name, value in best.items():
        assert torch.equal(value, last[name])

    loaded, _ = evaluate.load_checkpoint(hivg_run)
    plain = m.build_model("hivg", "tiny", "random")
    assert m.count_parameters(loaded) == m.count_parameters(plain)
    assert set(loaded.state_dict()) == set(plain.state_dict())


def test_a_checkpoint_of_hivg_changes_the_linears_of_its_stages_alone(hivg_run):
    """Of CLIP, q, k, v and out of the layers that the stages up to the best one trained."""
    loaded, config = evaluate.load_checkpoint(hivg_run)
    plain = m.build_model("hivg", "tiny", "random")
    changed = set()
    for name, p in plain.named_parameters():
        if not p.requires_grad and not torch.equal(p, loaded.state_dict()[name]):
            changed.add(name)

    # Six vision layers in two groups; the text tower is one group.
    trained = {"warm-up": (0, 0), "stage 1": (3, 3), "stage 2": (6, 3)}
    vision_layers, text_layers = trained[config["phase"]]
    expected = set()
    for linear in ("q", "k", "v", "out"):
        for layer in range(vision_layers):
            expected.add(f"clip.vision.layers.{layer}.{linear}.weight")
        for layer in range(text_layers):
            expected.add(f"clip.text.layers.{layer}.{linear}.weight")
    assert changed == expected


def test_a_stage_that_ends_worse_keeps_the_weights_it_began_with_and_says_so(tmp_path, monkeypatch,
                                                                            capsys):
    """[D33] Stage 2 is worse on val than stage 1 was, so all that stage 2 changed is undone."""
    accuracies = iter([0.5, 0.6, 0.7, 0.4, 0.3, 0.2])    # the best is epoch 3, in stage 1

    def scores(ious):
        return {"acc@0.5": next(accuracies), "mean_iou": 0.0}

    monkeypatch.setattr(train, "scores", scores)
    real = train.end_phase
    states = []    # of the model at the end of each phase

    def watched(model, *rest):
        real(model, *rest)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        states.append(state)

    monkeypatch.setattr(train, "end_phase", watched)
    out = run(tmp_path / "a", *HIVG)

    printed = capsys.readouterr().out
    assert "stage 2 ends worse on val (0.3000 at best) than it began (0.7000)" in printed
    assert "stage 1 ends worse" not in printed
    assert "warm-up ends worse" not in printed

    best, config = evaluate.load_checkpoint(out)
    assert config["epoch"] == 3
    assert config["phase"] == "stage 1"
    after_warm_up, after_stage_1, after_stage_2 = states
    assert not same(after_warm_up, after_stage_1)
    assert same(after_stage_1, after_stage_2)
    assert same(after_stage_2, best.state_dict())


SHORT_HIVG = [*HIVG, "--epochs", "1", "--stage-epochs", "1", "--limit", "32"]


def let_every_epoch_be_better(patch):
    """On val, so that no phase of a short run is undone because it ends worse than it began."""
    epochs = itertools.count(1)

    def scores(ious):
        return {"acc@0.5": next(epochs) / 100, "mean_iou": 0.0}

    patch.setattr(train, "scores", scores)


@pytest.fixture(scope="module")
def short_hivg_run(tmp_path_factory):
    """A run of hivg with one epoch for each phase."""
    with pytest.MonkeyPatch.context() as patch:
        add_dropout(patch)
        let_every_epoch_be_better(patch)
        return run(tmp_path_factory.mktemp("short") / "hivg", *SHORT_HIVG)


@pytest.mark.parametrize("flags", [
    ["--row", "hivg/5/8"],    # stages from the deepest layers on
    ["--stages", "1"],
    ["--stages", "4", "--stage-lr", "1e-3"],
    ["--rank", "2"],
    ["--alpha", "64"],
    ["--bridge-layers"],
    ["--bridge-layers", "1", "6"],
    ["--vision-layers", "3", "6"],
    ["--text-layers", "3"],
    ["--contrast", "0"],
    ["--focal", "0", "--dice", "0"],
])
def test_every_switch_of_hivg_trains_and_makes_a_difference(tmp_path, short_hivg_run, flags,
                                                            monkeypatch):
    """A run with the switch ends, and with other weights than a run without."""
    let_every_epoch_be_better(monkeypatch)
    out = run(tmp_path / "a", *SHORT_HIVG, *flags)
    assert not same(last_weights(out), last_weights(short_hivg_run))
    assert (out / "best.safetensors").exists()


@pytest.mark.parametrize("method, flags, phases", [
    ("clip-frozen", [], ["training"]),
    ("clip-lora", ["--stage-epochs", "1"], ["warm-up", "stage 1"]),
])
def test_plain_clip_trains_and_evaluates(tmp_path, method, flags, phases):
    """HiVG Fig. 4 (d): CLIP as it is, and CLIP with vanilla LoRA."""
    out = run(tmp_path / "a", "--method", method, "--epochs", "1", *flags)
    log = read_log(out)
    assert [line["phase"] for line in log] == phases
    result = evaluate.main([str(out), "--split", "val"])
    assert result["method"] == method
    assert result["splits"]["val"]["acc@0.5"] == max(line["val_acc@0.5"] for line in log)


def test_the_attention_loss_trains_where_reg_looks():
    """[D49] With its weight alone, a step changes the queries and keys of the last layer, and makes
    the share of [REG]'s attention in the box larger."""
    args, model, loader = without_dropout(8, "--batch-size", "8", "--l1", "0", "--giou", "0",
                                          "--attention-loss", "1", "--lr", "1e-3")
    train.set_epoch(loader, 1)
    batch = next(iter(loader))
    optimizer = train.make_optimizer(model, args, train.plan(args)[0])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    losses_of_steps = []
    for _ in range(5):
        values, _ = train.train_step(model, batch, optimizer, scaler, args)
        losses_of_steps.append(values["attention"])
    assert losses_of_steps == sorted(losses_of_steps, reverse=True)
    for name in ("q", "k"):
        full = f"grounding.layers.{len(model.grounding.layers) - 1}.{name}.weight"
        assert not torch.equal(model.get_parameter(full), before[full])


def test_test_writes_what_evaluate_finds(tmp_path):
    """test.json holds the accuracy of the best weights on every split but train and val."""
    out = run(tmp_path / "a", "--test", "--epochs", "1")
    found = json.loads((out / "test.json").read_text())
    evaluate.main([str(out), "--split", "testA", "--split", "testB", "--json", str(tmp_path / "e")])
    expected = json.loads((tmp_path / "e").read_text())["splits"]
    assert list(found) == ["testA", "testB"]
    for split, row in found.items():
        for name in ("acc@0.5", "mean_iou"):
            assert row[name] == pytest.approx(expected[split][name], rel=1e-5)


def test_test_without_a_test_split_is_refused_before_training(tmp_path):
    """A file with train and val alone, and a test picture that is missing."""
    picture = tmp_path / "p.png"
    Image.new("RGB", (64, 64)).save(picture)
    row = {"image": str(picture), "text": "the thing", "box": [3, 4, 30, 40]}
    lines = [{**row, "split": "train"}, {**row, "split": "val"}]
    (tmp_path / "two.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    lines.append({**row, "image": "nowhere.png", "split": "test"})
    (tmp_path / "three.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    flags = ["--size", "tiny", "--device", "cpu", "--test", "--out", str(tmp_path / "out")]
    with pytest.raises(InputError, match="--test: .*two.jsonl has no split but train and val"):
        train.main([*flags, "--dataset", str(tmp_path / "two.jsonl")])
    with pytest.raises(InputError, match="nowhere.png"):
        train.main([*flags, "--dataset", str(tmp_path / "three.jsonl")])
    assert not (tmp_path / "out").exists()


# --- Recipes and schedules ------------------------------------------------------------------------

BASE = ["--size", "base", "--dataset", "x.jsonl"]


def test_the_recipe_of_m2ist_is_that_of_section_iv_b():
    """90 epochs in batches of 64, rates of 1e-4 and 1e-5 [D12], a tenth after 60 epochs."""
    args = train.parse_args(BASE)
    assert args.method == "m2ist"
    assert args.epochs == 90
    assert args.batch_size == 64
    assert args.lr == 1e-4
    assert args.lr_encoder == 1e-5
    assert args.weight_decay == 1e-4
    assert (args.l1, args.giou) == (1, 1)
    assert (args.contrast, args.focal, args.dice) == (0, 0, 0)

    factors = [train.rate_factor(args, epoch * 10, 10, 90) for epoch in (0, 59, 60, 89)]
    assert factors == [1, 1, 0.1, 0.1]
    assert train.rate_factor(args, 599, 10, 90) == 1    # the last step before the drop

    warm = train.parse_args([*BASE, "--warmup", "10"])
    assert [train.rate_factor(warm, step, 10, 90) for step in (4, 9, 600)] == [0.5, 1, 0.1]

    plus = train.parse_args(["--size", "base", "--dataset", "refcoco+"])
    assert (plus.epochs, plus.lr_drop) == (180, 120)


def test_the_default_run_is_m2ist_on_shapes():
    """`python train.py` alone: 1,500 steps, a warm-up of 100, a rate that falls to zero, more weight
    decay than at full size, and the attention loss [D49]."""
    args = train.parse_args([])
    assert (args.method, args.dataset, args.size) == ("m2ist", "shapes", "tiny")
    assert args.weights == "shapes"
    assert args.workers == 0
    assert args.out == "runs/shapes-m2ist-0"
    assert args.epochs * (24_000 // args.batch_size) == 1500
    assert args.weight_decay == 0.1
    assert args.attention_loss == 0.3
    assert train.parse_args(BASE).attention_loss == 0
    assert train.rate_factor(args, 0, 750, 2) == pytest.approx(1 / 100)
    assert train.rate_factor(args, 750, 750, 2) == pytest.approx(0.5)
    assert train.rate_factor(args, 1499, 750, 2) == pytest.approx(1 / 1500)


def test_the_cosine_falls_to_zero():
    """It is one half in the middle of the phase."""
    args = train.parse_args(["--schedule", "cosine"])
    assert train.rate_factor(args, 1500, 750, 4) == pytest.approx(0.5)
    assert train.rate_factor(args, 2999, 750, 4) < 1e-5


def test_the_defaults_depend_on_dataset_and_size():
    """Other datasets take size base, pretrained weights, and two workers."""
    args = train.parse_args(["--dataset", "refcoco"])
    assert (args.size, args.weights, args.workers) == ("base", "pretrained", 2)
    tiny = train.parse_args(["--dataset", "refcoco", "--size", "tiny"])
    assert tiny.weights == "shapes"
    full = train.parse_args(["--method", "full"])
    assert (full.lr, full.lr_encoder) == (1e-3, 1e-4)


def test_the_optimizer_has_two_groups_with_all_that_is_tuned():
    """The grounding encoder has one rate, and the adapters have the other."""
    args = train.parse_args(BASE)
    model = m.build_model("m2ist", "tiny", "random")
    optimizer = train.make_optimizer(model, args, train.plan(args)[0])
    head, rest = optimizer.param_groups
    assert (head["lr"], rest["lr"]) == (1e-4, 1e-5)
    assert (head["weight_decay"], rest["weight_decay"]) == (1e-4, 1e-4)

    assert {id(p) for p in head["params"]} == {id(p) for p in model.grounding.parameters()}
    assert {id(p) for p in rest["params"]} == {id(p) for p in model.adapters.parameters()}
    in_groups = sorted(id(p) for group in (head, rest) for p in group["params"])
    tuned = sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert in_groups == tuned


def phases(*flags):
    """(name, stage, epochs before, epochs at its end, both rates) of each phase."""
    rows = []
    for phase in train.plan(train.parse_args(flags)):
        assert phase.lr == phase.lr_encoder    # HiVG has one rate
        rows.append((phase.name, phase.stage, phase.first, phase.last, phase.lr))
    return rows


def test_phases_of_hivg_b_follow_section_4_1_and_table_8():
    """A warm-up of 50 epochs, then three stages with 20 epochs each."""
    assert phases("--method", "hivg", *BASE) == [
        ("warm-up", 0, 0, 50, 2.5e-4),
        ("stage 1", 1, 50, 70, 1e-4),
        ("stage 2", 2, 70, 90, 0.5e-4),
        ("stage 3", 3, 90, 110, 0.25e-4)]
    args = train.parse_args(["--method", "hivg", *BASE])
    assert args.batch_size == 80
    assert (args.l1, args.giou, args.contrast, args.focal, args.dice) == (2, 2, 1, 20, 2)
    assert (args.rank, args.alpha, args.weight_decay) == (32, 16, 1e-4)
    # Every phase has a cosine of its own, from its own rate to zero.
    assert train.rate_factor(args, 0, 10, 20) == 1
    assert train.rate_factor(args, 100, 10, 20) == pytest.approx(0.5)


def test_phases_of_hivg_l_follow_table_8():
    """A warm-up of 50 epochs, then four stages with 15 epochs each."""
    large = ["--method", "hivg", "--size", "large", "--dataset", "x.jsonl"]
    assert phases(*large) == [
        ("warm-up", 0, 0, 50, 2.5e-4),
        ("stage 1", 1, 50, 65, 1e-4),
        ("stage 2", 2, 65, 80, 0.75e-4),
        ("stage 3", 3, 80, 95, 0.5e-4),
        ("stage 4", 4, 95, 110, 0.25e-4)]
    assert train.parse_args(large).batch_size == 32


def test_further_stages_take_the_last_rate():
    """Four stages of HiVG-B have three rates."""
    rows = phases("--method", "hivg", *BASE, "--stages", "4")
    assert [lr for *_, lr in rows] == [2.5e-4, 1e-4, 0.5e-4, 0.25e-4, 0.25e-4]


def test_stages_without_epochs_of_their_own_share_those_of_the_run():
    """--stage-epochs 0: no warm-up, and each stage has its share of --epochs."""
    flags = ["--method", "hivg", *BASE, "--stage-epochs", "0"]
    rows = phases(*flags, "--epochs", "48")
    assert [row[:4] for row in rows] == [
        ("stage 1", 1, 0, 16), ("stage 2", 2, 16, 32), ("stage 3", 3, 32, 48)]
    with pytest.raises(InputError, match="--epochs is 50, which --stages 3 cannot share"):
        phases(*flags, "--epochs", "50")


def test_plain_clip_trains_as_long_as_hivg():
    """The runs of Fig. 4 (d) can be compared: all have as many epochs, on the box loss [D35]."""
    assert [row[:4] for row in phases("--method", "clip-lora", *BASE)] == [
        ("warm-up", 0, 0, 50), ("stage 1", 1, 50, 110)]
    args = train.parse_args(["--method", "clip-lora", *BASE])
    assert (args.contrast, args.focal, args.dice) == (0, 0, 0)
    for method in ("hivg", "clip-lora", "clip-frozen"):
        assert phases("--method", method)[-1][3] == 5


def test_the_schedule_counts_the_steps_of_a_phase(monkeypatch, tmp_path):
    """In the second epoch of a phase that began after 2 epochs, the first step is step 3 of 6."""
    args = train.parse_args([*FAST, *HIVG])
    model = m.build_model(**train.model_arguments(args))
    under_way, phase = begin_run(model, args, tmp_path, number=1)
    assert (phase.first, phase.last) == (2, 4)
    under_way.progress.epoch = 3
    samples = data.load_samples("shapes", "train", limit=28)
    loader = train.make_loader(samples, model, args, train=True)
    asked = []

    def watched(args, step, steps, epochs):
        asked.append((step, steps, epochs))
        return 0.5

    monkeypatch.setattr(train, "rate_factor", watched)
    one_epoch(under_way, phase, loader)
    assert asked == [(3, 3, 2), (4, 3, 2), (5, 3, 2)]
    assert [group["lr"] for group in under_way.optimizer.param_groups] == [7.5e-4, 7.5e-4]    # half of 1.5e-3


def test_accuracy_counts_an_iou_of_one_half_as_right():
    """Acc@0.5 is the share of samples with IoU >= 0.5."""
    reached = train.scores(torch.tensor([0.5, 0.49, 0.9, 0.0]))
    assert reached["acc@0.5"] == 0.5
    assert reached["mean_iou"] == pytest.approx((0.5 + 0.49 + 0.9) / 4)


def test_predictions_are_cut_off_at_the_square_before_their_iou():
    """The metric clamps a prediction as both released codes do; the true box stays as it is."""
    truths = torch.tensor([[0.1, 0.5, 0.2, 0.2]])
    boxes = torch.tensor([[0.0, 0.5, 0.4, 0.2]])    # half of it lies outside; the rest is right
    assert train.measured_ious(boxes, truths).item() == pytest.approx(1)
    whole, _ = losses.iou_and_giou(boxes, truths)
    assert whole.item() == pytest.approx(0.5)


def test_predict_cuts_predictions_off():
    """A model whose boxes reach out of the square is measured by their part inside."""
    args, model, loader = without_dropout(8, "--batch-size", "8")

    def outside(**_):
        x1, y1, x2, y2 = losses.to_corners(truths).unbind(-1)
        # The box goes on to the left, beyond the border, by as much as there is inside of it.
        return m.Grounding(torch.stack([x2 - x2, (y1 + y2) / 2, 2 * x2, y2 - y1], dim=-1))

    # Every true box begins at the left border.
    loader.dataset.samples = [sample._replace(box=(0.0, *sample.box[1:]))
                              for sample in loader.dataset.samples]
    loader.dataset.train = False    # so that the picture is not moved
    truths = next(iter(loader))["boxes"]
    model.forward = outside
    train.set_epoch(loader, 0)      # the order of `truths`
    predictions = train.predict(model, loader, args)
    assert torch.allclose(predictions.ious, torch.ones(8), atol=1e-5)


def test_mixed_precision_is_off_unless_asked_for():
    """--amp bf16 computes in bfloat16, --amp off in float32."""
    x = torch.ones(2, 2)
    for amp, dtype in (("off", torch.float32), ("bf16", torch.bfloat16)):
        args = train.parse_args([*FAST, "--amp", amp])
        with train.autocast(args):
            assert (x @ x).dtype == dtype


# --- Phases ---------------------------------------------------------------------------------------


def begin(method, number, capsys, *flags):
    """Begin the phase with this number, from 0 -> (model, what was printed)."""
    args = train.parse_args([*FAST, "--method", method, *flags])
    model = m.build_model(**train.model_arguments(args))
    capsys.readouterr()
    train.begin_phase(model, train.plan(args)[number], args)
    return model, capsys.readouterr().out


def test_a_phase_begins_by_saying_what_it_trains(capsys):
    """m2ist trains its adapters and the grounding encoder."""
    model, printed = begin("m2ist", 0, capsys)
    head = sum(p.numel() for p in model.grounding.parameters())
    adapters = sum(p.numel() for p in model.adapters.parameters())
    assert printed == (f"training trains {head:,} grounding encoder and box head; "
                       f"{adapters:,} adapters\n")


def test_a_stage_of_hivg_begins_by_saying_what_it_trains(capsys):
    """Stage 2 of 3 has pairs in vision layers 1-4 of six, and in all text layers [D34]."""
    model, printed = begin("hivg", 2, capsys)
    assert printed.startswith("stage 2 trains ")
    pair = 32 * (64 + 64)    # A (r, k) and B (d, r) of one linear
    assert f"{4 * 4 * pair:,} LoRA pairs on q/k/v/out of vision layers 1 2 3 4;" in printed
    assert f"{3 * 4 * pair:,} LoRA pairs on q/k/v/out of text layers 1 2 3;" in printed
    bridges = 0
    for layer in (2, 4, 6):
        bridge = model.clip.vision.layers[layer - 1].plugs["attention"]
        bridges += sum(p.numel() for p in bridge.parameters())
    assert f"{bridges:,} cross-modal bridges at vision layers 2 4 6" in printed

    groups = printed.removeprefix("stage 2 trains ").split("; ")
    counts = [int(group.split()[0].replace(",", "")) for group in groups]
    assert sum(counts) == m.count_parameters(model)["trainable"]


def test_a_warm_up_has_no_pairs(capsys):
    """HiVG's warm-up trains the bridges and the grounding encoder [D27]."""
    model, printed = begin("hivg", 0, capsys)
    assert "LoRA" not in printed
    assert "cross-modal bridges" in printed
    assert hilora.find_pairs(model) == []


def test_a_stage_draws_its_pairs_from_the_seed_and_the_stage(capsys):
    """The start of A is the same whenever a stage begins, and differs between stages."""
    def drawn(number, *flags):
        model, _ = begin("hivg", number, capsys, *flags)
        return hilora.find_pairs(model.clip.text)[0].pair.A

    first = drawn(1)
    torch.randn(7)    # random numbers that are drawn in between change nothing
    assert torch.equal(drawn(1), first)
    assert not torch.equal(drawn(2), first)
    assert not torch.equal(drawn(1, "--seed", "1"), first)


# --- Checkpoints ----------------------------------------------------------------------------------

CHECKPOINT = [*FAST, "--method", "m2ist", "--bottleneck", "4"]


@pytest.fixture
def small_model():
    """A model of m2ist with a small bottleneck, and the options of its run."""
    torch.manual_seed(1)
    args = train.parse_args(CHECKPOINT)
    return m.build_model(**train.model_arguments(args)).eval(), args


def test_a_checkpoint_holds_the_tuned_weights_alone_and_rebuilds_the_model(tmp_path, small_model):
    """The frozen encoders come from where they came from in training."""
    model, args = small_model
    path = save_best(model, args, tmp_path)
    tuned = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(load_file(path)) == tuned

    loaded, config = evaluate.load_checkpoint(tmp_path)
    assert not loaded.training
    assert config["model"] == train.model_arguments(args)
    assert config["epoch"] == 1
    images = torch.randn(2, 3, 64, 64)
    image_padding = torch.zeros(2, 64, 64, dtype=torch.bool)
    tokens = torch.ones(2, 5, dtype=torch.long)
    token_padding = torch.zeros(2, 5, dtype=torch.bool)
    batch = (images, image_padding, tokens, token_padding)
    assert torch.equal(loaded(*batch).boxes, model(*batch).boxes)


def save_best(model, args, out, epoch=1):
    """Write the checkpoint of a run in the first phase -> its path."""
    args.out = str(out)
    train.save_checkpoint(train.Run(model, args), {"epoch": epoch})
    return out / "best.safetensors"


@pytest.mark.parametrize("change", [{"method": "frozen"}, {"bottleneck": 5}])
def test_a_checkpoint_of_another_model_is_refused(tmp_path, small_model, change):
    """Another method has other names, another bottleneck other shapes."""
    model, args = small_model
    for name, value in change.items():
        setattr(args, name, value)
    if args.method == "frozen":
        for option in m.MODEL_OPTIONS:
            setattr(args, option.name, None)
    path = save_best(model, args, tmp_path)
    with pytest.raises(InputError, match="another method or size"):
        evaluate.load_checkpoint(path)


def test_tuned_weights_that_do_not_fit_are_named(small_model):
    """A weight that is missing, one too many, or of another shape is never passed over."""
    model, _ = small_model
    state = train.tuned_state(model)
    name = "grounding.head.0.bias"

    without = {key: value for key, value in state.items() if key != name}
    with pytest.raises(InputError, match=f"x.pt: .*1 weights do not fit, {name}"):
        train.load_tuned(model, without, "x.pt")
    with pytest.raises(InputError, match="1 weights do not fit, extra"):
        train.load_tuned(model, {**state, "extra": torch.zeros(1)}, "x.pt")
    with pytest.raises(InputError, match=f"1 weights do not fit, {name}"):
        train.load_tuned(model, {**state, name: torch.zeros(1)}, "x.pt")
    train.load_tuned(model, state, "x.pt")


def test_a_checkpoint_of_other_encoders_is_refused(tmp_path, small_model):
    """The metadata holds a hash of all that is frozen."""
    model, args = small_model
    model.text.word.weight.data[7] += 1
    path = save_best(model, args, tmp_path)
    with pytest.raises(InputError, match="other encoder weights"):
        evaluate.load_checkpoint(path)


def test_a_file_that_is_no_checkpoint_is_named(tmp_path):
    """A file of something else, a file without our metadata, and no file at all."""
    (tmp_path / "y.safetensors").write_bytes(b"no")
    save_file({"a": torch.zeros(1)}, tmp_path / "z.safetensors", metadata={"config": "{}"})
    for name, message in (("y.safetensors", "not a checkpoint"),
                          ("z.safetensors", "not a checkpoint"), ("gone", "no such checkpoint")):
        with pytest.raises(InputError, match=message):
            evaluate.load_checkpoint(tmp_path / name)


def test_a_checkpoint_within_a_stage_has_its_pairs_merged(tmp_path):
    """The box of a loaded checkpoint is the box of the model with its pairs."""
    args = train.parse_args([*FAST, *HIVG])
    model = m.build_model(**train.model_arguments(args))
    under_way, _ = begin_run(model, args, tmp_path, number=1)
    for found in hilora.find_pairs(model):
        torch.nn.init.normal_(found.pair.B)
    train.save_checkpoint(under_way, {"epoch": 3})
    loaded, _ = evaluate.load_checkpoint(tmp_path)
    assert hilora.find_pairs(loaded) == []

    batch = (torch.randn(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.bool),
             torch.ones(2, 5, dtype=torch.long), torch.zeros(2, 5, dtype=torch.bool))
    with torch.no_grad():
        boxes = model.eval()(*batch).boxes
        assert torch.allclose(loaded(*batch).boxes, boxes, atol=1e-5)
        hilora.discard(model)
        assert not torch.allclose(model(*batch).boxes, boxes, atol=1e-3)


# --- Datasets that people have --------------------------------------------------------------------


def test_a_dataset_in_refer_format_trains_and_evaluates(tmp_path):
    """RefCOCO as its authors ship it."""
    root = tmp_path / "data"
    flags = write_refcoco(root)
    out = run(tmp_path / "a", *flags, "--workers", "1", "--batch-size", "2")
    result = evaluate.main([str(out), "--device", "cpu"])
    found = {split: row["expressions"] for split, row in result["splits"].items()}
    assert found == {"val": 1, "testA": 2}
    assert result["dataset"] == "refcoco"
    assert json.loads((out / "args.json").read_text())["args"]["root"] == str(root)


def test_mixed_datasets_train_and_are_evaluated_one_by_one(tmp_path):
    """The papers' mixed setting: several datasets, joined by commas."""
    root = tmp_path / "data"
    write_refcoco(root)
    as_refer(root, "refcoco+", refs=[(70, "train", ["one", "two"]), (80, "val", ["three"])])
    out = run(tmp_path / "a", "--dataset", "refcoco,refcoco+", "--root", str(root), "--epochs", "1",
              "--workers", "0")
    result = evaluate.main([str(out), "--device", "cpu", "--figures", str(tmp_path / "figures")])
    assert list(result["splits"]) == ["val", "refcoco/val", "refcoco/testA", "refcoco+/val"]
    assert result["splits"]["val"]["expressions"] == 2
    assert (tmp_path / "figures/refcoco+-val.png").exists()

    args = train.parse_args(["--dataset", "refcoco,a/refcoco+", "--size", "tiny"])
    assert args.out == "runs/refcoco,refcoco+-m2ist-0-size=tiny"


def test_a_split_that_is_not_there_is_named(tmp_path):
    """evaluate.py lists the splits that there are."""
    flags = write_refcoco(tmp_path / "data")
    out = run(tmp_path / "a", *flags, "--epochs", "1", "--workers", "0")
    with pytest.raises(InputError, match="no such split|choose one of"):
        evaluate.main([str(out), "--split", "train2", "--device", "cpu"])


def test_boxes_without_area_are_left_out_of_training_and_are_misses_in_evaluation(tmp_path, capsys):
    """Some boxes of real datasets have no area."""
    flags = write_refcoco(tmp_path / "data")
    path = tmp_path / "data/refcoco/instances.json"
    instances = json.loads(path.read_text())
    for annotation in (0, 3):    # two expressions of train, and both of testA
        instances["annotations"][annotation]["bbox"][2] = 0
    path.write_text(json.dumps(instances))

    out = run(tmp_path / "a", *flags, "--epochs", "1", "--workers", "0")
    assert "1 expressions to train on (2 left out, without area)" in capsys.readouterr().out
    result = evaluate.main([str(out), "--split", "testA", "--device", "cpu"])
    row = result["splits"]["testA"]
    seconds = row.pop("seconds")
    assert 0 <= seconds < 61
    assert row == {"acc@0.5": 0.0, "mean_iou": 0.0, "expressions": 2, "images": 1}


def test_boxes_outside_of_their_pictures_are_told_before_training(tmp_path, capsys):
    """They are left out of training, and are misses in evaluation, from which nothing is left out.
    The first of them is named with its file and line."""
    data.render(0).save(tmp_path / "a.png")
    lines = []
    for split in ("train", "val"):
        for number in range(3):
            lines.append({"image": "a.png", "text": f"it {number}", "box": [1, 2, 30, 40],
                          "split": split})
        lines.append({"image": "a.png", "text": f"gone in {split}", "box": [500, 2, 530, 40],
                      "split": split})
    path = tmp_path / "my.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))

    out = run(tmp_path / "out", "--dataset", str(path), "--epochs", "1", "--workers", "0")
    printed = capsys.readouterr().out
    for split, number, fate in (("train", 4, "left out"), ("val", 8, "misses")):
        assert (f"1 boxes of {split} lie outside of their pictures and are {fate}; one is in "
                f"{path}, line {number}: [500.0, 2.0, 530.0, 40.0] of 'gone in {split}' in "
                f"{tmp_path / 'a.png'}") in printed
    assert "3 expressions to train on (0 left out, without area), 4 to validate" in printed
    result = evaluate.main([str(out), "--split", "val", "--device", "cpu"])
    assert result["splits"]["val"]["expressions"] == 4


def test_joined_datasets_take_the_longest_recipe_and_the_most_tokens(tmp_path, capsys):
    """RefCOCO+ has 180 epochs, RefCOCOg texts have 40 tokens; the default of each alone differs."""
    args = train.parse_args(["--dataset", "refcoco,refcoco+,refcocog-umd"])
    assert (args.epochs, args.lr_drop, args.max_tokens) == (180, 120, 40)
    args = train.parse_args(["--dataset", "refcocog-umd,refcoco"])
    assert (args.epochs, args.lr_drop, args.max_tokens) == (90, 60, 40)
    args = train.parse_args(["--dataset", "refcoco,referit"])
    assert (args.epochs, args.lr_drop, args.max_tokens) == (90, 60, 20)
    capsys.readouterr()
    train.print_recipe(args)
    assert "joined datasets: the default of epochs is the longest of the parts" in (
        capsys.readouterr().out)
    given = train.parse_args(["--dataset", "refcoco,refcoco+", "--epochs", "3"])
    assert given.epochs == 3


def test_a_missing_picture_of_val_is_named_before_anything_is_trained(tmp_path):
    """A long run must not end at the pictures of val."""
    flags = write_refcoco(tmp_path / "data")
    (tmp_path / "data/images/train2014" / coco(8)).unlink()
    with pytest.raises(InputError, match=f"{coco(8)}: no such picture"):
        run(tmp_path / "a", *flags)
    assert not (tmp_path / "a").exists()


def test_a_truncated_picture_of_val_is_named_before_anything_is_trained(tmp_path):
    """Its header is whole, and the first epoch would be lost at it."""
    flags = write_refcoco(tmp_path / "data")
    picture = tmp_path / "data/images/train2014" / coco(8)
    Image.effect_noise((90, 120), 80).save(picture)
    picture.write_bytes(picture.read_bytes()[:-1000])
    assert data.header_size(picture) == (90, 120)
    with pytest.raises(InputError, match=f"{coco(8)}: the file cannot be decoded"):
        run(tmp_path / "a", *flags)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("split", ["train", "val"])
def test_boxes_that_are_not_in_pixels_are_refused(tmp_path, split):
    """The error names the split."""
    data.render(0).save(tmp_path / "a.png")
    good = {"image": "a.png", "text": "it", "box": [1, 2, 30, 40]}
    lines = [{**good, "split": "train"}, {**good, "split": "val"},
             {**good, "box": [0.1, 0.1, 0.9, 0.9], "split": split}]
    (tmp_path / "my.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    with pytest.raises(InputError, match=f"my.jsonl, {split}: 1 of 2 boxes .* are they in pixels"):
        run(tmp_path / "out", "--dataset", str(tmp_path / "my.jsonl"))


def test_texts_that_are_cut_are_told_before_training(tmp_path, capsys):
    """The texts of train and val are counted by the tokenizer of the model."""
    flags = write_refcoco(tmp_path / "data")
    run(tmp_path / "a", *flags, "--epochs", "1", "--workers", "0", "--max-tokens", "8")
    assert ("2 of 4 expressions are cut at 8 tokens, such as 'the bright cup'; --max-tokens sets "
            "another limit") in capsys.readouterr().out


def test_a_jsonl_without_val_keeps_the_last_epoch(tmp_path, capsys):
    """Without val no epoch is known to be the best."""
    data.render(0).save(tmp_path / "a.png")
    line = json.dumps({"image": "a.png", "text": "it", "box": [1, 2, 30, 40], "split": "train"})
    (tmp_path / "my.jsonl").write_text("\n".join([line, line, line]))
    out = run(tmp_path / "out", "--dataset", str(tmp_path / "my.jsonl"), "--workers", "1")
    assert "no split 'val'" in capsys.readouterr().out
    assert "val_acc@0.5" not in read_log(out)[-1]
    _, config = evaluate.load_checkpoint(out)
    assert config["epoch"] == 3
    assert list(evaluate.main([str(out)])["splits"]) == ["train"]


@pytest.mark.parametrize("method, size, augmented, mirror, pixels", [
    ("m2ist", "base", True, True, "detr"),
    ("hivg", "base", True, False, "clip"),
    ("hivg", "large", True, False, "clip"),
    ("m2ist", "tiny", False, True, "detr"),
    ("hivg", "tiny", False, False, "clip"),
])
def test_each_paper_gets_its_transforms_and_pixels(tmp_path, method, size, augmented, mirror,
                                                   pixels):
    """HiVG mirrors nothing; the tiny size is not augmented; --pixels overrides the encoder's."""
    flags = ["--method", method, "--size", size, "--weights", "random", *write_refcoco(tmp_path)]
    samples = data.load_samples("refcoco", "train", tmp_path)
    for more, expected in (([], pixels), (["--pixels", "detr"], "detr")):
        args = train.parse_args([*flags, *more])
        with torch.device("meta"):
            model = m.build_model(**train.model_arguments(args))
        in_training = train.make_loader(samples, model, args, train=True).dataset
        assert in_training.train
        assert in_training.augmented == augmented
        if augmented:
            assert in_training.mirror == mirror
        assert in_training.size == m.SIZES[size][m.METHODS[method]["encoders"]]["image_size"]
        assert in_training.pixels == data.PIXELS[expected]
        in_evaluation = train.make_loader(samples, model, args).dataset
        assert not in_evaluation.train
        assert not in_evaluation.augmented
        assert in_evaluation.pixels == data.PIXELS[expected]


def test_each_epoch_has_an_order_and_transforms_of_its_own():
    """Order and transforms are drawn from seed and epoch alone."""
    args = train.parse_args(FAST)
    model = m.build_model(**train.model_arguments(args))
    samples = data.load_samples("shapes", "train", limit=32)
    loader = train.make_loader(samples, model, args, train=True)

    def drawn(seed, epoch):
        loader.dataset.seed = loader.batch_sampler.seed = seed
        train.set_epoch(loader, epoch)
        batches = list(loader)
        order = torch.cat([batch["index"] for batch in batches])
        boxes = torch.cat([batch["boxes"] for batch in batches])
        return order.tolist(), boxes[order.argsort()].tolist()

    order, boxes = drawn(0, 1)
    assert sorted(order) == list(range(32))
    assert order != sorted(order)
    assert drawn(0, 1) == (order, boxes)
    for seed, epoch in ((0, 2), (1, 1)):
        other_order, other_boxes = drawn(seed, epoch)
        assert other_order != order
        assert other_boxes != boxes


def test_a_batch_that_is_not_full_is_dropped_in_training_alone():
    """Of 28 samples, training sees three batches of 8, and validation sees all samples."""
    args = train.parse_args(FAST)
    model = m.build_model(**train.model_arguments(args))
    samples = data.load_samples("shapes", "val", limit=28)
    assert len(train.make_loader(samples, model, args, train=True)) == 3
    loader = train.make_loader(samples, model, args)
    assert len(loader) == 4
    assert torch.cat([batch["index"] for batch in loader]).tolist() == list(range(28))
    # Fewer samples than a batch are one batch.
    assert len(train.make_loader(samples[:5], model, args, train=True)) == 1


def test_refcocog_takes_40_tokens_as_its_texts_are_longer():
    """20 tokens for M²IST, 40 for RefCOCOg, 77 for CLIP."""
    for dataset, tokens in (("refcoco", 20), ("refcocog-umd", 40), ("refcocog-google", 40)):
        assert train.parse_args(["--dataset", dataset]).max_tokens == tokens
    clip = train.parse_args(["--dataset", "refcocog-umd", "--method", "hivg"])
    assert clip.max_tokens == 77
    given = train.parse_args(["--dataset", "refcocog-umd", "--max-tokens", "25"])
    assert given.max_tokens == 25


def test_a_file_of_clip_takes_the_hubs_tokenizer(tmp_path, monkeypatch):
    """A file holds weights alone; a folder and a hub name have a tokenizer, too."""
    asked = []

    def cached_tokenizer(max_tokens, name, vocabulary, flag):
        asked.append(name)
        return data.Tokenizer(max_tokens)

    monkeypatch.setattr(m, "cached_tokenizer", cached_tokenizer)
    (tmp_path / "clip.pth").write_bytes(b"")
    for weights in (str(tmp_path / "clip.pth"), str(tmp_path), "somebody/clip"):
        args = train.parse_args(["--method", "hivg", "--dataset", "refcoco",
                                 "--clip-weights", weights])
        spec = m.architecture("hivg", "base", clip_weights=weights)
        model = torch.nn.Module()
        model.spec = {**spec, "weights": args.weights}
        train.make_loader([], model, args)
    assert asked == ["openai/clip-vit-base-patch16", str(tmp_path), "somebody/clip"]


def test_leaky_pretraining_is_known_for_detr_and_unknown_for_clip():
    """DETR was pretrained on COCO's training pictures, which hold those of RefCOCO's val."""
    def leaky(*flags):
        return train.leaky_pretraining(train.parse_args(flags))

    assert leaky() is False
    assert leaky("--dataset", "refcoco", "--weights", "random") is False
    assert leaky("--dataset", "refcoco") is True
    assert leaky("--dataset", "referit", "--method", "hivg") is None
