"""Every row of the papers' tables: what it trains and how much, where its parts are, and that it
differs from the other rows of its table as the row says."""
import functools
import json
import zlib
from pathlib import Path

import pytest
import torch

import evaluate
import hilora
import model as m
import train
from data import InputError

# --- Counts ---------------------------------------------------------------------------------------

# Why a paper's figure differs from ours.
TWICE = "the paper counts the shared up-projection twice, and two norms for each VEA and LEA [D11]"
BLIP = "the paper's code has 198,274 leftover parameters of BLIP; and " + TWICE
ALONE = "the paper's 0.59 and 1.02 add up to its 1.61 as ours do, but cannot be derived"
DERIVED = "no reading of the paper gives its figure [D39]"
FULL = "the paper's figure cannot be derived from the architecture [D10]"
RANK = "the paper gives no rank; 55 is the one that rounds to its figure [D39]"
DOUBLED = "the paper doubles its rounded 1.61"
ADDED = "the paper adds its row for Adapter, 3.27, not its row for LoRA"

FULL_TUNED = (140_539_136, 151, FULL)
LORA = (2_365_440, 2.37, RANK)
M2IST = (2_975_232, 3.19, TWICE)
HIVG = (40_768_512, 41, "")    # in its last stage
NOTHING = (0, None, "")

# rows: (our number of tuned parameters in or beside the encoders at size base,
#        the paper's in millions, or None where it gives none, and why they differ)
COUNTS = {
    "m2ist/I/full m2ist/X/a": FULL_TUNED,
    "m2ist/I/frozen m2ist/V/a": (0, 0, ""),
    "m2ist/I/adapter": (5_574_144, 3.27, DERIVED),
    "m2ist/I/lora m2ist/X/b": LORA,
    "m2ist/I/adaptformer": (2_787_072, 2.38, DERIVED),
    "m2ist/I/cm-adapter": (2_764_800, 3.27, DERIVED),
    "m2ist/I/mrs-adapter m2ist/V/e": (1_382_400, 1.58, TWICE),
    "m2ist/I/m2ist m2ist/II/128 m2ist/V/f m2ist/VI/c m2ist/VI/d m2ist/IX/c m2ist/X/c": M2IST,
    "m2ist/VII/a m2ist/VII/b m2ist/VII/c": M2IST,
    "m2ist/VIII/a m2ist/VIII/b m2ist/VIII/c": (2_975_232, None, ""),
    "m2ist/II/8": (1_499_232, 1.91, BLIP),
    "m2ist/II/32": (1_794_432, 2.20, BLIP),
    "m2ist/V/b": (1_194_240, 0.59, ALONE),
    "m2ist/V/c": (398_592, 1.02, ALONE),
    "m2ist/V/d": (1_592_832, 1.61, TWICE),
    "m2ist/VI/a": (3_185_664, 3.22, DOUBLED),
    "m2ist/VI/b": (2_764_800, 3.17, TWICE),
    "m2ist/IX/a": (1_941_888, 2.00, TWICE),
    "m2ist/IX/b": (2_286_336, 2.40, TWICE),
    "m2ist/X/d": (5_340_672, 6.46, ADDED),
    "hivg/3/4 hivg/4/6 hivg/5/3 hivg/9/4 hivg/10/5 hivg/fig4d/stage-3": HIVG,
    "hivg/5/4 hivg/5/5 hivg/5/8 hivg/9/1 hivg/9/2 hivg/9/3": (40_768_512, None, ""),
    "hivg/fig4d/vanilla-lora": (40_768_512, None, ""),
    "hivg/3/1 hivg/fig4d/original-clip hivg/fig4d/no-hilora-no-macb": NOTHING,
    "hivg/3/2 hivg/fig4d/no-hilora": (36_836_352, None, ""),
    "hivg/3/3 hivg/fig4d/clip-vanilla-lora": (3_932_160, None, ""),
    "hivg/4/1": (39_349_248, None, ""),
    "hivg/4/2": (33_676_800, None, ""),
    "hivg/4/3": (39_350_784, None, ""),
    "hivg/4/4": (39_367_680, None, ""),
    "hivg/4/5": (39_352_020, None, ""),
    "hivg/4/7": (26_373_120, None, ""),
    "hivg/4/8 hivg/10/2": (26_491_392, None, ""),
    "hivg/5/1 hivg/fig4d/stage-1": (39_195_648, None, ""),
    "hivg/5/2 hivg/fig4d/stage-2": (39_982_080, None, ""),
    "hivg/5/6": (38_802_432, None, ""),
    "hivg/5/7": (44_700_672, None, ""),
    "hivg/10/1": (39_744_384, None, ""),
    "hivg/10/3": (27_789_312, None, ""),
    "hivg/10/4": (30_385_152, None, ""),
    "hivg/11/1 hivg/11/2 hivg/11/3 hivg/11/4 hivg/11/5 hivg/11/6 hivg/11/7": NOTHING}
