"""Other people's weights: they give their outputs in our encoders, and are loaded key by key."""
import argparse
import re

import pytest
import torch
import torchvision
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.detr.modeling_detr import DetrEncoder, DetrSinePositionEmbedding

import evaluate
import losses
import model as m

# Weights for an encoder on the meta device are checked there, and not kept.
pytestmark = pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter")


def load_bert(text, folder):
    m.load_hub(text, str(folder), "--text-weights", m.BERT_TABLE, m.BERT_IGNORED)


def load_clip(clip, path):
    m.load_hub(clip, str(path), "--clip-weights", m.CLIP_TABLE, m.CLIP_IGNORED)


def encoder(name, method="m2ist", size="base", device="cpu"):
    """An encoder of full size with random weights. On the meta device it costs no memory and can
    only refuse weights."""
    with torch.device(device):
        return m.build_encoders(m.make_spec(method, size))[name]


def meta_state(model_class, config):
    """The state dict of one of transformers' models, without memory."""
    with torch.device("meta"):
        return model_class(config).state_dict()


def randomise(module):
    """Draw all parameters, norms and biases too, so that each of them shows in the output."""
    for name, p in module.named_parameters():
        if name != "logit_scale":
            torch.nn.init.normal_(p, std=0.3)


def assert_close(ours, theirs, real=...):
    """Equal where `real` is True, relative to their size."""
    limit = 1e-5 * max(1.0, theirs[real].abs().max().item())
    assert (ours[real] - theirs[real]).abs().max().item() <= limit


def assert_same_gradients(ours, theirs, ours_in, theirs_in, real):
    """The gradients of a random sum over the real tokens are equal.

    ours, theirs: outputs (B, N, C). ours_in, theirs_in: what they were computed from. real: (B, N).
    """
    weights = torch.randn_like(ours) * real[..., None]
    mine, = torch.autograd.grad((ours * weights).sum(), ours_in, retain_graph=True)
    hers, = torch.autograd.grad((theirs * weights).sum(), theirs_in, retain_graph=True)
    assert_close(mine, hers)


def assert_same_state(one, other):
    found = other.state_dict()
    assert set(found) == set(one.state_dict())
    for name, value in one.state_dict().items():
        assert torch.equal(value, found[name]), name


# --- ResNet-50 ------------------------------------------------------------------------------------


def test_resnet_body_is_torchvisions():
    """Our body, the mean over the places, and torchvision's last linear layer are torchvision's
    net, in one pass and in slices; in full fine-tuning its gradients are, too."""
    torch.manual_seed(0)
    frozen_norm = torchvision.ops.FrozenBatchNorm2d
    net = torchvision.models.resnet50(weights=None, norm_layer=frozen_norm).eval()
    for module in net.modules():
        if isinstance(module, frozen_norm):
            module.weight.uniform_(0.3, 0.7)
            module.bias.normal_(std=0.1)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    body = m.ResNetBody()
    body.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith("fc.")})
    assert len(body.state_dict()) == 265
    x = torch.randn(9, 3, 64, 64)
    expected = net(x)
    assert expected.std() > 0.01
    found = net.fc(body(x).mean((2, 3)))
    assert_close(found, expected)
    with torch.no_grad():
        assert_close(net.fc(body(x).mean((2, 3))), expected)    # slices of 8 images and 1

    expected.square().mean().backward()
    found.square().mean().backward()
    theirs = dict(net.named_parameters())
    for name in ("conv1.weight", "layer1.0.downsample.0.weight", "layer4.2.conv3.weight"):
        gradient = theirs[name].grad
        mine = body.get_parameter(name).grad
        assert (mine - gradient).abs().max() <= 1e-4 * gradient.abs().max(), name


# --- DETR's encoder -------------------------------------------------------------------------------

# The names of a layer's parts: ours, the official file's, and those of the hub's file.
DETR_PARTS = {
    "out": ("self_attn.out_proj", "self_attn.out_proj"),
    "fc1": ("linear1", "fc1"),
    "fc2": ("linear2", "fc2"),
    "norm1": ("norm1", "self_attn_layer_norm"),
    "norm2": ("norm2", "final_layer_norm")}


