"""Other people's weights: they give their outputs in our encoders, and are loaded key by key."""
import argparse
import http.server
import socket
import threading
import time

import pytest
import torch
import torchvision
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.detr.modeling_detr import DetrEncoder, DetrSinePositionEmbedding

import data
import losses
import model as m
from data import InputError


def load_bert(text, folder):
    m.load_hub(text, str(folder), "--text-weights", m.BERT_TABLE, m.BERT_IGNORED)


def load_clip(clip, path):
    m.load_hub(clip, str(path), "--clip-weights", m.CLIP_TABLE, m.CLIP_IGNORED)


def base_encoder(name, device="cpu"):
    """The vision encoder or the text encoder of M²IST at full size, with random weights. On the
    meta device it costs no memory and can only refuse weights."""
    spec = {"encoders": "detr", **m.SIZES["base"]["detr"]}
    with torch.device(device):
        return m.build_encoders(spec)[name]


def randomise(module):
    """Draw all parameters, norms and biases too, so that each of them shows in the output."""
    for name, p in module.named_parameters():
        if name != "logit_scale":
            torch.nn.init.normal_(p, std=0.3)


def largest_difference(a, b):
    return (a - b).abs().max().item()


def assert_same_gradients(ours, theirs, ours_in, theirs_in, real):
    """The gradients of a random sum over the real tokens are equal, relative to their size.

    ours, theirs: outputs (B, N, C). ours_in, theirs_in: what they were computed from. real: (B, N).
    """
    weights = torch.randn_like(ours) * real[..., None]
    mine, = torch.autograd.grad((ours * weights).sum(), ours_in, retain_graph=True)
    hers, = torch.autograd.grad((theirs * weights).sum(), theirs_in, retain_graph=True)
    assert largest_difference(mine, hers) <= 1e-5 * max(1.0, hers.abs().max().item())


# --- ResNet-50 ------------------------------------------------------------------------------------


def test_resnet_body_is_torchvisions():
    """Our body, the mean over the places, and torchvision's last linear are torchvision's net, in
    one pass and in slices, with fused convolutions and without; its folded batch norms have the
    statistics of a loaded file."""
    torch.manual_seed(0)
    frozen_norm = torchvision.ops.FrozenBatchNorm2d
    net = torchvision.models.resnet50(weights=None, norm_layer=frozen_norm).eval()
    for module in net.modules():
        if isinstance(module, frozen_norm):
            module.weight.uniform_(0.3, 0.7)
            module.bias.normal_(std=0.1)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    state = net.state_dict()
    del state["fc.weight"]
    del state["fc.bias"]
    body = m.ResNetBody()
    body.load_state_dict(state)
    assert len(body.state_dict()) == 265
    x = torch.randn(9, 3, 64, 64)
    expected = net(x)
    assert expected.std() > 0.01

    def classes(features):
        """features: (9, 2048, 2, 2)."""
        return net.fc(features.mean((2, 3)))

    assert torch.allclose(classes(body(x)), expected, atol=1e-5)    # tuned: nothing is folded
    body.requires_grad_(False)
    assert torch.allclose(classes(body(x)), expected, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(classes(body(x)), expected, atol=1e-5)    # slices of 8 and 1 pictures


def test_the_gradients_of_the_resnet_are_torchvisions():
    """In full fine-tuning the convolutions are trained through the frozen batch norms."""
    torch.manual_seed(0)
    frozen_norm = torchvision.ops.FrozenBatchNorm2d
    net = torchvision.models.resnet50(weights=None, norm_layer=frozen_norm).eval()
    for module in net.modules():
        if isinstance(module, frozen_norm):
            module.weight.uniform_(0.3, 0.7)
            module.running_var.uniform_(0.5, 1.5)
    body = m.ResNetBody()
    body.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith("fc.")})
    x = torch.randn(1, 3, 64, 64)
    net.fc = torch.nn.Identity()
    net(x).square().mean().backward()
    body(x).mean((2, 3)).square().mean().backward()
    theirs = dict(net.named_parameters())
    for name, p in body.named_parameters():
        gradient = theirs[name].grad
        assert (p.grad - gradient).abs().max() <= 1e-4 * gradient.abs().max(), name


# --- DETR's encoder -------------------------------------------------------------------------------