COUNTS = {row: count for rows, count in COUNTS.items() for row in rows.split()}


def arguments(row, *flags):
    """The options of a row with random weights."""
    return train.parse_args(["--row", row, "--weights", "random", "--device", "cpu", *flags])


def last_stage(args, device="cpu"):
    """The model of a run in the last stage of its plan, where all its LoRA is in place."""
    torch.manual_seed(0)
    with torch.device(device):
        model = m.build_model(**train.model_arguments(args))
        model.begin_stage(train.plan(args)[-1].stage)
    return model


def built(row, *flags):
    """The options of a row and its model, at size tiny."""
    args = arguments(row, *flags)
    return args, last_stage(args)


@functools.cache
def full_size(row):
    """The options of a row and its model, at size base; the model has no memory."""
    args = arguments(row, "--size", "base")
    return args, last_stage(args, "meta")


def test_every_row_tunes_its_number_of_parameters():
    """The count is exact, and where the paper's differs there is a reason. --cost prints both."""
    assert set(COUNTS) == set(train.ROWS)
    for row, (ours, paper, why) in COUNTS.items():
        assert m.count_parameters(full_size(row)[1])["encoder_tunable"] == ours, row
        assert why != "" or paper is None or round(ours / 1e6) == paper, row
    rows = {"m2ist+lora": "m2ist/X/d"}
    for name, (millions, _) in train.PAPER_COSTS.items():
        row = rows.get(name, name if "/" in name else f"m2ist/I/{name}")
        assert COUNTS[row][1] == millions, name


def test_the_papers_way_of_counting_gives_the_papers_figures():
    """[D11] Six shared up-projections twice, and six more norms for VEA and LEA. [D41] Table IX has
    the bottleneck of IEA, not C_i. [D39] Of LoRA's ranks only 55 gives 2.37M."""
    norms = 6 * (2 * 256 + 2 * 768)          # weight and bias, for C_v and C_l
    for row, experts, bottleneck in (
            ("I/m2ist", 1, 128), ("V/d", 1, None), ("V/e", 0, 128), ("VII/a", 1, 128),
            ("I/mrs-adapter", 0, 128), ("IX/a", 1, 32), ("IX/b", 1, 64)):
        ours, paper, _ = COUNTS[f"m2ist/{row}"]
        twice = 6 * (bottleneck * 256 + 256) if bottleneck else 0    # six layers to C_i = 256
        assert (ours + experts * norms + twice) / 1e6 == pytest.approx(paper, abs=0.006), row

    of_rank_1 = 6 * 2 * (256 + 256) + 12 * 2 * (768 + 768)    # q and v in each of 6 + 12 layers
    assert [r for r in range(1, 200) if round(r * of_rank_1 / 1e6, 2) == 2.37] == [55]


# --- What is where, at full size ------------------------------------------------------------------

DEEP = [7, 8, 9, 10, 11, 12]
ALL = list(range(1, 13))
EA = ["lea", "vea"]
IEA = ["shared_up", "text_down", "text_up", "vision_down"]    # no vision_up, as C_v = C_i


