"""assets/pretrain_tiny.py: the pretext tasks, and the encoders that were shipped from them."""
import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import data
import losses
import model as m

ASSETS = Path(__file__).parent.parent / "assets"


def load_script():
    """The script as a module; it lies in a folder that is no package."""
    spec = importlib.util.spec_from_file_location("pretrain_tiny", ASSETS / "pretrain_tiny.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


pretrain_tiny = load_script()


# --- The shipped files ----------------------------------------------------------------------------


@pytest.mark.parametrize("encoders, method", [("detr", "m2ist"), ("clip", "hivg")])
def test_the_shipped_encoders_are_those_of_a_model_with_weights_shapes(encoders, method):
    """Every tensor of the file is in the model, in float32, and none is as it was drawn."""
    shipped = load_file(m.SHAPES_WEIGHTS[encoders])
    model = m.build_model(method, "tiny", "shapes").state_dict()
    random = m.build_model(method, "tiny", "random").state_dict()
    for name, value in shipped.items():
        assert value.dtype == torch.float32
        assert torch.equal(model[name], value), name
        assert not torch.equal(random[name], value), name


def test_the_shipped_files_are_small():
    """A clone stays small: under 4 MB together."""
    assert sum(path.stat().st_size for path in m.SHAPES_WEIGHTS.values()) < 4e6


def test_the_script_writes_what_the_model_loads(tmp_path):
    """Two runs of three steps give the same bits, under the names of the shipped file."""
    for folder in ("a", "b"):
        pretrain_tiny.main(["detr", "clip", "--steps", "3", "--out", str(tmp_path / folder)])
    for encoders, path in m.SHAPES_WEIGHTS.items():
        a = load_file(tmp_path / "a" / path.name)
        b = load_file(tmp_path / "b" / path.name)
        shipped = load_file(path)
        assert a.keys() == b.keys() == shipped.keys()
        for name, value in a.items():
            assert torch.equal(value, b[name]), name
            assert value.shape == shipped[name].shape, name


def test_the_script_overwrites_nothing(monkeypatch):
    """The shipped files are the reference: they are refused as a target."""
    def fail(encoders, steps):
        raise AssertionError("the pretraining began, and its end would overwrite a shipped file")

    monkeypatch.setattr(pretrain_tiny, "pretrain_encoders", fail)
    with pytest.raises(data.InputError, match="tiny-detr.safetensors is there already.*--out"):
        pretrain_tiny.main(["detr"])


def test_force_overwrites_and_leaves_no_other_file(tmp_path):
    """--force replaces a file that is there, and no half-written file stays beside it."""
    target = tmp_path / "tiny-detr.safetensors"
    target.write_bytes(b"old")
    pretrain_tiny.main(["detr", "--steps", "3", "--out", str(tmp_path), "--force"])
    assert load_file(target).keys() == load_file(m.SHAPES_WEIGHTS["detr"]).keys()
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("flags, message", [
    (["bert"], "unknown encoders 'bert'.*detr, clip"),
    (["--steps", "0"], "--steps is 0; it must be 1 or more"),
    (["--steps", "-1"], "--steps is -1; it must be 1 or more")])
def test_the_script_names_bad_input(tmp_path, flags, message):
    """A wrong name or number is refused before anything is written."""
    with pytest.raises(data.InputError, match=message):
        pretrain_tiny.main([*flags, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


# --- The pretext tasks ----------------------------------------------------------------------------


def test_pretext_vision_asks_for_the_object_that_covers_a_cell():
    """Colour, shape and box of a covered cell are those of a thing whose box holds its centre."""
    task = pretrain_tiny.PretextVision(torch.nn.Identity())
    centres = torch.tensor([[(x + 0.5) / 8, (y + 0.5) / 8] for y in range(8) for x in range(8)])
    for number in range(50):
        _, _, owner, things = pretrain_tiny.scene_item("detr", number)
        colour, shape, boxes = [part[0] for part in task.targets(owner[None], [things])]
        scene = data.scene(number).things
        assert [thing for thing, _ in things] == scene

        covered = colour < len(data.COLOURS)
        assert torch.equal(covered, owner >= 0)
        found = {(task.colours[c], data.SHAPES[s]) for c, s in zip(colour[covered], shape[covered])}
        assert found == {(thing.colour, thing.shape) for thing in scene}

        corners = losses.to_corners(boxes)
        left_of_centre = (corners[:, :2] - 1e-3 <= centres).all(1)
        right_of_centre = (centres <= corners[:, 2:] + 1e-3).all(1)
        assert (left_of_centre & right_of_centre)[covered].all()


def test_pretext_boxes_are_float64():
    """The shipped vision encoder was trained on boxes in float64. In float32 its weights come out
    different, but only after hundreds of steps, so no short run shows it."""
    task = pretrain_tiny.PretextVision(torch.nn.Identity())
    _, _, owner, things = pretrain_tiny.scene_item("detr", 0)
    _, _, boxes = task.targets(owner[None], [things])
    assert boxes.dtype == torch.float64


def test_pretext_scenes_are_of_no_split(monkeypatch):
    """The encoders have seen no picture of `shapes`, as real ones have seen none of a dataset's val
    and test pictures."""
    seen = []

    def fake_item(encoders, number):
        seen.append(number)
        return torch.zeros(1), torch.zeros(1), torch.zeros(1), []

    monkeypatch.setattr(pretrain_tiny, "scene_item", fake_item)
    for _ in range(20):
        pretrain_tiny.random_scenes("clip")
    scenes = data.PRETEXT.scenes
    assert data.PRETEXT.first == 0
    assert 0 <= min(seen) and scenes * 0.9 < max(seen) < scenes
    for split in data.SHAPES_SPLITS.values():
        assert split.first >= scenes


def test_pretext_text_hides_words_and_asks_for_all(monkeypatch):
    """15% of the real tokens are masked; the loss is over every real token, as it was."""
    torch.manual_seed(0)
    encoder = m.build_encoders(m.architecture("m2ist", "tiny"))["text"]
    task = pretrain_tiny.PretextText(encoder)
    shown = []
    encoder.register_forward_pre_hook(lambda module, inputs: shown.append(inputs))
    asked = []
    cross_entropy = torch.nn.functional.cross_entropy

    def recorded(scores, target):
        asked.append(target)
        return cross_entropy(scores, target)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", recorded)
    real = hidden = 0
    for _ in range(20):
        assert task().isfinite()
        tokens, padding = shown[-1]
        masked = tokens == task.tokenizer.mask
        assert len(asked[-1]) == (~padding).sum()
        assert torch.equal(asked[-1][~masked[~padding]], tokens[~padding & ~masked])
        assert task.tokenizer.mask not in asked[-1]
        real += int((~padding).sum())
        hidden += int(masked.sum())
    assert 0.13 < hidden / real < 0.17


def test_captions_say_what_an_object_is_and_where():
    """Size, colour and shape, then a place in words or as on a map."""
    rng = data.seeded(0)
    thing = data.Thing("red", "circle", "small", 20, 100, 12)
    captions = {pretrain_tiny.caption(rng, thing, [0.1, 0.7, 0.2, 0.2]) for _ in range(100)}
    expected = set()
    for size in ("small ", "little ", ""):
        expected.add(f"{size}red circle bottom left")
        expected.add(f"{size}red circle a 6")
    assert captions == expected

    middle = pretrain_tiny.caption(data.seeded(1), thing, [0.5, 0.5, 0.2, 0.2])
    assert middle.split()[-1] in ("circle", "5")    # no word for the middle
    tokenizer = data.Tokenizer(20)
    for text in captions:
        assert tokenizer.wordpiece.token_to_id("[UNK]") not in tokenizer(text)


def test_the_contrast_of_objects_is_of_the_cells_that_an_object_covers(monkeypatch):
    """The feature of an object is the mean of the tokens of its cells; its text is its caption."""
    torch.manual_seed(0)
    task = pretrain_tiny.PretextClip(m.build_model("clip-frozen", "tiny", "random").clip)
    monkeypatch.setattr(pretrain_tiny, "BATCH", 4)
    batch = pretrain_tiny.random_scenes("clip")
    tokens = task.encoder.vision(batch.images, batch.padding).x
    texts = []
    pooled = []

    def fake_texts(captions):
        texts.append(captions)
        return torch.randn(len(captions), 64)

    def fake_embed(x):
        pooled.append(x)
        return torch.randn(len(x), 64)

    task.embed_texts = fake_texts
    task.encoder.vision.embed = fake_embed
    assert task.loss(batch).isfinite()

    objects, whole = texts
    assert len(whole) == 4
    assert len(set(objects)) == len(objects) == len(pooled[-1])
    for text, row in zip(objects, pooled[-1]):
        distances = []
        for picture in range(4):
            for index, (thing, _) in enumerate(batch.things[picture]):
                if text in whole[picture] and f"{thing.colour} {thing.shape}" in text:
                    mean = tokens[picture, 1:][batch.owner[picture] == index].mean(0)
                    distances.append((row - mean).abs().max().item())
        assert min(distances) < 1e-5