# The names of one layer: transformers' in memory, the official file's.
OFFICIAL_NAMES = {
    "self_attn.o_proj": "self_attn.out_proj",
    "self_attn.out_proj": "self_attn.out_proj",
    "mlp.fc1": "linear1",
    "mlp.fc2": "linear2",
    "fc1": "linear1",
    "fc2": "linear2",
    "self_attn_layer_norm": "norm1",
    "final_layer_norm": "norm2"}


def in_official_names(encoder):
    """The weights of transformers' DETR encoder as the official file has them."""
    state = encoder.state_dict()
    official = {}
    for key, value in state.items():
        _, layer, rest = key.split(".", 2)
        part, kind = rest.rsplit(".", 1)
        name = f"transformer.encoder.layers.{layer}"
        if part == "self_attn.q_proj":
            # The official file packs q, k and v into one matrix, in this order.
            rows = [state[key.replace("q_proj", f"{p}_proj")] for p in "qkv"]
            official[f"{name}.self_attn.in_proj_{kind}"] = torch.cat(rows)
        elif part not in ("self_attn.k_proj", "self_attn.v_proj"):
            official[f"{name}.{OFFICIAL_NAMES[part]}.{kind}"] = value
    return official


def their_positions(dim, padding):
    """transformers' sine positions for padding (B, H, W) -> (B, H*W, dim)."""
    B, H, W = padding.shape
    embed = DetrSinePositionEmbedding(dim // 2, normalize=True)
    positions = embed(torch.Size([B, dim, H, W]), "cpu", torch.float32, ~padding)
    if positions.dim() == 4:    # transformers' layout depends on its version
        positions = positions.flatten(2).transpose(1, 2)
    return positions


def test_detr_encoder_equals_transformers():
    """Positions, outputs and gradients are transformers', where the picture is."""
    torch.manual_seed(0)
    config = transformers.DetrConfig(
        use_timm_backbone=False, backbone=None, backbone_config=transformers.ResNetConfig(),
        d_model=32, encoder_layers=3, encoder_attention_heads=4, encoder_ffn_dim=48,
        attn_implementation="eager")
    detr = DetrEncoder(config).eval()
    randomise(detr)
    state = in_official_names(detr)
    state["input_proj.weight"] = torch.randn(32, 5, 1, 1)
    state["input_proj.bias"] = torch.randn(32)
    ours = m.VisionEncoder(torch.nn.Identity(), 5, 32, heads=4, hidden=48, layers=3,
                           dropout=0.1).eval()
    m.import_weights(ours, state, m.DETR_TABLE, m.DETR_IGNORED, "test")

    features = torch.randn(2, 5, 6, 7)
    padding = torch.zeros(2, 6, 7, dtype=torch.bool)
    padding[1, :, :2] = True
    padding[1, 4:] = True
    real = ~padding.flatten(1)
    positions = their_positions(32, padding)
    assert largest_difference(m.sine_position(padding, 32), positions) <= 1e-5

    x0 = ours.projection(features).flatten(2).transpose(1, 2).detach().requires_grad_()
    theirs = detr(inputs_embeds=x0, attention_mask=real.long(),
                  spatial_position_embeddings=positions).last_hidden_state
    x = m.run_layers(ours.layers, x0, ~real, m.sine_position(padding, 32)).x
    assert largest_difference(x[real], theirs[real]) <= 1e-5
    assert_same_gradients(x, theirs, x0, x0, real)

    # The whole encoder, from the features of the backbone, leads to the same tokens.
    whole = ours(features, padding).x
    assert largest_difference(whole[real], theirs[real]) <= 1e-5


def official_detr():
    """A random state dict of full size as the official file has it, with a decoder and heads."""
    with torch.device("meta"):
        vision = m.VisionEncoder(m.ResNetBody(), **m.SIZES["base"]["detr"]["vision"])
    parts = {"out": "self_attn.out_proj", "fc1": "linear1", "fc2": "linear2", "norm1": "norm1",
             "norm2": "norm2"}
    state = {}
    for key, value in vision.state_dict().items():
        module, rest = key.split(".", 1)
        if module == "backbone":
            state[f"backbone.0.body.{rest}"] = torch.rand(value.shape)
        elif module == "projection":
            state[f"input_proj.{rest}"] = torch.rand(value.shape)
        else:
            layer, part, kind = rest.split(".")
            name = f"transformer.encoder.layers.{layer}"
            if part == "q":
                rows = torch.rand(3 * 256, *value.shape[1:])
                state[f"{name}.self_attn.in_proj_{kind}"] = rows
            elif part in parts:
                state[f"{name}.{parts[part]}.{kind}"] = torch.rand(value.shape)
    assert len(state) == 339

    state["transformer.decoder.norm.weight"] = torch.rand(256)
    state["class_embed.weight"] = torch.rand(92, 256)
    state["bbox_embed.layers.0.weight"] = torch.rand(256, 256)
    state["query_embed.weight"] = torch.rand(100, 256)
    return state


def test_the_official_detr_file_loads_key_by_key(tmp_path):
    """The rows of a packed in-projection are those of q, k and v; the decoder is left out."""
    state = official_detr()
    torch.save({"model": state}, tmp_path / "detr.pth")
    vision = base_encoder("vision")
    m.load_detr(vision, tmp_path / "detr.pth")

    rows = state["transformer.encoder.layers.3.self_attn.in_proj_weight"]
    layer = vision.layers[3]
    assert torch.equal(layer.q.weight, rows[:256])
    assert torch.equal(layer.k.weight, rows[256:512])
    assert torch.equal(layer.v.weight, rows[512:])
    variance = state["backbone.0.body.layer4.2.bn3.running_var"]
    assert torch.equal(vision.backbone.layer4[2].bn3.running_var, variance)
    bias = state["transformer.encoder.layers.0.linear1.bias"]
    assert torch.equal(vision.layers[0].fc1.bias, bias)


def test_without_a_file_the_official_detr_is_fetched(monkeypatch):
    """load_detr asks for DETR_URL, and an error names it and the way out."""
    state = official_detr()
    asked = []

    def fetch(url, **options):
        asked.append(url)
        return {"model": state}

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    vision = base_encoder("vision")
    m.load_detr(vision)
    assert asked == [m.DETR_URL]
    assert torch.equal(vision.projection.bias, state["input_proj.bias"])

    def no_network(url, **options):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    with pytest.raises(InputError, match="cannot fetch .*no network.*--vision-weights FILE"):
        m.load_detr(vision)


@pytest.mark.parametrize("key, value, words", [
    ("input_proj.bias", None, "1 keys missing: projection.bias"),
    ("segmentation.weight", torch.rand(1), "1 keys unexpected: segmentation.weight"),
    ("input_proj.weight", torch.rand(256, 512, 1, 1), "another shape: projection.weight"),
])
def test_a_key_of_detr_that_does_not_fit_is_named(key, value, words):
    """A missing key, an unexpected key and a key of another shape are errors."""
    state = official_detr()
    state.pop(key, None)
    if value is not None:
        state[key] = value
    vision = base_encoder("vision", "meta")
    with pytest.raises(InputError, match=f"detr.pth: .*{words}"):
        m.import_weights(vision, state, m.DETR_TABLE, m.DETR_IGNORED, "detr.pth")


def test_a_refused_state_dict_changes_nothing():
    """All keys are checked before the first weight is copied."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(2, 2)
    before = linear.weight.clone()
    table = [("(.+)", r"\1")]
    with pytest.raises(InputError, match="missing: bias"):
        m.import_weights(linear, {"weight": torch.zeros(2, 2)}, table, m.NOTHING, "test")
    assert torch.equal(linear.weight, before)


def test_only_five_keys_are_named():
    """A file of another model has hundreds of wrong keys, and an error is one line."""
    with pytest.raises(InputError, match=r"test: 7 keys missing: a, b, c, d, e, \.\.\.$"):
        m.refuse_keys("test", "missing", list("abcdefg"))
    m.refuse_keys("test", "missing", [])


def test_a_file_that_holds_no_weights_is_named(tmp_path):
    """Bytes of another kind, a list, a list under "model", keys that are no names, and no file."""
    (tmp_path / "bytes.pth").write_bytes(b"nothing")
    (tmp_path / "bytes.safetensors").write_bytes(b"nothing")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"model": [1]}, tmp_path / "model.pth")
    torch.save({3: torch.rand(1)}, tmp_path / "numbers.pth")
    vision = base_encoder("vision", "meta")
    for name in ("bytes.pth", "bytes.safetensors", "list.pth", "model.pth", "numbers.pth",
                 "gone.pth"):
        with pytest.raises(InputError, match=name):
            m.load_detr(vision, tmp_path / name)


# What the official file calls a part, and what transformers calls it.
HUB_NAMES = [
    ("backbone.0.body.", "model.backbone.conv_encoder.model."),
    ("input_proj.", "model.input_projection."),
    ("transformer.", "model."),
    ("linear", "fc"),
    ("norm1", "self_attn_layer_norm"),
    ("norm2", "final_layer_norm"),
    ("class_embed", "class_labels_classifier"),
    ("bbox_embed", "bbox_predictor"),
    ("query_embed", "model.query_position_embeddings")]


def in_hub_names(official):
    """The official state dict as facebook/detr-resnet-50 on the hub names it, unpacked."""
    hub = {}
    for key, value in official.items():
        for old, new in HUB_NAMES:
            key = key.replace(old, new)
        if "in_proj_" in key:
            for part, rows in zip("qkv", value.chunk(3)):
                hub[key.replace("in_proj_", f"{part}_proj.")] = rows.clone()
        else:
            hub[key] = value
    return hub


def test_the_hubs_detr_is_the_official_one_by_other_names(tmp_path):
    """The official file and a folder in transformers' names load the same weights."""
    official = official_detr()
    hub = in_hub_names(official)
    assert "model.encoder.layers.5.self_attn.v_proj.bias" in hub
    assert "model.encoder.layers.0.final_layer_norm.weight" in hub
    torch.save({"model": official}, tmp_path / "detr.pth")
    save_file(hub, tmp_path / "model.safetensors")

    one = base_encoder("vision")
    other = base_encoder("vision")
    m.load_detr(one, str(tmp_path / "detr.pth"))
    m.load_detr(other, str(tmp_path))
    found = other.state_dict()
    assert set(found) == set(one.state_dict())
    for name, value in one.state_dict().items():
        assert torch.equal(value, found[name]), name


def test_an_address_that_never_answers_is_an_error_within_seconds(monkeypatch, tmp_path):
    """A firewall may swallow what is sent. The error names where the file may be put, too."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr(m, "PATIENCE", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/detr.pth"
        monkeypatch.setattr(m, "DETR_URL", url)
        began = time.time()
        with pytest.raises(InputError, match=f"cannot fetch {url} .*timed out.* {tmp_path}/check"):
            m.load_detr(base_encoder("vision", "meta"))
    assert time.time() - began < 20
    assert socket.getdefaulttimeout() is None


def test_a_folder_of_detr_that_is_wrong_is_refused(tmp_path):
    """A folder that is not there, and a key that is not in the file."""
    vision = base_encoder("vision", "meta")
    with pytest.raises(InputError, match="--vision-weights FOLDER"):
        m.load_detr(vision, str(tmp_path / "nowhere"))
    hub = in_hub_names(official_detr())
    del hub["model.encoder.layers.0.fc1.bias"]
    save_file(hub, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="missing: layers.0.fc1.bias"):
        m.load_detr(vision, str(tmp_path))


# --- BERT -----------------------------------------------------------------------------------------


def test_bert_equals_transformers(tmp_path):
    """The embedded tokens, the outputs and the gradients are transformers'."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=20, attn_implementation="eager")
    bert = transformers.BertModel(config).eval()
    randomise(bert)
    bert.save_pretrained(tmp_path)
    ours = m.TextEncoder(60, 20, 32, heads=4, hidden=48, layers=3, dropout=0.1).eval()
    load_bert(ours, tmp_path)

    tokens = torch.randint(60, (3, 11))
    padding = torch.arange(11) >= torch.tensor([[11], [8], [5]])
    real = ~padding
    theirs = bert(tokens, attention_mask=real.long(), output_hidden_states=True).hidden_states
    found = ours(tokens, padding)
    assert largest_difference(found.x0, theirs[0]) <= 1e-5
    assert largest_difference(found.x[real], theirs[-1][real]) <= 1e-5
    assert_same_gradients(found.x, theirs[-1], ours.word.weight,
                          bert.embeddings.word_embeddings.weight, real)


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory):
    """BERT-base with random weights as transformers saves the masked language model, heads too."""
    folder = tmp_path_factory.mktemp("bert")
    transformers.BertForMaskedLM(transformers.BertConfig()).save_pretrained(folder)
    return folder


