"""The options of train.py: declared once, explained by --help, checked before anything is built."""
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import adapters
import data
import evaluate
import model as m
import train
from data import InputError, run_command
from short_runs import run

ROOT = Path(__file__).parent.parent
GROUPS = ["run", "data", "weights", "training", "M²IST", "HiVG", "losses", "machine"]

pytestmark = pytest.mark.usefixtures("cpu_with_dropout")


# --- The declarations -----------------------------------------------------------------------------


def test_no_option_is_declared_twice():
    """An option is a row of RUN_OPTIONS or a row of MODEL_OPTIONS."""
    names = [option.name for option in [*train.RUN_OPTIONS, *m.MODEL_OPTIONS]]
    assert len(set(names)) == len(names)
    assert sorted(train.OPTIONS) == sorted(names)


@pytest.mark.parametrize("name", train.OPTIONS)
def test_every_option_has_help_a_source_and_a_group(name):
    """The help is a sentence, and the source is a place in a paper, the released code, or us."""
    option = train.OPTIONS[name]
    assert option.help.endswith(".")
    assert option.group in GROUPS
    place = r"ours|released code|papers' tables|Tables? |Eq\. \(|IV-[BC] |\b[34]\.\d"
    assert re.search(place, option.source)
    assert option.several in (None, "+", "*")
    if option.only is not None:
        assert option.only.__doc__    # the words of the error


def test_every_default_of_a_recipe_is_an_option():
    """A misspelt name in RECIPES or in ROWS would do nothing."""
    for table in (train.RECIPES, train.ROWS):
        for row, defaults in table.items():
            assert set(defaults) <= set(train.OPTIONS), row


@pytest.mark.parametrize("method", m.METHODS)
def test_every_option_is_resolved(method):
    """parse_args gives every option a value, or None where the option is not for the method."""
    args = train.parse_args(["--method", method])
    assert set(vars(args)) == set(train.OPTIONS)
    for name in ("epochs", "batch_size", "micro_batch", "lr", "lr_encoder", "schedule", "warmup",
                 "weights", "workers", "out", "l1", "giou", "contrast", "max_tokens"):
        assert getattr(args, name) is not None, name

    spec = m.architecture(method, "tiny")
    for option in m.MODEL_OPTIONS:
        if option.only is not None and not option.only(spec):
            assert getattr(args, option.name) is None, option.name


# --- Which methods take an option -----------------------------------------------------------------

ON_DETR = {"full", "frozen", "adapter", "lora", "adaptformer", "cm-adapter", "mrs-adapter", "m2ist",
           "m2ist+lora"}
ON_CLIP = {"clip-frozen", "clip-lora", "hivg"}
WITH_ADAPTERS = {"adapter", "adaptformer", "cm-adapter", "mrs-adapter", "m2ist", "m2ist+lora"}
WITH_LORA = {"lora", "m2ist+lora", "clip-lora", "hivg"}


def test_every_method_is_in_a_set_above():
    """A new method needs a place in this section."""
    assert ON_DETR | ON_CLIP == set(m.METHODS)