def detr_names(vision, hub=False):
    """The weights of our vision encoder as the official file names them, which packs q, k and v in
    one matrix, in this order; or as facebook/detr-resnet-50 on the hub does, unpacked."""
    state = vision.state_dict()
    named = {}
    for key, value in state.items():
        module, rest = key.split(".", 1)
        if module == "backbone":
            prefix = "model.backbone.conv_encoder.model" if hub else "backbone.0.body"
            named[f"{prefix}.{rest}"] = value.contiguous()
        elif module == "projection":
            named[f"{'model.input_projection' if hub else 'input_proj'}.{rest}"] = value
        else:
            layer, part, kind = rest.split(".")
            name = f"{'model' if hub else 'transformer'}.encoder.layers.{layer}"
            if part in DETR_PARTS:
                named[f"{name}.{DETR_PARTS[part][hub]}.{kind}"] = value
            elif hub:
                named[f"{name}.self_attn.{part}_proj.{kind}"] = value
            elif part == "q":
                rows = [state[key.replace(".q.", f".{other}.")] for other in "qkv"]
                named[f"{name}.self_attn.in_proj_{kind}"] = torch.cat(rows)
    return named


@pytest.fixture(scope="module")
def detr():
    """Our vision encoder of full size with random weights, and its state dict as the official file
    has it, with a decoder and heads."""
    vision = encoder("vision")
    torch.manual_seed(0)
    for value in vision.state_dict().values():
        value.uniform_()
    state = detr_names(vision)
    assert len(state) == 339
    state["transformer.decoder.norm.weight"] = torch.rand(256)
    state["class_embed.weight"] = torch.rand(92, 256)
    state["bbox_embed.layers.0.weight"] = torch.rand(256, 256)
    state["query_embed.weight"] = torch.rand(100, 256)
    return vision, state


def test_detr_encoder_equals_transformers():
    """Positions, outputs and gradients are transformers', where the image is."""
    torch.manual_seed(0)
    config = transformers.DetrConfig(
        use_timm_backbone=False, backbone=None, backbone_config=transformers.ResNetConfig(),
        d_model=32, encoder_layers=3, encoder_attention_heads=4, encoder_ffn_dim=48,
        attn_implementation="eager")
    theirs = DetrEncoder(config).eval()
    randomise(theirs)
    ours = m.VisionEncoder(torch.nn.Identity(), 5, 32, heads=4, hidden=48, layers=3,
                           dropout=0.1).eval()
    state = {f"projection.{name}": value for name, value in ours.projection.state_dict().items()}
    for key, value in theirs.state_dict().items():    # in memory the names are partly others
        key = key.replace("o_proj", "out_proj").replace("mlp.", "")
        state[f"model.encoder.{key}"] = value
    table = [("(projection.+)", r"\1"), *m.DETR_TABLE]
    m.import_weights(ours, state, table, m.NOTHING, "test")

    features = torch.randn(2, 5, 6, 7)
    padding = torch.zeros(2, 6, 7, dtype=torch.bool)
    padding[1, :, :2] = True
    padding[1, 4:] = True
    real = ~padding.flatten(1)
    embed = DetrSinePositionEmbedding(16, normalize=True)
    positions = embed(torch.Size([2, 32, 6, 7]), "cpu", torch.float32, ~padding)
    if positions.dim() == 4:    # transformers' layout depends on its version
        positions = positions.flatten(2).transpose(1, 2)
    assert_close(m.sine_position(padding, 32), positions)

    found = ours(features, padding)
    assert torch.equal(found.padding, ~real)
    x0 = found.x0
    expected = theirs(inputs_embeds=x0, attention_mask=real.long(),
                      spatial_position_embeddings=positions).last_hidden_state
    assert_close(found.x, expected, real)
    assert_same_gradients(found.x, expected, x0, x0, real)