def test_a_full_size_bert_folder_loads_key_by_key(bert_folder):
    """The names of the last layer and of an attention linear lead to the right weights."""
    text = base_encoder("text")
    load_bert(text, bert_folder)
    state = load_file(bert_folder / "model.safetensors")
    weight = state["bert.encoder.layer.11.output.dense.weight"]
    assert torch.equal(text.layers[11].fc2.weight, weight)
    bias = state["bert.encoder.layer.7.attention.self.key.bias"]
    assert torch.equal(text.layers[7].k.bias, bias)


def test_the_first_bert_files_load_too(bert_folder, tmp_path):
    """They call a LayerNorm's parameters gamma and beta, and are a pytorch_model.bin."""
    text = base_encoder("text")
    load_bert(text, bert_folder)
    old = {}
    for key, value in load_file(bert_folder / "model.safetensors").items():
        key = key.replace("LayerNorm.weight", "LayerNorm.gamma")
        key = key.replace("LayerNorm.bias", "LayerNorm.beta")
        old[key] = value
    torch.save(old, tmp_path / "pytorch_model.bin")
    again = base_encoder("text")
    load_bert(again, tmp_path)
    found = again.state_dict()
    for name, value in text.state_dict().items():
        assert torch.equal(value, found[name]), name


def test_a_bert_folder_that_is_wrong_is_refused(bert_folder, tmp_path):
    """A missing key is named, and a folder that is not there names the flag."""
    text = base_encoder("text", "meta")
    state = load_file(bert_folder / "model.safetensors")
    del state["bert.embeddings.token_type_embeddings.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="missing: token_type.weight"):
        load_bert(text, tmp_path)
    with pytest.raises(InputError, match="--text-weights FOLDER"):
        load_bert(text, tmp_path / "nowhere")


def test_without_a_network_the_hub_is_not_asked_again_and_again(monkeypatch):
    """Its retries take a minute, so one question comes first; what the cache holds is still found.
    A name that is a folder asks nobody."""
    from huggingface_hub import constants
    asked = []
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")    # where nobody listens
    monkeypatch.setattr(transformers.utils, "cached_file",
                        lambda *names, **options: asked.append(options["local_files_only"]))
    data.hub_answers.cache_clear()
    with pytest.raises(InputError, match="no bert-base-uncased as a folder or on the hub"):
        m.find_weights("bert-base-uncased", "--text-weights")
    assert asked == [True, True]
    data.hub_answers.cache_clear()


@pytest.mark.parametrize("status", [200, 404])
def test_any_answer_of_the_hub_is_an_answer(monkeypatch, status):
    """A hub that refuses the question is there."""
    from huggingface_hub import constants

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        data.hub_answers.cache_clear()
        assert data.may_ask_hub("bert-base-uncased")
        assert not data.may_ask_hub(".")
        server.shutdown()
    data.hub_answers.cache_clear()


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


def clip_inputs():
    """Pictures, and texts of 9, 6 and 4 tokens that end in [EOS], number 59."""
    images = torch.randn(3, 3, 32, 32)
    tokens = torch.randint(2, 59, (3, 9))
    padding = torch.zeros(3, 9, dtype=torch.bool)
    for i, length in enumerate([9, 6, 4]):
        tokens[i, length - 1] = 59
        tokens[i, length:] = 0
        padding[i, length:] = True
    return images, tokens, padding


def assert_same_states(ours, theirs, real):
    """The outputs of all layers are equal, relative to their size, where tokens are real."""
    assert len(ours) == len(theirs) - 1 == 3    # theirs begin with the input of layer 1
    for layer, state in enumerate(ours, start=1):
        limit = 1e-5 * max(1, state.abs().max().item())
        assert largest_difference(state[real], theirs[layer][real]) <= limit


def test_clip_equals_transformers_layer_by_layer_and_projected(tmp_path):
    """The outputs of every layer, the embeddings and the temperature are transformers'."""
    theirs, ours = random_clip(tmp_path)
    images, tokens, padding = clip_inputs()
    out = theirs(input_ids=tokens, pixel_values=images, attention_mask=(~padding).long(),
                 output_hidden_states=True)
    image = ours.vision(images, torch.zeros(3, 32, 32, dtype=torch.bool))
    text = ours.text(tokens, padding)
    assert_same_states(image.states, out.vision_model_output.hidden_states, ~image.padding)
    assert_same_states(text.states, out.text_model_output.hidden_states, ~padding)

    image_embedding = torch.nn.functional.normalize(image.embedding, dim=-1)
    text_embedding = torch.nn.functional.normalize(text.embedding, dim=-1)
    assert largest_difference(image_embedding, out.image_embeds) <= 1e-5
    assert largest_difference(text_embedding, out.text_embeds) <= 1e-5
    temperature = (-ours.logit_scale).exp().item()
    assert temperature == pytest.approx(1 / theirs.logit_scale.exp().item(), rel=1e-5)


def test_the_gradients_of_clip_are_transformers(tmp_path):
    """The gradients of both towers' last layers at the patches and at the words are equal."""
    theirs, ours = random_clip(tmp_path)
    images, tokens, padding = clip_inputs()
    images.requires_grad_()
    out = theirs(input_ids=tokens, pixel_values=images, attention_mask=(~padding).long(),
                 output_hidden_states=True)
    image = ours.vision(images, torch.zeros(3, 32, 32, dtype=torch.bool))
    text = ours.text(tokens, padding)
    assert_same_gradients(image.states[-1], out.vision_model_output.hidden_states[-1], images,
                          images, ~image.padding)
    assert_same_gradients(text.states[-1], out.text_model_output.hidden_states[-1],
                          ours.text.word.weight,
                          theirs.text_model.embeddings.token_embedding.weight, ~padding)


def test_hivg_eqs_9_to_11_are_clips_own_loss(tmp_path):
    """The contrastive loss of our embeddings and temperature is the loss of transformers' CLIP."""
    theirs, ours = random_clip(tmp_path)
    images, tokens, padding = clip_inputs()
    image = ours.vision(images, torch.zeros(3, 32, 32, dtype=torch.bool))
    text = ours.text(tokens, padding)
    temperature = (-ours.logit_scale).exp()
    mine = losses.contrastive_loss(text.embedding, image.embedding, temperature)
    hers = theirs(input_ids=tokens, pixel_values=images, attention_mask=(~padding).long(),
                  return_loss=True).loss
    assert mine.item() == pytest.approx(hers.item(), rel=1e-4)


def test_clip_in_half_precision_is_loaded_as_float32(tmp_path):
    """A file of float16 gives the same values in float32."""
    theirs, ours = random_clip(tmp_path)
    theirs.half().save_pretrained(tmp_path)
    load_clip(ours, tmp_path)
    for p in ours.parameters():
        assert p.dtype == torch.float32
    weight = theirs.text_model.encoder.layers[1].self_attn.out_proj.weight
    assert torch.equal(ours.text.layers[1].out.weight, weight.float())


@pytest.mark.parametrize("key, value, words", [
    ("vision_model", torch.tensor(1.0), "unexpected: vision_model"),
    ("logit_scale", None, "missing: logit_scale"),
    ("visual_projection.weight", torch.zeros(3, 32),
     r"another shape: vision.projection.weight is \[3, 32\], \[20, 32\] is needed"),
])
def test_a_key_of_clip_that_does_not_fit_is_named(tmp_path, key, value, words):
    """A missing key, an unexpected key and a key of another shape are errors."""
    _, ours = random_clip(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state.pop(key, None)
    if value is not None:
        state[key] = value
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=words):
        load_clip(ours, tmp_path)


def full_size_clip(spec):
    """transformers' CLIP with the widths of a spec, without memory."""
    configs = {}
    for side in ("text", "vision"):
        configs[side] = {"hidden_size": spec[side]["dim"],
                         "num_hidden_layers": spec[side]["layers"],
                         "num_attention_heads": spec[side]["heads"],
                         "intermediate_size": spec[side]["hidden"]}
    configs["vision"]["image_size"] = 224
    configs["vision"]["patch_size"] = spec["stride"]
    with torch.device("meta"):
        return transformers.CLIPModel(transformers.CLIPConfig(
            text_config=configs["text"], vision_config=configs["vision"],
            projection_dim=spec["text"]["embedding"]))


@pytest.mark.parametrize("size", ["base", "large"])
def test_full_size_clip_folders_load_key_by_key(tmp_path, size):
    """CLIP B/16 and L/14 as transformers saves them, every key with a value of its own."""
    spec = m.architecture("hivg", size)
    state = {}
    for i, (key, value) in enumerate(full_size_clip(spec).state_dict().items()):
        state[key] = torch.full(value.shape, i / 1000, dtype=torch.float16)
    save_file(state, tmp_path / "model.safetensors")
    with torch.device("meta"):
        ours = m.build_encoders(spec)["clip"]
    ours = ours.to_empty(device="cpu")
    load_clip(ours, tmp_path)

    last = spec["vision"]["layers"] - 1
    fc2 = f"vision_model.encoder.layers.{last}.mlp.fc2.weight"
    assert ours.vision.layers[last].fc2.weight[0, 0] == state[fc2][0, 0].float()
    projection = state["text_projection.weight"]
    assert ours.text.projection.weight[0, 0] == projection[0, 0].float()

    del state[fc2]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=f"missing: vision.layers.{last}.fc2.weight"):
        load_clip(ours, tmp_path)