@pytest.mark.parametrize("flags, methods, words", [
    (["--vision-weights", "x"], ON_DETR, "methods on DETR and BERT"),
    (["--text-weights", "x"], ON_DETR, "methods on DETR and BERT"),
    (["--clip-weights", "x"], ON_CLIP, "methods on CLIP"),
    (["--attention-port", "iea"], ON_DETR, "methods on DETR and BERT"),
    (["--ffn-port", "iea"], ON_DETR, "methods on DETR and BERT"),
    (["--insertion", "parallel"], WITH_ADAPTERS, "methods with an adapter at a port"),
    (["--bottleneck", "4"], WITH_ADAPTERS, "methods with an adapter at a port"),
    (["--interaction-dim", "4"], WITH_ADAPTERS, "methods with an adapter at a port"),
    (["--scale", "0.5"], WITH_ADAPTERS, "methods with an adapter at a port"),
    (["--residual"], {"m2ist", "m2ist+lora"}, "side networks"),
    (["--side-start", "paired"], {"m2ist", "m2ist+lora"}, "side networks"),
    (["--text-layers", "1", "2"], WITH_ADAPTERS | {"hivg"}, "methods with adapters or bridges"),
    (["--vision-layers", "1"], ON_CLIP, "methods on CLIP"),
    (["--bridge-layers", "1"], ON_CLIP, "methods on CLIP"),
    (["--stages", "1"], WITH_LORA, "methods with linears for LoRA"),
    (["--rank", "8"], WITH_LORA, "runs with LoRA"),
    (["--alpha", "8"], WITH_LORA, "runs with LoRA"),
    (["--stage-epochs", "1"], WITH_LORA, "runs with LoRA"),
    (["--stage-lr", "1e-3"], WITH_LORA, "runs with LoRA"),
    (["--contrast", "1"], ON_CLIP, "methods on CLIP"),
    (["--focal", "1"], {"hivg"}, "methods with the region-text constraint"),
    (["--dice", "1"], {"hivg"}, "methods with the region-text constraint"),
])
def test_an_option_is_for_the_methods_that_its_declaration_names(flags, methods, words):
    """One mechanism refuses the options of DETR, CLIP, LoRA and adapters for other methods."""
    for method in m.METHODS:
        if method in methods:
            train.parse_args(["--method", method, *flags])
        else:
            message = f"{flags[0]} is for {words}.*, not for --method {re.escape(method)}$"
            with pytest.raises(InputError, match=message):
                train.parse_args(["--method", method, *flags])


def test_build_model_refuses_the_same_options():
    """build_model reads the declaration that the parser reads."""
    with pytest.raises(InputError, match="--bottleneck is for methods with an adapter at a port"):
        m.build_model("hivg", "tiny", "random", bottleneck=4)
    with pytest.raises(InputError, match="--bottleneck is 0; it must be 1 or more"):
        m.build_model("m2ist", "tiny", "random", bottleneck=0)
    with pytest.raises(InputError, match="unknown --bridge-weights 'HxL': choose one of .*nx1xH"):
        m.build_model("hivg", "tiny", "random", bridge_weights="HxL")
    with pytest.raises(InputError, match="unknown option 'depth'"):
        m.build_model("m2ist", "tiny", "random", depth=4)


ROWS_ALONE = {"interaction_bottleneck", "bridge_weights", "cross_attention", "layer_to_layer",
              "deep_to_shallow", "last_stage", "region_text", "released_rules"}


def test_options_that_rows_alone_set_are_no_flags(capsys):
    """argparse refuses their flags, and --help does not show them."""
    without = {name for name, option in train.OPTIONS.items() if not option.flag}
    assert without == ROWS_ALONE
    for name in ROWS_ALONE:
        flag = f"--{name.replace('_', '-')}"
        with pytest.raises(SystemExit) as stop:
            train.parse_args([flag, "1"])
        assert stop.value.code == 2
        assert f"unrecognized arguments: {flag}" in capsys.readouterr().err


# --- New adapters ---------------------------------------------------------------------------------


class Shift(adapters.PairAdapter):
    """A learned vector, added to every token."""

    def __init__(self, vision_dim, text_dim):
        super().__init__()
        self.v = torch.nn.Parameter(torch.ones(vision_dim))
        self.l = torch.nn.Parameter(torch.ones(text_dim))

    def vision(self, x):
        return self.v.expand_as(x)

    def text(self, x):
        return self.l.expand_as(x)


def make_shift(vision_dim, text_dim, options):
    return Shift(vision_dim, text_dim)


def test_a_new_adapter_is_a_valid_name_of_a_port_at_once(monkeypatch, capsys):
    """A row in ADAPTERS is all that --attention-port needs."""
    monkeypatch.setitem(adapters.ADAPTERS, "shift", make_shift)
    args = train.parse_args(["--attention-port", "shift", "--weights", "random"])
    model = m.build_model(**train.model_arguments(args))
    for block in model.adapters.blocks:
        assert isinstance(block["attention"], Shift)
    assert "iea, ea, vea, lea, shift." in " ".join(help_of(capsys).split())