def test_the_official_detr_file_and_the_hubs_load_key_by_key(detr, tmp_path):
    """The rows of a packed in-projection are those of q, k and v; the decoder is left out."""
    vision, state = detr
    torch.save({"model": state}, tmp_path / "detr.pth")
    found = encoder("vision")
    m.load_detr(found, tmp_path / "detr.pth")
    assert_same_state(found, vision)
    rows = state["transformer.encoder.layers.3.self_attn.in_proj_weight"]
    assert torch.equal(found.layers[3].k.weight, rows[256:512])

    hub = detr_names(vision, hub=True)
    assert "model.encoder.layers.5.self_attn.v_proj.bias" in hub
    assert "model.encoder.layers.0.final_layer_norm.weight" in hub
    hub["model.query_position_embeddings.weight"] = torch.rand(100, 256)
    save_file(hub, tmp_path / "model.safetensors")
    found = encoder("vision")
    m.load_detr(found, str(tmp_path))
    assert_same_state(found, vision)


def test_without_a_file_the_official_detr_is_fetched(detr, monkeypatch):
    """load_detr asks for DETR_URL, and an error names it and the way out."""
    _, state = detr
    vision = encoder("vision", device="meta")
    asked = []

    def fetch(url, **options):
        asked.append(url)
        return {"model": state}

    def no_network(url, **options):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    m.load_detr(vision)
    assert asked == [m.DETR_URL]
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    with pytest.raises(m.ModelError, match="cannot fetch .*detr.*no network.*--vision-weights"):
        m.load_detr(vision)


@pytest.mark.parametrize("key, value, words", [
    ("input_proj.bias", None, "Missing .*projection.bias"),
    ("segmentation.weight", torch.rand(1), "Unexpected .*segmentation.weight"),
    ("input_proj.weight", torch.rand(256, 512, 1, 1), "size mismatch for projection.weight"),
])
def test_a_key_that_does_not_fit_is_named(detr, key, value, words):
    """A missing key, an unexpected key and a key of another shape are errors of one line."""
    state = dict(detr[1])
    state.pop(key, None)
    if value is not None:
        state[key] = value
    with pytest.raises(m.ModelError, match=f"detr.pth: these weights do not fit.*{words}"):
        m.import_weights(encoder("vision", device="meta"), state, m.DETR_TABLE, m.DETR_IGNORED,
                         "detr.pth")


@pytest.mark.parametrize("name, content", [
    ("bytes.pth", b"nothing"), ("bytes.safetensors", b"nothing"), ("list.pth", [1, 2]),
    ("model.pth", {"model": [1]}), ("numbers.pth", {3: torch.rand(1)}), ("gone.pth", None)])
def test_a_file_that_holds_no_weights_is_named(tmp_path, name, content):
    """Bytes of another kind, a list, a list under "model", keys that are no names, and no file."""
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content is not None:
        torch.save(content, tmp_path / name)
    words = "no such file" if content is None else "(not a file of|these) weights"
    with pytest.raises(m.ModelError, match=f"{name}: {words}"):
        m.load_detr(encoder("vision", device="meta"), tmp_path / name)


@pytest.mark.parametrize("name", ["model", "state_dict", "model_state_dict"])
def test_a_state_dict_is_found_in_what_a_training_script_saves(name):
    """Under one of three names, and with the prefixes of DDP and of torch.compile."""
    content = {"epoch": 3, name: {"module._orig_mod.fc.weight": 1, "module._orig_mod.fc.bias": 2}}
    assert m.state_in(content, "test") == {"fc.weight": 1, "fc.bias": 2}


# --- BERT -----------------------------------------------------------------------------------------