# --- Files of HiVG's released code ----------------------------------------------------------------

HIVG = "clip.base_model.model"
LINEAR = "vision_model.encoder.layers.1.self_attn.q_proj"


def hivg_file(path, plain, A, B):
    """Save CLIP as HiVG's code does: in PEFT's names, with one pair, among HiVG's own keys."""
    state = {f"{HIVG}.{key}": value for key, value in plain.items()}
    state[f"{HIVG}.{LINEAR}.base_layer.weight"] = state.pop(f"{HIVG}.{LINEAR}.weight")
    state[f"{HIVG}.{LINEAR}.lora_A.default.weight"] = A
    state[f"{HIVG}.{LINEAR}.lora_B.default.weight"] = B
    state[f"{HIVG}.vision_model.encoder.layers.0.cross_norm.weight"] = torch.rand(32)
    state["reg_token.weight"] = torch.rand(1, 32)
    torch.save({"model": state, "args": argparse.Namespace(lr=1)}, path)


def test_clip_in_a_file_of_hivgs_is_merged_and_the_rest_is_named(tmp_path, capsys):
    """W + 16/32 B A on the linear with a pair; other weights as they are; bridges left out."""
    _, ours = random_clip(tmp_path)
    plain = load_file(tmp_path / "model.safetensors")
    A = torch.randn(32, 32)
    B = torch.randn(32, 32)
    hivg_file(tmp_path / "best.pth", plain, A, B)
    load_clip(ours, tmp_path / "best.pth")

    merged = plain[f"{LINEAR}.weight"] + 16 / 32 * B @ A
    assert torch.allclose(ours.vision.layers[1].q.weight, merged)
    k = plain["vision_model.encoder.layers.1.self_attn.k_proj.weight"]
    assert torch.equal(ours.vision.layers[1].k.weight, k)
    printed = capsys.readouterr().out
    assert "cross_norm" in printed
    assert "reg_token" in printed