def test_a_new_method_is_a_row_and_trains(monkeypatch, tmp_path):
    """A row in METHODS is all that --method needs."""
    monkeypatch.setitem(adapters.ADAPTERS, "shift", make_shift)
    row = dict(m.FROZEN, insertion="sequential", attention_port="shift", ffn_port="shift")
    monkeypatch.setitem(m.METHODS, "shift", row)
    out = run(tmp_path / "a", "--method", "shift", "--epochs", "1", "--limit", "16")
    trained = torch.load(out / "last.pt", weights_only=True)["model"]
    shifts = [name for name in trained if name.startswith("adapters.")]
    assert len(shifts) == 2 * 2 * 2    # two pairs of layers, two ports, two modalities
    for name in shifts:
        assert not torch.equal(trained[name], torch.ones_like(trained[name]))


# --- --help and --row list ------------------------------------------------------------------------


def help_of(capsys, *flags):
    """What --help prints with these flags."""
    with pytest.raises(SystemExit) as stop:
        train.main([*flags, "--help"])
    assert stop.value.code in (None, 0)
    return capsys.readouterr().out


def test_help_has_the_eight_groups_in_80_columns(capsys):
    """--help fits a terminal, and its groups come in the order of GROUPS."""
    text = help_of(capsys)
    headings = [heading for heading in re.findall(r"^(\S+):$", text, re.M) if heading != "usage"]
    assert headings == GROUPS == list(train.GROUPS)
    assert max(len(line) for line in text.splitlines()) <= 80


def test_help_shows_every_flag_and_nothing_else(capsys):
    """Every flag of --help is a declared option, but --help itself and the three of the claims."""
    shown = set(re.findall(r"^  (?:-h, )?--([a-z0-9-]+)", help_of(capsys), re.M))
    declared = set()
    for name, option in train.OPTIONS.items():
        if option.flag:
            declared.add(name.replace("_", "-"))
    assert shown == declared | {"help", "claims", "seeds", "rates"}


def help_of_flag(text, flag):
    """The help of one flag, on one line."""
    lines = text[text.index(f"\n  {flag}") + 3:]
    end = re.search(r"\n  -|\n\n|\Z", lines).start()
    return " ".join(lines[:end].split())


def test_help_of_a_flag_has_its_sentence_choices_source_and_default(capsys):
    """The help of an option is what its declaration says."""
    text = help_of(capsys)
    assert help_of_flag(text, "--insertion") == (
        "--insertion NAME Where adapters work: beside the encoder or inside it. One of side, "
        "sequential, parallel. (M²IST Table VII; default: side)")
    for name, option in train.OPTIONS.items():
        if option.flag:
            found = help_of_flag(text, f"--{name.replace('_', '-')}")
            assert "default: " in found or "not for m2ist)" in found, name


@pytest.mark.parametrize("flags, flag, default", [
    ([], "--method", "m2ist"),
    ([], "--bottleneck", "32"),
    ([], "--text-layers", "3 4"),
    ([], "--residual", "off"),
    (["--residual"], "--residual", "on"),
    (["--method", "hivg"], "--method", "hivg"),
    (["--method", "hivg"], "--rank", "32"),
    (["--method", "hivg"], "--stages", "3"),
    (["--method", "hivg"], "--stage-lr", "0.0015 0.001 0.0007"),
    (["--method", "hivg"], "--limit", "12000"),
    (["--method", "hivg", "--dataset", "refcoco"], "--limit", "none"),
    (["--method", "hivg"], "--focal", "20.0"),
    (["--method", "hivg", "--size", "large"], "--stages", "4"),
    (["--dataset", "refcoco"], "--epochs", "90"),
    (["--dataset", "refcoco"], "--batch-size", "64"),
    (["--dataset", "refcocog-umd"], "--max-tokens", "40"),
    (["--row", "m2ist/II/32", "--size", "base"], "--bottleneck", "32"),
])
def test_help_shows_the_defaults_of_the_command_line_at_hand(capsys, flags, flag, default):
    """The defaults depend on method, size, dataset and row."""
    assert help_of_flag(help_of(capsys, *flags), flag).endswith(f"default: {default})")


@pytest.mark.parametrize("method, flag", [("m2ist", "--rank"), ("hivg", "--bottleneck"),
                                          ("frozen", "--scale"), ("clip-frozen", "--stages")])