def test_bert_equals_transformers(tmp_path):
    """The embedded tokens, the outputs and the gradients are transformers'. The weights come from a
    folder of the masked language model, heads too, and from a file as the first ones are: a
    pytorch_model.bin that calls a LayerNorm's parameters gamma and beta."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=20, attn_implementation="eager")
    language_model = transformers.BertForMaskedLM(config).eval()
    randomise(language_model)
    language_model.save_pretrained(tmp_path)
    bert = language_model.bert
    ours = m.TextEncoder(60, 20, 32, heads=4, hidden=48, layers=3, dropout=0.1).eval()
    load_bert(ours, tmp_path)

    tokens = torch.randint(1, 60, (3, 11))    # theirs keep no gradient for 0, [PAD]
    padding = torch.arange(11) >= torch.tensor([[11], [8], [5]])
    theirs = bert(tokens, attention_mask=(~padding).long(), output_hidden_states=True).hidden_states
    found = ours(tokens, padding)
    assert_close(found.x0, theirs[0])
    assert_close(found.x, theirs[-1], ~padding)
    assert_same_gradients(found.x, theirs[-1], ours.word.weight,
                          bert.embeddings.word_embeddings.weight, ~padding)

    old = {}
    for key, value in load_file(tmp_path / "model.safetensors").items():
        key = key.replace("LayerNorm.weight", "LayerNorm.gamma")
        old[key.replace("LayerNorm.bias", "LayerNorm.beta")] = value
    (tmp_path / "model.safetensors").unlink()
    torch.save(old, tmp_path / "pytorch_model.bin")
    again = m.TextEncoder(60, 20, 32, heads=4, hidden=48, layers=3, dropout=0.1)
    load_bert(again, tmp_path)
    assert_same_state(again, ours)


def test_bert_base_has_the_names_and_shapes_of_ours():
    """bert-base-uncased is transformers' BertConfig as it is."""
    state = meta_state(transformers.BertModel, transformers.BertConfig())
    m.import_weights(encoder("text", device="meta"), state, m.BERT_TABLE, m.BERT_IGNORED, "bert")


@pytest.mark.parametrize("load, name, flag", [
    (m.load_detr, "vision", "--vision-weights"), (load_bert, "text", "--text-weights")])
def test_a_folder_that_is_not_there_names_the_flag(tmp_path, load, name, flag):
    """And the way out."""
    words = f"no .*/nowhere as a folder or on the hub .*: give {flag} FOLDER. .*--size tiny, or --weights random"
    with pytest.raises(m.ModelError, match=words):
        load(encoder(name, device="meta"), str(tmp_path / "nowhere"))


def test_a_hub_that_does_not_answer_is_not_asked_again_and_again(monkeypatch):
    """Its retries take a minute, so one question comes first. What the cache holds is found."""
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")    # where nobody listens
    evaluate.go_offline_without_hub()
    assert constants.HF_HUB_OFFLINE
    with pytest.raises(m.ModelError, match="no nobody/has-this as a folder or on the hub"):
        m.find_weights("nobody/has-this", "--text-weights")


# --- CLIP -----------------------------------------------------------------------------------------


def random_clip(folder):
    """transformers' CLIP with random weights, saved to the folder, and ours loaded from there."""
    torch.manual_seed(0)
    shared = {"num_attention_heads": 4, "num_hidden_layers": 3, "intermediate_size": 48,
              "projection_dim": 20}
    text = {"vocab_size": 60, "hidden_size": 24, "max_position_embeddings": 16, "eos_token_id": 59,
            "bos_token_id": 1, "pad_token_id": 0, **shared}
    vision = {"hidden_size": 32, "image_size": 32, "patch_size": 8, **shared}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)
    theirs = transformers.CLIPModel(config).eval()
    randomise(theirs)
    theirs.save_pretrained(folder)

    shared = {"heads": 4, "hidden": 48, "layers": 3, "embedding": 20}
    ours = m.Clip(m.ClipVision(32, 8, 32, **shared), m.ClipText(60, 16, 24, **shared)).eval()
    load_clip(ours, folder)
    return theirs, ours