def test_a_pair_of_another_rank_is_refused(tmp_path):
    """No file says what α is, and it is known for HiVG's rank 32 alone."""
    _, ours = random_clip(tmp_path)
    plain = load_file(tmp_path / "model.safetensors")
    hivg_file(tmp_path / "best.pth", plain, torch.randn(8, 32), torch.randn(32, 8))
    with pytest.raises(InputError, match="q_proj.lora_A.weight has rank 8"):
        load_clip(ours, tmp_path / "best.pth")


@pytest.mark.parametrize("missing", ["x.lora_B.weight", "x.weight"])
def test_a_pair_without_its_other_half_or_its_linear_is_refused(missing):
    """The error names the file and the key."""
    state = {"x.lora_A.weight": torch.rand(32, 4), "x.lora_B.weight": torch.rand(4, 32),
             "x.weight": torch.rand(4, 4)}
    del state[missing]
    with pytest.raises(InputError, match=f"best.pth: '{missing}' is missing"):
        m.merge_peft(state, "best.pth")


# --- Tokenizers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method, weights, name, vocabulary, flag", [
    ("m2ist", None, "bert-base-uncased", 30522, "--text-weights"),
    ("m2ist", "folder", "folder", 30522, "--text-weights"),
    ("hivg", None, "openai/clip-vit-base-patch16", 49408, "--clip-weights"),
    ("hivg", "file", "openai/clip-vit-base-patch16", 49408, "--clip-weights"),
])
def test_the_tokenizer_is_that_of_the_text_encoders_weights(tmp_path, monkeypatch, method, weights,
                                                           name, vocabulary, flag):
    """A file holds weights alone, so that its tokenizer is the one of the size's default."""
    asked = []

    def keep_arguments(*arguments):
        asked.append(arguments)

    monkeypatch.setattr(m, "cached_tokenizer", keep_arguments)
    spec = m.architecture(method, "base")
    spec["weights"] = "pretrained"
    (tmp_path / "file").write_bytes(b"")
    if weights == "file":
        weights = str(tmp_path / "file")
    if weights is not None:
        spec[flag.removeprefix("--").replace("-", "_")] = weights
    m.make_tokenizer(spec)
    assert asked == [(spec["max_tokens"], name, vocabulary, flag)]