@pytest.mark.parametrize("row, insertion, text_layers, ports", [
    ("I/frozen", "side", DEEP, {}),
    ("I/lora", "side", DEEP, {}),
    ("X/d", "side", DEEP, {"attention": IEA, "ffn": EA}),
    ("V/b", "side", DEEP, {"ffn": ["lea"]}),
    ("V/c", "side", DEEP, {"ffn": ["vea"]}),
    ("V/d", "side", DEEP, {"ffn": EA}),
    ("V/e", "side", DEEP, {"attention": IEA}),
    ("V/f", "side", DEEP, {"attention": IEA, "ffn": EA}),
    ("VI/a", "side", DEEP, {"attention": EA, "ffn": EA}),
    ("VI/b", "side", DEEP, {"attention": IEA, "ffn": IEA}),
    ("VI/c", "side", DEEP, {"attention": EA, "ffn": IEA}),
    ("VII/a", "sequential", DEEP, {"attention": IEA, "ffn": EA}),
    ("VII/b", "parallel", DEEP, {"attention": IEA, "ffn": EA}),
    ("VIII/a", "side", [1, 2, 3, 4, 5, 6], {"attention": IEA, "ffn": EA}),
    ("VIII/b", "side", [1, 3, 5, 7, 9, 11], {"attention": IEA, "ffn": EA}),
    # M²IST Section II-B: in each layer of both encoders. [D39] Those with a shared part in pairs.
    ("I/adapter", "sequential", ALL, {"attention": EA, "ffn": EA}),
    ("I/adaptformer", "parallel", ALL, {"ffn": EA}),
    ("I/cm-adapter", "sequential", DEEP, {"attention": IEA, "ffn": IEA}),
    ("I/mrs-adapter", "parallel", DEEP, {"ffn": IEA}),
])
def test_which_adapters_a_row_has_and_where(row, insertion, text_layers, ports):
    """M²IST Tables I, V-VIII: the adapters of a pair of layers; beside the encoders, or inside the
    layers. A text layer without a vision layer has LEA alone."""
    _, model = full_size(f"m2ist/{row}")
    assert model.adapters.layers == {"vision": [1, 2, 3, 4, 5, 6], "text": text_layers}
    for number, block in enumerate(model.adapters.blocks):
        parts = {port: sorted(name for name, _ in adapter.named_children())
                 for port, adapter in block.items()}
        assert parts == (ports if number < 6 else {port: ["lea"] for port in ports})

    for tower, layers in model.adapters.layers.items():
        for number, layer in enumerate(getattr(model, tower).layers, start=1):
            here = ports if insertion != "side" and number in layers else {}
            assert set(layer.plugs) == set(here)
            assert all(plug.insertion == insertion for plug in layer.plugs.values())


def text(layers):
    return " ".join(str(layer) for layer in layers)


BRIDGES = "cross-modal bridges at vision layers 4 8 12"
LORA_ON_CLIP = ["LoRA on q/k/v/out of vision layers " + text(ALL),
                "LoRA on q/k/v/out of text layers " + text(ALL)]
LORA_ON_DETR = ["LoRA on q/v of vision layers 1 2 3 4 5 6",
                "LoRA on q/v of text layers " + text(ALL)]