def test_help_says_which_flags_are_not_for_the_method_at_hand(capsys, method, flag):
    """An option that the method does not take has no default."""
    found = help_of_flag(help_of(capsys, "--method", method), flag)
    assert found.endswith(f"not for {method})")


def test_help_does_not_import_transformers():
    """Importing transformers takes seconds; --help must not wait for it."""
    code = ("import sys, train\n"
            "try:\n    train.main(['--help'])\n"
            "except SystemExit:\n    pass\n"
            "print('imported', 'transformers' in sys.modules)\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "imported False"


def test_help_does_not_ask_for_the_device(capsys):
    """--help works on a machine without the device of the command line."""
    assert "default: cuda:99)" in help_of(capsys, "--device", "cuda:99")


def test_rows_are_listed_with_what_they_change(capsys):
    """--row list prints a header, and every row with its options."""
    with pytest.raises(SystemExit) as stop:
        train.main(["--row", "list"])
    assert stop.value.code in (None, 0)
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split()[0] == "row"
    assert "changes" in header
    assert [line.split()[0] for line in lines] == list(train.ROWS)

    rows = {line.split()[0]: line.partition(" ")[2].strip() for line in lines}
    assert rows["m2ist/V/b"] == "attention_port none, ffn_port lea"
    assert "vision_layers [2, 5, 9]" in rows["hivg/11/2"]
    assert rows["hivg/3/4"] == "nothing: the default itself"


def test_the_recipe_is_printed_a_group_a_line(capsys):
    """Every option that the method has is printed with its value."""
    args = train.parse_args(["--method", "hivg"])
    train.print_recipe(args)
    printed = {}
    for line in capsys.readouterr().out.splitlines():
        group, _, options = line.partition(": ")
        printed[group] = options.split(", ")
    for name, option in train.OPTIONS.items():
        if getattr(args, name) is not None:
            assert f"{name} {train.shown(option, args)}" in printed[option.group]
        else:
            assert f"{name} none" not in printed.get(option.group, [])


# --- The name of a run ----------------------------------------------------------------------------


@pytest.mark.parametrize("flags, folder", [
    ([], "runs/shapes-m2ist-0"),
    (["--seed", "3", "--workers", "2", "--save-minutes", "5"], "runs/shapes-m2ist-3"),
    (["--epochs", "9", "--method", "hivg", "--stages", "0"], "runs/shapes-hivg-0-epochs=9-stages=0"),
    (["--stages", "0", "--epochs", "9", "--method", "hivg"], "runs/shapes-hivg-0-epochs=9-stages=0"),
    (["--method", "hivg", "--bridge-layers"], "runs/shapes-hivg-0-bridge_layers=none"),
    (["--method", "hivg", "--stage-lr", "1e-3", "1e-4"],
     "runs/shapes-hivg-0-stage_lr=0.001+0.0001"),
    (["--row", "m2ist/V/b", "--beta", "1"], "runs/shapes-m2ist-V-b-0-beta=1.0"),
    (["--size", "base", "--vision-weights", "weights/detr.pth", "--root", "data"],
     "runs/shapes-m2ist-0-size=base-vision_weights=detr.pth"),
])
def test_runs_that_differ_have_folders_that_differ(flags, folder):
    """A folder is named by dataset, method or row, seed, and every flag that changes what the run
    computes, whatever the order of the flags."""
    assert train.parse_args(flags).out == folder


@pytest.mark.parametrize("flags, title", [
    ([], "m2ist"),
    (["--beta", "1"], "m2ist"),
    (["--row", "m2ist/V/b"], "m2ist/V/b"),
    (["--row", "m2ist/V/b", "--seed", "1", "--micro-batch", "8"], "m2ist/V/b"),
    (["--row", "m2ist/V/b", "--beta", "1", "--text-layers", "1", "2"],
     "m2ist/V/b changed (beta 1.0, text_layers 1 2)"),
    (["--row", "hivg/3/1", "--weights", "random"], "hivg/3/1 changed (weights random)"),
])
def test_a_row_that_is_changed_by_flags_says_so(flags, title):
    """A figure of another run must not stand under the name of a row."""
    assert train.title(train.parse_args(flags)) == title


# --- Bad input: exit status 2, one line, no traceback ---------------------------------------------

HIVG = ["--method", "hivg"]


@pytest.mark.parametrize("flags, words", [
    # Choices
    (["--method", "magic"], ["--method", "magic", "full, frozen, adapter",
                             "m2ist+lora, clip-frozen, clip-lora, hivg"]),
    (["--dataset", "cocoref"], ["dataset", "cocoref", "shapes"]),
    (["--size", "huge"], ["--size", "huge", "tiny"]),
    (["--size", "large"], ["--size", "large", "base, tiny"]),
    (["--weights", "some"], ["--weights", "some", "random"]),
    (["--weights", "pretrained"], ["--weights", "tiny", "shapes, random"]),
    (["--schedule", "constant"], ["--schedule", "constant", "cosine, linear"]),
    (["--amp", "fp8"], ["--amp", "fp8", "bf16"]),
    (["--ffn-port", "nosuch"], ["--ffn-port", "nosuch", "iea"]),
    (["--insertion", "above"], ["--insertion", "above", "sequential"]),
    (["--pixels", "bert"], ["--pixels", "bert", "detr, clip"]),
    # Numbers
    (["--epochs", "0"], ["--epochs", "1 or more"]),
    (["--limit", "0"], ["--limit", "1 or more"]),
    (["--batch-size", "0"], ["--batch-size", "1 or more"]),
    (["--micro-batch", "0"], ["--micro-batch", "1 or more"]),
    (["--workers", "-1"], ["--workers", "0 or more"]),
    (["--bottleneck", "0"], ["--bottleneck", "1 or more"]),
    (["--lr", "-1"], ["--lr", "0 or more"]),
    (["--lr", "inf"], ["--lr", "0 or more"]),
    (["--scale", "nan"], ["--scale is nan"]),
    (["--giou", "-1"], ["--giou", "0 or more"]),
    (["--max-tokens", "2"], ["--max-tokens", "3 or more"]),
    (["--max-tokens", "99"], ["--max-tokens is 99", "32 positions"]),
    (["--interaction-dim", "999"], ["interaction_dim", "999"]),
    ([*HIVG, "--stage-lr", "-1"], ["--stage-lr is -1", "0 or more"]),
    ([*HIVG, "--stage-lr", "nan"], ["--stage-lr is nan"]),
    ([*HIVG, "--stage-lr", "1e-3", "-1"], ["--stage-lr is -1", "0 or more"]),
    ([*HIVG, "--alpha", "0"], ["--alpha"]),
    ([*HIVG, "--rank", "0"], ["--rank", "1 or more"]),
    # Layers and stages
    (["--text-layers", "1"], ["text layers", "[1]"]),
    (["--text-layers", "3", "9"], ["--text-layers 3 9", "1 .. 4"]),
    ([*HIVG, "--vision-layers", "2", "2"], ["--vision-layers 2 2", "differ"]),
    ([*HIVG, "--bridge-layers", "7"], ["--bridge-layers 7", "1 .. 6"]),
    ([*HIVG, "--stages", "7"], ["--stages is 7", "6 layers"]),
    ([*HIVG, "--stage-epochs", "0", "--epochs", "2"], ["--stages 3", "--stage-epochs"]),
    (["--method", "lora", "--epochs", "1", "--stages", "2"], ["--stages 2", "--epochs"]),
    (["--row", "hivg/5/2", "--stages", "1"], ["the last stage is 2", "--stages is 1"]),
    (["--row", "hivg/4/7", "--bridge-layers", "1", "2"],
     ["2 bridges need as many text layers, not 3"]),
    # Options of other methods
    (["--stages", "2"], ["--stages", "m2ist"]),
    (["--rank", "8"], ["--rank", "m2ist"]),
    ([*HIVG, "--bottleneck", "4"], ["--bottleneck", "hivg"]),
    ([*HIVG, "--scale", "0.5"], ["--scale", "hivg"]),
    ([*HIVG, "--insertion", "parallel"], ["--insertion", "hivg"]),
    ([*HIVG, "--text-layers", "1", "--bridge-layers"], ["--text-layers", "bridges"]),
    (["--method", "clip-frozen", "--focal", "1"], ["--focal", "clip-frozen"]),
    (["--method", "clip-frozen", "--rank", "4"], ["--rank", "--stages"]),
    (["--method", "adapter", "--residual"], ["--residual", "side networks"]),
    (["--method", "full", "--stages", "1"], ["--stages", "full"]),
    # Rows
    (["--row", "m2ist/V/z"], ["m2ist/V/z", "--row list"]),
    (["--row", "hivg/3/1", "--size", "large"], ["hivg/3/1", "base and tiny"]),
    (["--row", "m2ist/V/b", "--method", "hivg"], ["--row m2ist/V/b has method m2ist",
                                                  "leave out --method"]),
    (["--row", "m2ist/V/b", "--ffn-port", "vea"], ["--row m2ist/V/b has ffn_port lea",
                                                   "leave out --ffn-port"]),
    # Files and machines
    (["--dataset", "gone.jsonl"], ["gone.jsonl", "no such file"]),
    (["--out", __file__], ["test_options.py", "is a file"]),
    (["--device", "cuda:99"], ["--device cuda:99", "--device cpu"]),
    (["--device", "foo"], ["--device foo", "--device cpu"]),
])
def test_bad_flags(tmp_path, capsys, flags, words):
    """A wrong flag gives one line that names it, and no run is begun."""
    out = tmp_path / "out"

    def main():
        run(out, *flags)

    with pytest.raises(SystemExit) as stop:
        run_command(main)
    assert stop.value.code == 2
    errors = capsys.readouterr().err
    assert errors.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in errors
    for word in words:
        assert word in errors.splitlines()[-1]
    assert not out.exists()


@pytest.mark.parametrize("script, flags, word", [
    ("train.py", ["--method", "magic"], "magic"),
    ("evaluate.py", ["gone"], "no such checkpoint"),
    ("evaluate.py", ["gone", "--json", f"{__file__}/a.json"], "test_options.py"),
    ("data.py", ["shapes", "--write", __file__], "is there already"),
])
def test_the_command_lines_exit_with_2(tmp_path, script, flags, word):
    """Each of the three scripts prints one line for wrong input."""
    done = subprocess.run([sys.executable, str(ROOT / script), *flags], capture_output=True,
                          text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert word in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_before_the_first_step_is_one_line(tmp_path, monkeypatch, capsys):
    """While pictures are checked and encoders are loaded, Ctrl-C leaves one line, the exit status of
    the signal, and no folder that looks like a run. train.Signals takes over in the loop."""
    def interrupt(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "build_model", interrupt)
    with pytest.raises(SystemExit) as stop:
        run_command(functools.partial(run, tmp_path / "out"))
    assert stop.value.code == 130
    assert capsys.readouterr().err.strip() == "stopped by Ctrl-C"
    assert not (tmp_path / "out").exists()


# --- The flags of evaluate.py ---------------------------------------------------------------------


@pytest.mark.parametrize("flags, word", [
    (["--split", "test"], "val, testA, testB"),
    (["--limit", "0"], "1 or more"),
    (["--batch-size", "0"], "1 or more"),
    (["--device", "foo"], "--device foo"),
    (["--json", f"{__file__}/a.json"], "test_options.py"),
    (["--figures", __file__], "test_options.py"),
    (["--json", str(ROOT)], "--json"),
    (["--image", "a.png", "--text", "a", "--save", "b.xyz"], "--save"),
    (["--dataset", "gone.jsonl"], "gone.jsonl"),
])
def test_evaluate_names_what_is_wrong_with_its_flags(m2ist_run, flags, word):
    """run_command makes one line of an InputError and of an OSError."""
    with pytest.raises((InputError, OSError), match=word):
        evaluate.main([str(m2ist_run), *flags])


def test_evaluate_on_another_dataset_does_not_look_in_the_training_folder(m2ist_run, tmp_path):
    """--root of the run belongs to the dataset of the run."""
    data.render(0).save(tmp_path / "a.png")
    line = '{"image": "a.png", "text": "it", "box": [1, 2, 30, 40], "split": "val"}'
    (tmp_path / "my.jsonl").write_text(line)
    result = evaluate.main([str(m2ist_run), "--dataset", str(tmp_path / "my.jsonl")])
    assert result["splits"]["val"]["expressions"] == 1