@pytest.mark.parametrize("method, weights", [("m2ist", "random"), ("hivg", "shapes")])
def test_random_and_shapes_weights_have_the_tokenizer_of_shapes(method, weights):
    """Random encoders take the small vocabulary, because theirs means nothing."""
    spec = m.architecture(method, "tiny", max_tokens=12)
    spec["weights"] = weights
    tokenizer = m.make_tokenizer(spec)
    assert isinstance(tokenizer, data.Tokenizer)
    assert tokenizer.max_tokens == 12


# --- Weights of another architecture --------------------------------------------------------------


def meta_state(model_class, config):
    """The state dict of one of transformers' models, without memory."""
    with torch.device("meta"):
        return model_class(config).state_dict()


def detr_of(layers, blocks):
    """DETR's official state dict with another number of layers, and of blocks in layer3."""
    state = official_detr()
    for key in list(state):
        for layer in range(layers, 6):
            if key.startswith(f"transformer.encoder.layers.{layer}."):
                del state[key]
    for block in range(6, blocks):
        state[f"backbone.0.body.layer3.{block}.conv1.weight"] = torch.rand(256, 1024, 1, 1)
    return state


def test_a_bert_of_another_architecture_is_refused_in_one_line():
    """The line has what the weights have and what is needed, and no key."""
    small = transformers.BertConfig(num_hidden_layers=6, hidden_size=384, intermediate_size=1536)
    state = meta_state(transformers.BertModel, small)
    with pytest.raises(InputError) as refused:
        m.import_weights(base_encoder("text", "meta"), state, m.BERT_TABLE, m.BERT_IGNORED, "a.bin")
    assert str(refused.value) == (
        "a.bin: the weights of another architecture; they have hidden width 1536, width 384, "
        "layers 6, and the model needs hidden width 3072, width 768, layers 12")