@pytest.mark.parametrize("row, stages, groups", [
    # M²IST: LoRA is one stage that lasts the whole training [D39].
    ("m2ist/I/full", [0], ["vision encoder", "text encoder"]),
    ("m2ist/I/frozen", [0], []),
    ("m2ist/I/m2ist", [0], ["adapters"]),
    ("m2ist/I/lora", [1], LORA_ON_DETR),
    ("m2ist/X/d", [1], ["adapters", *LORA_ON_DETR]),
    # HiVG Eq. (6): stage j of three trains vision layers 1 .. 4 j.
    ("hivg/3/1", [0], []),
    ("hivg/3/2", [0], [BRIDGES]),
    ("hivg/3/3", [0, 1, 2, 3], LORA_ON_CLIP),
    ("hivg/3/4", [0, 1, 2, 3], [BRIDGES, *LORA_ON_CLIP]),
    ("hivg/5/1", [0, 1], [BRIDGES, "LoRA on q/k/v/out of vision layers 1 2 3 4", LORA_ON_CLIP[1]]),
    ("hivg/5/2", [0, 1, 2],
     [BRIDGES, "LoRA on q/k/v/out of vision layers 1 2 3 4 5 6 7 8", LORA_ON_CLIP[1]]),
    ("hivg/5/4", [0, 1, 2], [BRIDGES, *LORA_ON_CLIP]),
    ("hivg/5/5", [0, 1, 2, 3, 4], [BRIDGES, *LORA_ON_CLIP]),
    ("hivg/fig4d/original-clip", [0], []),
    ("hivg/fig4d/clip-vanilla-lora", [0, 1], LORA_ON_CLIP),
    ("hivg/fig4d/vanilla-lora", [0, 1], [BRIDGES, *LORA_ON_CLIP]),
    ("hivg/11/1", [0], []),
])
def test_what_a_row_trains_and_in_which_stages(row, stages, groups):
    """The stages of its plan, and what the last of them trains beside the grounding encoder."""
    args, model = full_size(row)
    assert [phase.stage for phase in train.plan(args)] == stages
    assert set(m.tuned_groups(model)) == {*groups, "grounding encoder and box head"}
    for lora in hilora.lora_modules(model).values():
        assert lora.scale == (1 if row.startswith("m2ist") else 0.5)


def test_stages_from_deep_to_shallow():
    """HiVG Table 5, line 8: stage 1 trains the deepest group, on DETR as on CLIP."""
    args = arguments("hivg/5/8", "--size", "base")
    found = m.what_trains("hivg", 1, deep_to_shallow=args.deep_to_shallow)
    assert "LoRA on q/k/v/out of vision layers 9 10 11 12" in found
    found = m.what_trains("lora", 1, "tiny", stages=2, deep_to_shallow=True)
    assert "LoRA on q/v of vision layers 2" in found


def test_the_text_that_the_bridges_of_a_row_see():
    """HiVG Tables 4 and 10. In line 7 each bridge sees the text layer of its own number."""
    for row, layers in (("4/6", ALL), ("4/8", [12]), ("10/3", [6, 12]), ("10/4", [1, 4, 8, 12])):
        assert full_size(f"hivg/{row}")[1].text_layers == layers
    _, model = full_size("hivg/4/7")
    for layer in (4, 8, 12):
        bridge = model.clip.vision.layers[layer - 1].plugs["attention"]
        assert model.text_layers[bridge.only] == layer
    args = arguments("hivg/4/7", "--bridge-layers", "1", "2")
    with pytest.raises(m.ModelError, match="2 bridges need as many text layers, not 3"):
        m.build_model(**train.model_arguments(args))


@pytest.mark.parametrize("row, levels", [
    (1, [12]), (2, [2, 5, 9]), (3, [2, 5, 9, 12]), (4, [1, 4, 8, 12]), (5, [3, 6, 9, 12]),
    (6, [6, 7, 8, 9, 10, 11, 12]), (7, ALL)])
def test_the_vision_layers_of_hivg_table_11(row, levels):
    """Eq. (1): the layers that are grounded, without bridges, HiLoRA and RTCC."""
    args, model = full_size(f"hivg/11/{row}")
    assert model.levels == levels
    assert (args.bridge_layers, args.stages, args.focal, args.dice) == ([], 0, 0, 0)
    assert args.contrast == 1


@pytest.mark.parametrize("row, weights", [
    ("9/1", (0, 0, 0)), ("9/2", (0, 20, 2)), ("9/3", (1, 0, 0)), ("9/4", (1, 20, 2)),
    ("fig4d/original-clip", (0, 0, 0)), ("fig4d/clip-vanilla-lora", (0, 0, 0))])