def test_clip_equals_transformers(tmp_path):
    """The outputs of every layer, the gradients, the embeddings, and CLIP's own loss, which HiVG
    Eqs. (9)-(11) are. Texts of 9, 6 and 4 tokens end in [EOS], number 59."""
    theirs, ours = random_clip(tmp_path)
    images = torch.randn(3, 3, 32, 32, requires_grad=True)
    lengths = torch.tensor([[9], [6], [4]])
    padding = torch.arange(9) >= lengths
    tokens = torch.randint(2, 59, (3, 9)).masked_fill(padding, 0).scatter(1, lengths - 1, 59)
    out = theirs(input_ids=tokens, pixel_values=images, attention_mask=(~padding).long(),
                 output_hidden_states=True, return_loss=True)
    image = ours.vision(images, torch.zeros(3, 32, 32, dtype=torch.bool))
    text = ours.text(tokens, padding)
    words = theirs.text_model.embeddings.token_embedding.weight
    for mine, other, mine_in, other_in in (
            (image, out.vision_model_output, images, images),
            (text, out.text_model_output, ours.text.word.weight, words)):
        states = other.hidden_states    # they begin with the input of layer 1
        assert len(mine.states) == len(states) - 1 == 3
        for one, two in zip(mine.states, states[1:]):
            assert_close(one, two, ~mine.padding)
        assert_same_gradients(mine.states[-1], states[-1], mine_in, other_in, ~mine.padding)

    assert_close(torch.nn.functional.normalize(image.embedding, dim=-1), out.image_embeds)
    assert_close(torch.nn.functional.normalize(text.embedding, dim=-1), out.text_embeds)
    temperature = (-ours.logit_scale).exp()
    assert temperature.item() == pytest.approx(1 / theirs.logit_scale.exp().item(), rel=1e-5)
    loss = losses.contrastive_loss(text.embedding, image.embedding, temperature)
    assert loss.item() == pytest.approx(out.loss.item(), rel=1e-4)


def test_clip_in_half_precision_is_loaded_as_float32(tmp_path):
    theirs, ours = random_clip(tmp_path)
    theirs.half().save_pretrained(tmp_path)
    load_clip(ours, tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    weight = theirs.text_model.encoder.layers[1].self_attn.out_proj.weight
    assert torch.equal(ours.text.layers[1].out.weight, weight.float())


@pytest.mark.parametrize("size", ["base", "large"])
def test_full_size_clip_has_the_names_and_shapes_of_ours(size):
    """CLIP B/16 and L/14. A key that is not there is named."""
    spec = m.make_spec("hivg", size)
    configs = {}
    for side in ("text", "vision"):
        configs[side] = {"hidden_size": spec[side]["dim"],
                         "num_hidden_layers": spec[side]["layers"],
                         "num_attention_heads": spec[side]["heads"],
                         "intermediate_size": spec[side]["hidden"]}
    configs["vision"]["patch_size"] = spec["stride"]
    config = transformers.CLIPConfig(text_config=configs["text"], vision_config=configs["vision"],
                                     projection_dim=spec["text"]["embedding"])
    state = meta_state(transformers.CLIPModel, config)
    ours = encoder("clip", "hivg", size, "meta")
    m.import_weights(ours, state, m.CLIP_TABLE, m.CLIP_IGNORED, "clip")
    last = spec["vision"]["layers"] - 1
    del state[f"vision_model.encoder.layers.{last}.mlp.fc2.weight"]
    with pytest.raises(m.ModelError, match=f"clip: .*Missing .*vision.layers.{last}.fc2.weight"):
        m.import_weights(ours, state, m.CLIP_TABLE, m.CLIP_IGNORED, "clip")


# --- Files of HiVG's released code ----------------------------------------------------------------

PEFT = "clip.base_model.model"
LINEAR = "vision_model.encoder.layers.1.self_attn.q_proj"


@pytest.mark.parametrize("rank", [32, 8])
def test_clip_in_a_file_of_hivgs_is_merged_and_the_rest_is_named(tmp_path, capsys, rank):
    """W + 16/32 B A on the linear layer with LoRA; other weights as they are; bridges left out. No
    file says what α is, so another rank than HiVG's 32 is refused."""
    _, ours = random_clip(tmp_path)
    plain = load_file(tmp_path / "model.safetensors")
    A = torch.randn(rank, 32)
    B = torch.randn(32, rank)
    state = {f"{PEFT}.{key}": value for key, value in plain.items()}
    state[f"{PEFT}.{LINEAR}.base_layer.weight"] = state.pop(f"{PEFT}.{LINEAR}.weight")
    state[f"{PEFT}.{LINEAR}.lora_A.default.weight"] = A
    state[f"{PEFT}.{LINEAR}.lora_B.default.weight"] = B
    state[f"{PEFT}.vision_model.encoder.layers.0.cross_norm.weight"] = torch.rand(32)
    state["reg_token.weight"] = torch.rand(1, 32)
    path = tmp_path / "best.pth"
    torch.save({"model": state, "args": argparse.Namespace(lr=1)}, path)
    if rank == 8:
        with pytest.raises(m.ModelError, match="best.pth: .*q_proj.lora_A.weight has rank 8"):
            load_clip(ours, path)
        return

    load_clip(ours, path)
    assert_close(ours.vision.layers[1].q.weight, plain[f"{LINEAR}.weight"] + 16 / 32 * B @ A)
    k = plain["vision_model.encoder.layers.1.self_attn.k_proj.weight"]
    assert torch.equal(ours.vision.layers[1].k.weight, k)
    printed = capsys.readouterr().out
    assert "cross_norm" in printed and "reg_token" in printed


@pytest.mark.parametrize("missing", ["x.lora_B.weight", "x.weight"])
def test_lora_without_its_other_half_or_its_linear_layer_is_refused(missing):
    """The error names the file and the key."""
    state = {"x.lora_A.weight": torch.rand(32, 4), "x.lora_B.weight": torch.rand(4, 32),
             "x.weight": torch.rand(4, 4)}
    del state[missing]
    with pytest.raises(m.ModelError, match=f"best.pth: '{missing}' is missing"):
        m.merge_peft(state, "best.pth")


# --- Tokenizers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method, weights, name, vocabulary, flag", [
    ("m2ist", None, "bert-base-uncased", 30522, "--text-weights"),
    ("m2ist", "folder", "folder", 30522, "--text-weights"),
    ("hivg", "file", "openai/clip-vit-base-patch16", 49408, "--clip-weights"),
])
def test_the_tokenizer_is_that_of_the_text_encoders_weights(tmp_path, monkeypatch, method, weights,
                                                           name, vocabulary, flag):
    """A file holds weights alone, so that its tokenizer is the one of the size's default. Random
    encoders take the small vocabulary, because theirs means nothing."""
    asked = []
    monkeypatch.setattr(evaluate, "cached_tokenizer", lambda *arguments: asked.append(arguments))
    spec = {**m.make_spec(method, "base"), "weights": "pretrained"}
    if weights == "file":
        weights = tmp_path / "file"
        weights.write_bytes(b"")
    if weights is not None:
        spec[flag.removeprefix("--").replace("-", "_")] = weights
    evaluate.make_tokenizer(spec)
    evaluate.make_tokenizer({**spec, "weights": "random"})
    assert asked == [(spec["max_tokens"], name, vocabulary, flag), (spec["max_tokens"],)]