def test_the_line_names_the_file_and_its_flag(tmp_path):
    """Whoever gave three files knows which of them is meant."""
    config = transformers.BertConfig(num_hidden_layers=1, hidden_size=24, intermediate_size=48,
                                     vocab_size=60)
    transformers.BertModel(config).save_pretrained(tmp_path)
    words = f"--text-weights {tmp_path}/model.safetensors: .*vocabulary 60.*needs.*vocabulary 30522"
    with pytest.raises(InputError, match=words):
        load_bert(base_encoder("text", "meta"), tmp_path)


@pytest.mark.parametrize("size, has, needs", [
    ("base", "vision positions 50, vision patch side 32",
     "vision positions 197, vision patch side 16"),
    ("large", "vision width 768, .*vision layers 12", "vision width 1024, .*vision layers 24")])
def test_a_clip_of_other_sizes_is_refused_by_them(size, has, needs):
    """CLIP B/32 is neither B/16 nor L/14."""
    state = meta_state(transformers.CLIPModel, transformers.CLIPConfig())    # B/32
    with torch.device("meta"):
        ours = m.build_encoders(m.architecture("hivg", size))["clip"]
    with pytest.raises(InputError, match=f"they have .*{has}.*, and the model needs .*{needs}"):
        m.import_weights(ours, state, m.CLIP_TABLE, m.CLIP_IGNORED, "--clip-weights b32")


@pytest.mark.parametrize("layers, blocks, has, needs", [
    (4, 6, "layers 4", "layers 6"),
    (6, 23, "backbone layer3 blocks 23", "backbone layer3 blocks 6")])
def test_a_detr_of_another_depth_is_refused_by_it(layers, blocks, has, needs):
    """Four layers of the encoder, and a ResNet-101 in place of a ResNet-50."""
    vision = base_encoder("vision", "meta")
    with pytest.raises(InputError, match=f"they have {has}, and the model needs {needs}$"):
        m.import_weights(vision, detr_of(layers, blocks), m.DETR_TABLE, m.DETR_IGNORED, "r101.pth")


def test_weights_of_another_kind_of_model_are_refused():
    """The names of BERT's weights are of no use to DETR's encoder."""
    state = meta_state(transformers.BertModel, transformers.BertConfig())
    with pytest.raises(InputError, match="bert.bin: the weights of another kind of model"):
        m.import_weights(base_encoder("vision", "meta"), state, m.DETR_TABLE, m.DETR_IGNORED,
                         "bert.bin")