def test_the_losses_of_hivg_table_9_and_of_plain_clip(row, weights):
    """[D42], [D35]: the weights of the contrast, of focal and of dice."""
    args = arguments(f"hivg/{row}", "--size", "base")
    assert (args.contrast, args.focal, args.dice) == weights
    assert (args.l1, args.giou) == (2, 2)


# --- At tiny size: what a row computes ------------------------------------------------------------


def batch():
    """Random (images, image padding, tokens, token padding), and boxes: four samples."""
    g = torch.Generator().manual_seed(1)
    image_padding = torch.zeros(4, 64, 64, dtype=torch.bool)
    image_padding[:, 50:] = True
    images = torch.randn(4, 3, 64, 64, generator=g)
    tokens = torch.randint(5, 100, (4, 9), generator=g)
    token_padding = torch.arange(9) >= torch.tensor([[9], [5], [7], [8]])
    boxes = torch.rand(4, 4, generator=g) * 0.4 + 0.3
    return (images, image_padding, tokens, token_padding), boxes


def disturb(model):
    """Add noise to all that is tuned, the same for the same name: weights that start at 0 then make
    a difference."""
    for name, p in model.named_parameters():
        if p.requires_grad:
            g = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            with torch.no_grad():
                p.add_(0.1 * torch.randn(p.shape, generator=g))


@functools.cache
def sight(row):
    """All that can tell a row from another: its plan, where its LoRA is in its first stage and in
    its last, and its loss. On the way, a sample alone must come to what it comes to in a batch."""
    args, model = built(row)
    places = [list(hilora.lora_modules(model))]
    if args.stages:
        model.begin_stage(1)
        places.append(list(hilora.lora_modules(model)))
        model = last_stage(args)
    disturb(model)
    inputs, boxes = batch()
    with torch.no_grad():
        found = model.train()(*inputs, attention=True)    # without dropout at this size
        images, image_padding, tokens, token_padding = [part[1:2] for part in inputs]
        alone = model(images, image_padding, tokens[:, :5], token_padding[:, :5], attention=True)
    for name in ("boxes", "attention", "scores", "text", "image"):
        if getattr(found, name) is not None:
            torch.testing.assert_close(getattr(alone, name)[0], getattr(found, name)[1],
                                       atol=1e-5, rtol=1e-4, msg=f"{row}: {name}")
    loss = sum(train.weighted_losses(found, boxes, args).values())
    return train.plan(args), places, args.rank, args.alpha, loss.item()


def options_of(args):
    """The options of a run without its names."""
    return {**vars(args), "row": None, "title": None, "out": None}


# The row of each table that is the method as it is. (All rows of HiVG Table 11 differ from it.)
DEFAULT = {
    "m2ist/I": "m2ist", "m2ist/II": "128", "m2ist/V": "f", "m2ist/VI": "d", "m2ist/VII": "c",
    "m2ist/VIII": "c", "m2ist/IX": "c", "m2ist/X": "c", "hivg/3": "4", "hivg/4": "6", "hivg/5": "3",
    "hivg/9": "4", "hivg/10": "5", "hivg/fig4d": "stage-3", "hivg/11": None}


@pytest.mark.parametrize("table", DEFAULT)
def test_every_row_differs_from_all_others_of_its_table(table):
    """No switch is without effect, even at tiny size; and one row of a table is the method."""
    seen = []
    for row in train.ROWS:
        # Text layers 1, 4, 8 and 12 of twelve are all of tiny's three [D43].
        if row.startswith(f"{table}/") and row != "hivg/10/4":
            found = sight(row)
            assert found not in seen, row
            seen.append(found)

    if DEFAULT[table] is not None:
        plain = train.parse_args(["--method", table.partition("/")[0], "--weights", "random",
                                  "--device", "cpu"])
        assert options_of(arguments(f"{table}/{DEFAULT[table]}")) == options_of(plain)


@pytest.mark.parametrize("method, vision, text", [
    ("m2ist", None, None), ("frozen", None, None), ("adapter", 1, 1), ("adaptformer", 1, 1),
    ("cm-adapter", 1, 3), ("mrs-adapter", 1, 3), ("lora", 1, 1)])