# --- Weights of another architecture --------------------------------------------------------------


@pytest.mark.parametrize("name, method, weights, table, words", [
    ("text", "m2ist", (transformers.BertModel, transformers.BertConfig(hidden_size=384)),
     (m.BERT_TABLE, m.BERT_IGNORED), r"size mismatch for word.weight.*384.*\[30522, 768\].* more"),
    ("text", "m2ist", (transformers.BertModel, transformers.BertConfig(num_hidden_layers=6)),
     (m.BERT_TABLE, m.BERT_IGNORED), "Missing .*layers.6.q.weight"),
    ("clip", "hivg", (transformers.CLIPModel, transformers.CLIPConfig()),    # B/32
     (m.CLIP_TABLE, m.CLIP_IGNORED), r"mismatch for vision.position.*\[50, 768\].*\[197, 768\]"),
    ("vision", "m2ist", (transformers.BertModel, transformers.BertConfig()),
     (m.DETR_TABLE, m.DETR_IGNORED), "Missing .*backbone.conv1.weight.*Unexpected .*embeddings"),
])
def test_weights_of_another_architecture_are_refused_in_one_line(name, method, weights, table,
                                                                 words):
    """Hundreds of keys do not fit; the line has the first ones, with both shapes, and the file."""
    with pytest.raises(m.ModelError) as refused:
        m.import_weights(encoder(name, method, device="meta"), meta_state(*weights), *table,
                         "--text-weights a.bin")
    line = str(refused.value)
    assert line.startswith("--text-weights a.bin: these weights do not fit")
    assert re.search(words, line)
    assert "\n" not in line and len(line) < 1200