def test_gradients_pass_an_encoder_from_its_first_inserted_module_on(method, vision, text):
    """vision, text: the first layer whose output has a gradient. Nothing before this layer is kept
    for the backward pass; of a side network's encoder, nothing at all. [D38] A model with something
    inserted starts as the frozen model."""
    _, model = built(f"m2ist/I/{method}")
    seen = {"vision": [], "text": []}
    for tower, found in seen.items():
        for layer in getattr(model, tower).layers:
            layer.register_forward_hook(
                lambda layer, inputs, out, found=found: found.append(out[0].requires_grad))
    inputs, _ = batch()
    boxes = model.train()(*inputs).boxes
    for tower, first in (("vision", vision), ("text", text)):
        for number, has_gradient in enumerate(seen[tower], start=1):
            assert has_gradient == (first is not None and number >= first)
    if method != "m2ist":
        assert torch.equal(boxes, built("m2ist/I/frozen")[1](*inputs).boxes)


# --- The command line -----------------------------------------------------------------------------


def test_a_row_sets_what_it_is_and_leaves_the_rest_to_flags():
    """[D43] At tiny size: a fourth of the bottleneck, a twentieth of the epochs, the same share of
    the layers."""
    args = arguments("m2ist/II/32", "--size", "base", "--lr", "0.5", "--bottleneck", "32")
    assert (args.method, args.bottleneck, args.lr) == ("m2ist", 32, 0.5)
    assert arguments("m2ist/II/32").bottleneck == 8
    assert arguments("m2ist/IX/a").interaction_bottleneck == 8
    assert arguments("m2ist/VIII/b").text_layers == [2, 4]
    assert arguments("hivg/11/2").vision_layers == [1, 3, 5]
    assert arguments("hivg/fig4d/vanilla-lora").stage_epochs == 3


@pytest.mark.parametrize("flags, message", [
    ("m2ist/V/z", "m2ist/V/z.*--row list"),
    ("hivg/3/1 --size large", "base and tiny"),
    ("m2ist/V/b --method hivg", "--row m2ist/V/b has method m2ist: leave out --method"),
    ("m2ist/II/32 --bottleneck 64", "--row m2ist/II/32 has bottleneck 8: leave out --bottleneck")])
def test_a_row_that_cannot_be_is_named(flags, message):
    """A row is of one paper, and of the sizes base and tiny."""
    with pytest.raises(InputError, match=message):
        train.parse_args(["--row", *flags.split(), "--device", "cpu"])


@pytest.mark.parametrize("row, epochs", [
    ("m2ist/X/d", ["--epochs", "3"]),
    ("hivg/4/7", ["--epochs", "1", "--stages", "2", "--stage-epochs", "1"])])
def test_a_row_trains_resumes_and_is_evaluated_under_its_name(tmp_path, monkeypatch, row, epochs):
    """The folder, the log and the evaluation of a run with --row, which flags have changed."""
    monkeypatch.chdir(tmp_path)
    flags = ["--row", row, "--weights", "random", "--limit", "16", "--batch-size", "8",
             "--device", "cpu", *epochs]
    train.main(flags)
    out, = Path("runs").iterdir()
    assert out.name.startswith(f"shapes-{row.replace('/', '-')}-0-")
    before = (out / "log.jsonl").read_text()
    log = [json.loads(line) for line in before.splitlines()]
    assert [line["epoch"] for line in log] == [1, 2, 3]

    best = max(log, key=lambda line: (line["val_acc@0.5"], line["epoch"]))
    result = evaluate.main([str(out), "--split", "val"])
    assert result["method"].startswith(f"{row} changed (")
    assert result["splits"]["val"]["mean_iou"] == pytest.approx(best["val_mean_iou"], abs=1e-6)

    train.main([*flags, "--resume"])    # the run is finished: nothing is trained again
    assert (out / "log.jsonl").read_text() == before
