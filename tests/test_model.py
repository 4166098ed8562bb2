"""model.py against the reference models, against literal loops, and against what the design promises."""
import argparse
import copy
import math

import pytest
import torch
import torchvision
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.detr.modeling_detr import DetrEncoder, DetrSinePositionEmbedding

import hilora
import losses
import model as m
from adapters import CrossModalBridge


def tiny(method="m2ist", **options):
    torch.manual_seed(1)
    return m.build_model(method, "tiny", "random", **options)


def inputs(batch=3, text=9, seed=0):
    """A batch with padding at different places of pictures and of texts."""
    g = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 3, 64, 64, generator=g)
    image_padding = torch.zeros(batch, 64, 64, dtype=torch.bool)
    for i in range(batch):
        image_padding[i, :8 * i] = True
    images.masked_fill_(image_padding[:, None], 0)
    tokens = torch.randint(5, 150, (batch, text), generator=g)
    token_padding = torch.arange(text) >= torch.tensor([text - 2 * i for i in range(batch)])[:, None]
    return images, image_padding, tokens.masked_fill(token_padding, 0), token_padding


# ---------------------------------------------------------------------------------------------------------------------
# The layer

@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("activation, by_hand", [
    ("relu", lambda v: max(v, 0.0)), ("gelu", lambda v: v * 0.5 * (1 + math.erf(v / math.sqrt(2)))),
    ("quick_gelu", lambda v: v / (1 + math.exp(-1.702 * v)))])
def test_transformer_layer_is_the_formula(pre_norm, activation, by_hand):
    torch.manual_seed(0)
    layer = m.TransformerLayer(6, heads=2, hidden=5, activation=activation, pre_norm=pre_norm).double()
    x, position = torch.randn(4, 6).double(), torch.randn(4, 6).double()
    padding = torch.tensor([False, False, False, True])
    out, a, g = (t[0] for t in layer(x[None], padding[None], position[None]))

    h = layer.norm1(x) if pre_norm else x
    q, k, v = layer.q(h + position), layer.k(h + position), layer.v(h)       # positions: queries and keys only
    expected_a = torch.zeros(4, 6).double()
    for i in range(4):
        for head in (slice(0, 3), slice(3, 6)):
            weights = [math.exp(float((q[i, head] @ k[j, head]).detach()) / math.sqrt(3)) for j in range(3)]     # token 4 is padding
            for j in range(3):
                expected_a[i, head] += weights[j] / sum(weights) * v[j, head]
    expected_a = layer.out(expected_a)
    assert torch.allclose(a, expected_a, atol=1e-8)

    mid = x + expected_a if pre_norm else layer.norm1(x + expected_a)
    hidden = layer.fc1(layer.norm2(mid) if pre_norm else mid).detach().apply_(by_hand)
    assert torch.allclose(g, layer.fc2(hidden), atol=1e-6)
    assert torch.allclose(out, mid + g if pre_norm else layer.norm2(mid + g), atol=1e-6)


def test_attention_map_is_the_weights_that_the_layer_uses():
    torch.manual_seed(0)
    layer = m.TransformerLayer(8, heads=1, hidden=4)
    x, position, padding = torch.randn(2, 5, 8), torch.randn(5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    weights = layer.attention_map(x, padding, position)
    assert torch.allclose(layer.out((weights[:, None] @ layer.v(x))[:, 0]), layer(x, padding, position)[1][:, 0], atol=1e-5)
    assert torch.allclose(weights.sum(1), torch.ones(2)) and weights[1, 3:].abs().max() == 0


@pytest.mark.parametrize("port, index", [("attention", 1), ("ffn", 2)])
def test_a_plug_rewrites_its_port_before_the_residual(port, index):
    class Plug(torch.nn.Module):
        def forward(self, out, x, context):
            self.seen = x
            return 2 * out + context

    torch.manual_seed(0)
    layer, x, context = m.TransformerLayer(8, heads=2, hidden=4, pre_norm=True), torch.randn(2, 5, 8), torch.randn(2, 1, 8)
    plain = layer(x)
    layer.plugs[port] = Plug()
    changed = layer(x, context=context)
    assert torch.allclose(changed[index], 2 * plain[index] + context, atol=1e-6)
    assert torch.allclose(changed[0], layer.plugs[port].seen + changed[index] if port == "ffn"
                          else x + changed[1] + changed[2], atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Parity with transformers and torchvision, on random weights

def compare(ours, theirs, ours_in, theirs_in, real, limit=1e-5):
    """Equal where `real`, and the same gradients there at the input. Gradients are compared relative to their size."""
    assert (ours - theirs)[real].abs().max() <= limit
    weights = torch.randn_like(ours) * real[..., None]
    mine, = torch.autograd.grad((ours * weights).sum(), ours_in, retain_graph=True)
    hers, = torch.autograd.grad((theirs * weights).sum(), theirs_in, retain_graph=True)
    assert (mine - hers).abs().max() <= limit * max(1.0, hers.abs().max().item())


def test_bert_equals_transformers(tmp_path):
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=60, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
                                     intermediate_size=48, max_position_embeddings=20, attn_implementation="eager")
    bert = transformers.BertModel(config).eval()
    for p in bert.parameters():
        torch.nn.init.normal_(p, std=0.3)
    bert.save_pretrained(tmp_path)
    ours = m.TextEncoder(60, 20, 32, 4, 48, 3, 0.1).eval()
    load_bert(ours, str(tmp_path))
    tokens, padding = torch.randint(60, (3, 11)), torch.arange(11) >= torch.tensor([[11], [8], [5]])
    theirs = bert(tokens, attention_mask=(~padding).long(), output_hidden_states=True).hidden_states
    found = ours(tokens, padding)
    assert (found.x0 - theirs[0]).abs().max() <= 1e-5
    compare(found.x, theirs[-1], ours.word.weight, bert.embeddings.word_embeddings.weight, ~padding)


def random_clip(tmp_path, **vision):
    """transformers' CLIP with random weights, saved to tmp_path, and ours of the same shape loaded from there."""
    torch.manual_seed(0)
    both = dict(num_attention_heads=4, num_hidden_layers=3, intermediate_size=48, projection_dim=20)
    theirs = transformers.CLIPModel(transformers.CLIPConfig(
        text_config=dict(vocab_size=60, hidden_size=24, max_position_embeddings=16, eos_token_id=59, bos_token_id=1, pad_token_id=0, **both),
        vision_config=dict(hidden_size=32, image_size=32, patch_size=8, **both), projection_dim=20)).eval()
    for name, p in theirs.named_parameters():
        if name != "logit_scale":
            torch.nn.init.normal_(p, std=0.3)
    theirs.save_pretrained(tmp_path)
    both = dict(heads=4, hidden=48, layers=3, embedding=20)
    ours = m.Clip(m.ClipVision(32, 8, 32, **both), m.ClipText(60, 16, 24, **both)).eval()
    m.load_hub(ours, str(tmp_path), "--clip-weights", m.CLIP_TABLE, m.CLIP_IGNORED)
    return theirs, ours


def test_clip_equals_transformers_layer_by_layer_and_projected(tmp_path):
    theirs, ours = random_clip(tmp_path)
    images, tokens = torch.randn(3, 3, 32, 32), torch.randint(2, 59, (3, 9))
    padding = torch.arange(9) >= torch.tensor([[9], [6], [4]])
    tokens[torch.arange(3), (~padding).sum(1) - 1] = 59                                  # [EOS]
    tokens.masked_fill_(padding, 0)
    out = theirs(input_ids=tokens, pixel_values=images, attention_mask=(~padding).long(), output_hidden_states=True)
    image, text = ours.vision(images, torch.zeros(3, 32, 32, dtype=torch.bool)), ours.text(tokens, padding)
    for mine, hers, real in ((image, out.vision_model_output, slice(None)), (text, out.text_model_output, ~padding)):
        assert len(mine.states) == len(hers.hidden_states) - 1 == 3
        for layer, state in enumerate(mine.states, 1):
            assert (state - hers.hidden_states[layer])[real].abs().max() <= 1e-5 * max(1, state.abs().max().item())
    for mine, hers in ((image.embedding, out.image_embeds), (text.embedding, out.text_embeds)):
        assert (torch.nn.functional.normalize(mine, dim=-1) - hers).abs().max() <= 1e-5
    assert (-ours.logit_scale).exp().item() == pytest.approx(1 / theirs.logit_scale.exp().item(), rel=1e-5)
    mine = losses.contrastive_loss(text.embedding, image.embedding, (-ours.logit_scale).exp())
    hers = theirs(input_ids=tokens, pixel_values=images, attention_mask=(~padding).long(), return_loss=True).loss
    assert mine.item() == pytest.approx(hers.item(), rel=1e-4)                           # Eqs. (9)-(11) are CLIP's own loss


def test_clip_in_half_precision_is_loaded_as_float32_and_every_key_is_checked(tmp_path):
    theirs, ours = random_clip(tmp_path)
    theirs.half().save_pretrained(tmp_path)
    load = lambda: m.load_hub(ours, str(tmp_path), "--clip-weights", m.CLIP_TABLE, m.CLIP_IGNORED)
    load()
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert torch.equal(ours.text.layers[1].out.weight, theirs.text_model.encoder.layers[1].self_attn.out_proj.weight.float())
    state = load_file(tmp_path / "model.safetensors")
    for change, word in ((dict(vision_model=1.0), "unexpected: vision_model"), ({"logit_scale": None}, "missing: logit_scale"),
                         ({"visual_projection.weight": torch.zeros(3, 32)}, r"another shape: vision.projection.weight is \[3, 32\]")):
        changed = {k: torch.tensor(v) if isinstance(v, float) else v for k, v in {**state, **change}.items() if v is not None}
        save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(m.InputError, match=word):
            load()


def test_clip_text_is_causal_and_its_padding_seen_by_none(tmp_path):
    _, ours = random_clip(tmp_path)
    tokens, padding = torch.randint(2, 59, (1, 9)), torch.zeros(1, 9, dtype=torch.bool)
    first = ours.text(tokens, padding).states[-1][:, :5]
    tokens[:, 5:] = 3
    padding[:, 5:] = True
    assert torch.equal(ours.text(tokens, padding).states[-1][:, :5], first)


def test_a_patch_is_padding_if_no_pixel_of_it_is_of_the_picture():
    vision = m.ClipVision(32, 8, 16, 2, 16, 1, 8)
    padding = torch.zeros(1, 32, 32, dtype=torch.bool)
    padding[:, :9] = padding[:, :, 24:] = True               # a row of patches and one pixel row more; a column of patches
    found = vision(torch.randn(1, 3, 32, 32), padding).padding
    assert not found[0, 0] and found[0, 1:].view(4, 4).tolist() == [[True] * 4] + [[False] * 3 + [True]] * 3


HUB_TO_OFFICIAL = {"self_attn.o_proj": "self_attn.out_proj", "mlp.fc1": "linear1", "mlp.fc2": "linear2",
                   "self_attn_layer_norm": "norm1", "final_layer_norm": "norm2", "fc1": "linear1", "fc2": "linear2"}


def official_encoder(encoder):
    """transformers' DETR encoder in the official names, in-projections in one piece."""
    state, official = encoder.state_dict(), {}
    for key, value in state.items():
        layer, rest = key.split(".", 2)[1:]
        part, kind = rest.rsplit(".", 1)
        name = f"transformer.encoder.layers.{layer}."
        if part == "self_attn.q_proj":
            official[f"{name}self_attn.in_proj_{kind}"] = torch.cat(
                [state[key.replace("q_proj", f"{p}_proj")] for p in "qkv"])
        elif part not in ("self_attn.k_proj", "self_attn.v_proj"):
            official[f"{name}{HUB_TO_OFFICIAL.get(part, part)}.{kind}"] = value
    return official


def test_detr_encoder_equals_transformers():
    torch.manual_seed(0)
    config = transformers.DetrConfig(use_timm_backbone=False, backbone=None, backbone_config=transformers.ResNetConfig(),
                                     d_model=32, encoder_layers=3, encoder_attention_heads=4, encoder_ffn_dim=48,
                                     attn_implementation="eager")
    detr = DetrEncoder(config).eval()
    for p in detr.parameters():
        torch.nn.init.normal_(p, std=0.3)
    ours = m.VisionEncoder(torch.nn.Identity(), 5, 32, 4, 48, 3, 0.1).eval()
    state = {**official_encoder(detr), "input_proj.weight": torch.randn(32, 5, 1, 1), "input_proj.bias": torch.randn(32)}
    m.import_weights(ours, state, m.DETR_TABLE, m.DETR_IGNORED, "test")

    features, padding = torch.randn(2, 5, 6, 7), torch.zeros(2, 6, 7, dtype=torch.bool)
    padding[1, :, :2] = padding[1, 4:] = True
    x0 = ours.projection(features).flatten(2).transpose(1, 2).detach().requires_grad_()
    positions = DetrSinePositionEmbedding(16, normalize=True)(torch.Size([2, 32, 6, 7]), "cpu", torch.float32, ~padding)
    positions = positions.flatten(2).transpose(1, 2) if positions.dim() == 4 else positions
    assert (m.sine_position(padding, 32) - positions).abs().max() <= 1e-5
    theirs = detr(inputs_embeds=x0, attention_mask=(~padding).flatten(1).long(),
                  spatial_position_embeddings=positions).last_hidden_state
    features.requires_grad_()
    found = ours(features, padding)
    real = ~padding.flatten(1)
    found_x = m.run_layers(ours.layers, x0, ~real, m.sine_position(padding, 32)).x
    compare(found_x, theirs, x0, x0, real)
    assert (found.x - theirs)[real].abs().max() <= 1e-5         # and the whole encoder leads to the same tokens


def test_resnet_body_is_torchvisions():
    torch.manual_seed(0)
    net = torchvision.models.resnet50(weights=None, norm_layer=torchvision.ops.FrozenBatchNorm2d).eval()
    body = m.resnet50_body()
    body.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith("fc.")})
    assert len(body.state_dict()) == 265
    x = torch.randn(1, 3, 64, 64)
    assert torch.allclose(net.fc(body(x).mean((2, 3))), net(x), atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Weights in other people's names, at full size

def load_bert(text, folder):
    m.load_hub(text, folder, "--text-weights", m.BERT_TABLE, m.BERT_IGNORED)


def encoders(family="detr", size="base"):
    return m.build_encoders({"family": family, **m.SIZES[size][family]})


def official_detr():
    """A full-size random state dict in official DETR naming, with a decoder and heads as the real file has them."""
    with torch.device("meta"):
        vision = m.VisionEncoder(m.resnet50_body(), **m.SIZES["base"]["detr"]["vision"])
    state = {}
    for key, value in vision.state_dict().items():
        value = torch.rand(value.shape)
        if key.startswith("backbone."):
            state["backbone.0.body." + key.removeprefix("backbone.")] = value
        elif key.startswith("projection."):
            state["input_proj." + key.removeprefix("projection.")] = value
        else:
            _, layer, part, kind = key.split(".")
            name = f"transformer.encoder.layers.{layer}."
            if part == "q":
                state[f"{name}self_attn.in_proj_{kind}"] = torch.rand(3 * 256, *value.shape[1:])
            elif part not in "kv":
                state[name + {"out": "self_attn.out_proj", "fc1": "linear1", "fc2": "linear2"}.get(part, part) + "." + kind] = value
    assert len(state) == 339
    return state | {"transformer.decoder.norm.weight": torch.rand(256), "class_embed.weight": torch.rand(92, 256),
                    "bbox_embed.layers.0.weight": torch.rand(256, 256), "query_embed.weight": torch.rand(100, 256)}


def test_official_detr_file_loads_key_by_key(tmp_path):
    state, vision = official_detr(), encoders()["vision"]
    torch.save({"model": state}, tmp_path / "detr.pth")
    m.load_detr(vision, tmp_path / "detr.pth")
    rows = state["transformer.encoder.layers.3.self_attn.in_proj_weight"]
    for i, part in enumerate("qkv"):
        assert torch.equal(getattr(vision.layers[3], part).weight, rows[256 * i:256 * (i + 1)])
    assert torch.equal(vision.backbone.layer4[2].bn3.running_var, state["backbone.0.body.layer4.2.bn3.running_var"])
    assert torch.equal(vision.layers[0].fc1.bias, state["transformer.encoder.layers.0.linear1.bias"])

    def fails(change, *words):
        changed = dict(state)
        change(changed)
        with pytest.raises(m.InputError) as error:
            m.import_weights(vision, changed, m.DETR_TABLE, m.DETR_IGNORED, "detr.pth")
        assert all(word in str(error.value) for word in ("detr.pth", *words)), error.value
    fails(lambda s: s.pop("input_proj.bias"), "missing", "projection.bias")
    fails(lambda s: s.update({"segmentation.weight": torch.rand(1)}), "unexpected", "segmentation.weight")
    fails(lambda s: s.update({"input_proj.weight": torch.rand(256, 512, 1, 1)}), "another shape", "projection.weight")
    (tmp_path / "bad.pth").write_bytes(b"nothing")
    for number, content in enumerate(([1, 2], {"model": [1]}, {3: torch.rand(1)})):
        torch.save(content, tmp_path / f"odd{number}.pth")
    for bad in ("bad.pth", "gone.pth", "odd0.pth", "odd1.pth", "odd2.pth"):
        with pytest.raises(m.InputError, match=bad):
            m.load_detr(vision, tmp_path / bad)


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory):
    """BERT-base with random weights as transformers saves the masked language model, heads and all."""
    folder = tmp_path_factory.mktemp("bert")
    transformers.BertForMaskedLM(transformers.BertConfig()).save_pretrained(folder)
    return folder


def test_full_size_bert_folder_loads_key_by_key(bert_folder, tmp_path):
    text = encoders()["text"]
    load_bert(text, str(bert_folder))
    state = load_file(bert_folder / "model.safetensors")
    assert torch.equal(text.layers[11].fc2.weight, state["bert.encoder.layer.11.output.dense.weight"])
    assert torch.equal(text.layers[7].k.bias, state["bert.encoder.layer.7.attention.self.key.bias"])

    # the first BERT files: gamma and beta, and pytorch_model.bin
    old = {k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
           for k, v in state.items()}
    torch.save(old, tmp_path / "pytorch_model.bin")
    again = encoders()["text"]
    load_bert(again, str(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(text.state_dict().values(), again.state_dict().values()))

    broken = tmp_path / "broken"
    broken.mkdir()
    state.pop("bert.embeddings.token_type_embeddings.weight")
    save_file(state, broken / "model.safetensors")
    with pytest.raises(m.InputError, match="missing: token_type.weight"):
        load_bert(again, str(broken))
    with pytest.raises(m.InputError, match="text-weights"):
        load_bert(again, str(tmp_path / "nowhere"))


# ---------------------------------------------------------------------------------------------------------------------
# Counts at full size

def meta(method, size="base", **options):
    with torch.device("meta"):
        return m.build_model(method, size, "random", **options)


def count(module):
    return sum(p.numel() for p in module.parameters())


# M²IST Table II has 3.19M, 2.20M and 1.91M, which count the shared projection twice, and dead weights in the latter two.
@pytest.mark.parametrize("bottleneck, unique", [(128, 2_975_232), (32, 1_794_432), (8, 1_499_232)])
def test_encoder_tunable_parameters_of_m2ist(bottleneck, unique):
    model = meta("m2ist", bottleneck=bottleneck)
    assert m.count_parameters(model)["encoder_tunable"] == unique == count(model.adapters)
    shared = sum(count(block["attention"].shared_up) for block in model.adapters.blocks)
    norms = sum(count(ea.norm) for block in model.adapters.blocks for ea in (block["ffn"].vea, block["ffn"].lea))
    if bottleneck == 128:        # the paper's figure: shared projections twice, two norms for each VEA and LEA
        assert unique + shared + norms == 3_185_664


def test_counts_of_the_parts():
    model = meta("frozen")
    assert count(model.vision) == 31_869_888 and count(model.vision.backbone) == 23_454_912
    assert count(model.vision.projection) == 524_544 and count(model.vision.layers) == 7_890_432
    assert count(model.text) == 108_891_648
    with torch.device("meta"):
        theirs = transformers.BertModel(transformers.BertConfig())
    assert count(theirs) == 109_482_240 and count(theirs) - count(theirs.pooler) == count(model.text)
    assert count(model.grounding) == 8_393_732
    assert m.count_parameters(model) == {"total": 149_155_268, "trainable": 8_393_732, "encoder_tunable": 0}
    assert m.count_parameters(meta("full"))["encoder_tunable"] == 31_869_888 + 108_891_648


def bridges(model):
    return [layer.plugs["attention"] for layer in model.clip.vision.layers if "attention" in layer.plugs]


def lora_counts(model, stages):
    """(pairs in the vision tower, pairs in the text tower) at each stage."""
    found = []
    for stage in range(1, stages + 1):
        model.begin_stage(stage, stages, 32, 16)
        found.append(tuple(sum(pair.A.numel() + pair.B.numel() for _, _, pair in hilora.find_pairs(tower))
                           for tower in (model.clip.vision, model.clip.text)))
        hilora.merge(model)
    return found


# HiVG Table 7 has 206M / 41M. CLIP, three bridges, the grounding encoder and its head are 205,899,781: 206M, leaving out
# perceiver, projections, positions and the region MLP. Bridges and LoRA's last stage are 40,768,512: 41M. [D23]
def test_counts_of_hivg_base():
    model = meta("hivg")
    one, three = count(bridges(model)[0]), sum(map(count, bridges(model)))
    assert (one, three) == (12_278_784, 36_836_352) and count(model.clip) - three == 149_620_737
    bridge = bridges(model)[0]
    assert count(bridge.norm) == 1_536 and sum(count(getattr(bridge, name)) for name in ("q", "k", "v", "out")) == 2_362_368
    assert count(bridge.fc1) + count(bridge.fc2) == 4_722_432 and count(bridge.projection) == 4_719_360
    assert bridge.weights.numel() == 473_088
    grounding = model.grounding
    assert count(grounding.layers) + count(grounding.norm) == 18_915_328
    assert (count(grounding.vision_projection), count(grounding.text_projection), count(grounding.head)) == (1_573_376, 262_656, 527_364)
    assert count(grounding.region) == 3_149_312 + 1_024 and grounding.position.shape == (275, 512)
    assert 149_620_737 + three + 18_915_328 + 527_364 == 205_899_781
    assert m.count_parameters(model) == {"total": 211_027_461, "trainable": 61_406_724, "encoder_tunable": 36_836_352}
    assert lora_counts(model, 3) == [(786_432, 1_572_864), (1_572_864, 1_572_864), (2_359_296, 1_572_864)]
    assert three + 2_359_296 + 1_572_864 == 40_768_512
    assert m.count_parameters(model)["total"] == 211_027_461                                   # nothing is left of LoRA


# HiVG Table 7 has 468M / 52M, which four bridges of twelve text layers alone exceed: not to be derived.
def test_counts_of_hivg_large():
    model = meta("hivg", "large")
    one, four = count(bridges(model)[0]), sum(map(count, bridges(model)))
    assert (one, four) == (22_742_016, 90_968_064) and count(model.clip) - four == 427_616_513
    assert count(model.grounding.layers) + count(model.grounding.norm) == 33_085_440
    assert model.grounding.position.shape == (335, 768)
    assert m.count_parameters(model) == {"total": 561_573_381, "trainable": 133_956_868, "encoder_tunable": 90_968_064}
    assert lora_counts(model, 4) == [(6_291_456 * j // 4, 2_359_296) for j in (1, 2, 3, 4)]
    share = 100 * (6_291_456 + 2_359_296) / (427_616_513 + 6_291_456 + 2_359_296)
    assert round(share, 2) == 1.98                                                             # as Appendix B has it


def test_plain_clip_has_no_bridge_and_no_region_mlp():
    for method in ("clip-frozen", "clip-lora"):
        model = meta(method)
        assert bridges(model) == [] and model.levels == [12] and model.grounding.region is None
        assert m.count_parameters(model)["encoder_tunable"] == 0
    assert len(bridges(meta("hivg"))) == 3 and bridges(meta("hivg", bridge_layers=[])) == []
    released = meta("hivg", bridge_layers=[1, 4, 8, 12], text_layers=[12])
    assert [count(bridge) for bridge in bridges(released)] == [7_519_744] * 4


# ---------------------------------------------------------------------------------------------------------------------
# HiVG's forward, by its equations

def test_hivg_reads_the_levels_of_equation_1_and_puts_the_sequence_of_equation_2():
    model = tiny("hivg", vision_layers=[2, 5], text_layers=[1, 3], bridge_layers=[3]).eval()
    images, image_padding, tokens, token_padding = inputs()
    text = model.encode_text(tokens, token_padding)
    vision = model.encode_image(images, image_padding, text)
    run = model.clip.vision(images, image_padding, ([text.states[0], text.states[2]], token_padding))
    assert torch.equal(vision.x, torch.cat([run.states[1], run.states[4]], dim=-1))
    x, padding, position, cells = model.grounding.sequence(vision, text)
    by_hand = lambda rows, linear: rows.double() @ linear.weight.double().T + linear.bias.double()
    assert torch.equal(x[:, 0], model.grounding.reg.expand(3, -1))                                       # g_r
    assert torch.allclose(x[:, 1:66], by_hand(vision.x, model.grounding.vision_projection).float(), atol=1e-4)     # Eq. (1), cls first
    final = model.clip.text.projection(model.clip.text.norm(text.states[-1]))
    assert torch.allclose(x[:, 66:], by_hand(final, model.grounding.text_projection).float(), atol=1e-4)           # g_l
    assert x.shape[1] == len(position) == 1 + 65 + 9 and cells == slice(2, 66)
    assert not padding[:, :2].any() and torch.equal(padding[:, 66:], token_padding)
    assert torch.equal(padding[:, 1:66], vision.padding) and vision.padding[2].sum() == 16


def test_hivg_layers_are_equations_7_and_8():
    """With pairs on: h = W_0 f + B A f in a layer without a bridge; with one, what follows it is of f + f_sa."""
    model, (images, image_padding, tokens, token_padding) = tiny("hivg", bridge_layers=[2]).eval(), inputs()
    model.begin_stage(1, 3, 4, 8)
    for _, _, pair in hilora.find_pairs(model):
        torch.nn.init.normal_(pair.B, std=0.1)
    text = model.encode_text(tokens, token_padding)
    encoded = model.clip.vision(images, image_padding, (list(text.states), token_padding))
    layer, bridge = model.clip.vision.layers[1], bridges(model)[0]
    x = encoded.states[0]
    h, heads = layer.norm1(x), []
    for linear in (layer.q, layer.k, layer.v):
        assert isinstance(linear, hilora.LoRALinear)
        heads.append((h @ linear.weight.T + linear.bias + 2 * h @ linear.A.T @ linear.B.T).unflatten(-1, (4, -1)).transpose(1, 2))
    weights = (heads[0] @ heads[1].transpose(-2, -1) / math.sqrt(16)).softmax(-1)
    attended = (weights @ heads[2]).transpose(1, 2).flatten(2)
    a = attended @ layer.out.weight.T + layer.out.bias + 2 * attended @ layer.out.A.T @ layer.out.B.T
    f = x + a
    f = f + bridge.semantic(f, list(text.states), token_padding)                     # f_v + f_v^sa
    expected = f + layer.fc2(layer.activation(layer.fc1(layer.norm2(f))))
    assert torch.allclose(encoded.states[1], expected, atol=1e-4)
    assert not isinstance(model.clip.vision.layers[2].q, hilora.LoRALinear)          # l > j L / G: W_0 alone


def test_hivg_scores_are_equation_12():
    model, batch = tiny("hivg").train(), inputs()
    seen = []
    model.grounding.norm.register_forward_hook(lambda module, args, out: seen.append(out))
    found = model(*batch)
    x, (lin1, lin2), norm = seen[0], (model.grounding.region.fc1, model.grounding.region.fc2), model.grounding.region.norm
    for b in range(3):
        eos = 1 + 65 + int((~batch[3][b]).sum()) - 1
        t = x[b, eos] / x[b, eos].norm()
        for cell in (0, 17, 63):
            h = lin1(norm(x[b, 2 + cell]))
            assert found.scores[b, cell].item() == pytest.approx((t @ lin2(h * torch.sigmoid(1.702 * h))).item(), abs=1e-4)
    assert torch.equal(found.padding[2].view(8, 8)[:2], torch.ones(2, 8, dtype=torch.bool)) and found.padding.sum() == 8 + 16
    assert found.temperature.item() == pytest.approx(0.07, rel=1e-4)
    assert torch.equal(found.text, model.encode_text(batch[2], batch[3]).embedding)


# ---------------------------------------------------------------------------------------------------------------------
# What is frozen, and who depends on whom

def train_step(model):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses.box_loss(model(*inputs()).boxes, torch.rand(3, 4)).backward()
    optimizer.step()


def test_a_step_of_m2ist_changes_what_is_tuned_and_no_bit_of_the_encoders():
    model = tiny().train()
    before = copy.deepcopy(model.state_dict())
    train_step(model)
    for name, p in model.named_parameters():
        if name.startswith(("vision.", "text.")):
            assert not p.requires_grad and p.grad is None
        else:
            assert p.grad is not None and p.grad.abs().sum() > 0, f"{name} has no gradient"
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith(("vision.", "text.")), name


def test_no_graph_is_built_through_frozen_encoders():
    """Images that ask for a gradient would carry a graph through the encoder, frozen or not, but for no_grad."""
    for method, has_graph in (("m2ist", False), ("frozen", False), ("full", True)):
        model, (images, image_padding, tokens, token_padding) = tiny(method).train(), inputs()
        images.requires_grad_()
        seen = []
        for encoder in (model.vision, model.text):
            encoder.register_forward_hook(lambda module, args, out: seen.append(out))
        boxes = model(images, image_padding, tokens, token_padding).boxes
        boxes.sum().backward()
        assert [out.x.requires_grad for out in seen] == [has_graph, has_graph]
        assert all(t.requires_grad == has_graph for out in seen for ports in out.ports for t in ports.values())
        assert (images.grad is not None) == has_graph


def test_full_trains_every_encoder_parameter_that_a_box_depends_on():
    model = tiny("full").train()
    train_step(model)
    unused = {name for name, p in model.named_parameters() if p.grad is None}
    assert unused == set()


def test_frozen_encoders_stay_in_eval_mode_and_trained_ones_do_not():
    assert not any(part.training for part in (tiny().train().vision, tiny().train().text))
    assert tiny().train().grounding.training and tiny().train().adapters.training
    assert tiny("full").train().text.training and not tiny("full").eval().text.training


def changes(model, before):
    return {name for name, value in model.state_dict().items() if name in before and not torch.equal(value, before[name])}


def hivg_step(model):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(2):                                      # at the first, A has no gradient: B is 0
        optimizer.zero_grad()
        losses.total_loss(model(*inputs()), torch.rand(3, 4), 2, 2, 1, 20, 2).backward()
        optimizer.step()


@pytest.mark.parametrize("deep_to_shallow", [False, True])
def test_a_stage_of_hivg_changes_its_pairs_and_no_bit_of_the_rest_of_clip(deep_to_shallow):
    model = tiny("hivg").train()
    start = copy.deepcopy(model.state_dict())
    hivg_step(model)
    outside = {name for name in start if not name.startswith("clip.") or ".plugs." in name}
    assert changes(model, start) == outside                  # the warm-up: bridges and the grounding encoder, all of both
    for stage in (1, 2, 3):
        before = copy.deepcopy(model.state_dict())
        model.begin_stage(stage, 3, 4, 8, deep_to_shallow)
        boxes = model.eval()(*inputs()).boxes
        model.load_state_dict(before, strict=False)
        assert torch.equal(model(*inputs()).boxes, boxes)    # ΔW = 0 when a stage starts
        vision = range(6, 6 - 2 * stage, -1) if deep_to_shallow else range(1, 2 * stage + 1)
        pairs = {f"clip.{tower}.layers.{layer - 1}.{linear}" for tower, layers in (("vision", vision), ("text", (1, 2, 3)))
                 for layer in layers for linear in ("q", "k", "v", "out")}
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained - outside == {f"{pair}.{part}" for pair in pairs for part in "AB"} and outside <= trained
        hivg_step(model.train())
        assert changes(model, before) == outside             # W itself is not touched before the merge
        assert all(model.get_parameter(f"{pair}.{part}").abs().max() > 0 for pair in pairs for part in "AB")
        trained_boxes = model.eval()(*inputs()).boxes
        hilora.merge(model)
        assert (model(*inputs()).boxes - trained_boxes).abs().max() <= 1e-5
        assert {name for name in changes(model, before) if name not in outside} == {f"{pair}.weight" for pair in pairs}
    assert not hilora.find_pairs(model) and set(model.state_dict()) == set(start)
    assert m.count_parameters(model) == m.count_parameters(tiny("hivg"))


@pytest.mark.parametrize("training", [False, True])
def test_a_box_of_hivg_is_the_same_alone_in_any_batch_and_padded_to_77(training):
    """[D14] The released bridge mixes the samples of a batch: a box there depends on its neighbours' texts."""
    torch.manual_seed(1)
    with torch.random.fork_rng(), torch.no_grad():
        model = tiny("hivg").train(training)                 # no dropout at tiny size
        model.begin_stage(1, 2, 4, 8)
        for name, p in model.named_parameters():
            if name.endswith((".B", ".weights")):
                torch.nn.init.normal_(p, std=0.3)
        batch, other = inputs(), inputs(seed=5)
        for i in range(3):
            length = int((~batch[3][i]).sum())
            found = []
            for text in (length, 9, 20, 77):                 # trimmed, as in the batch, and far beyond max_tokens
                tokens, padding = torch.zeros(1, text, dtype=torch.long), torch.ones(1, text, dtype=torch.bool)
                tokens[0, :length], padding[0, :length] = batch[2][i, :length], False
                found.append(model(batch[0][i:i + 1], batch[1][i:i + 1], tokens, padding, attention=True))
            neighbours = [part.clone() for part in other]
            for ours, theirs in zip(neighbours, batch):
                ours[i] = theirs[i]
            for together in (model(*batch, attention=True), model(*neighbours, attention=True)):
                for alone in found:
                    assert (alone.boxes[0] - together.boxes[i]).abs().max() <= 1e-5
                    assert (alone.attention[0] - together.attention[i]).abs().max() <= 1e-5
                    if training:
                        assert (alone.scores[0] - together.scores[i]).abs().max() <= 1e-4
            assert (model(*other).boxes[i] - together.boxes[i]).abs().max() > 1e-4              # and it is not a constant


def test_the_bridge_lets_the_text_into_the_vision_tower():
    model, (images, image_padding, tokens, token_padding) = tiny("hivg").eval(), inputs()
    text, swapped = model.encode_text(tokens, token_padding), model.encode_text(tokens.flip(1), token_padding)
    here, there = (model.clip.vision(images, image_padding, (t.states, token_padding)) for t in (text, swapped))
    same = [torch.allclose(a, b, atol=1e-6) for a, b in zip(here.states, there.states)]
    assert same == [True, False, False, False, False, False]                         # from its first bridge, layer 2, on
    assert all(isinstance(bridge, CrossModalBridge) for bridge in bridges(model))
    plain = tiny("clip-lora").eval()
    assert torch.equal(plain.encode_image(images, image_padding, plain.encode_text(tokens, token_padding)).x,
                       plain.encode_image(images, image_padding, plain.encode_text(tokens.flip(1), token_padding)).x)


@pytest.mark.parametrize("method", ["m2ist", "frozen", "full"])
def test_a_box_is_the_same_alone_in_a_batch_and_with_longer_padding(method):
    model, batch = tiny(method).eval(), inputs()
    with torch.no_grad():
        together = model(*batch, attention=True)
        for i in range(3):
            length = int((~batch[3][i]).sum())
            for text in (length, 9, 20, 30):                      # trimmed, as in the batch, and far beyond max_tokens
                tokens, padding = torch.zeros(1, text, dtype=torch.long), torch.ones(1, text, dtype=torch.bool)
                tokens[0, :length], padding[0, :length] = batch[2][i, :length], False
                alone = model(batch[0][i:i + 1], batch[1][i:i + 1], tokens, padding, attention=True)
                assert (alone.boxes - together.boxes[i]).abs().max() <= 1e-5
                assert (alone.attention - together.attention[i]).abs().max() <= 1e-5
    assert together.attention.shape == (3, 64)
    with pytest.raises(ValueError, match="max_tokens"):
        model.encode_text(torch.ones(1, 30, dtype=torch.long), torch.zeros(1, 30, dtype=torch.bool))


def test_what_is_padding_does_not_reach_the_box():
    """Tokens under padding are not looked at; padded cells of the picture neither."""
    model, (images, image_padding, tokens, token_padding) = tiny().eval(), inputs()
    with torch.no_grad():
        before = model(images, image_padding, tokens, token_padding).boxes
        other = tokens.masked_fill(token_padding, 77)
        assert (model(images, image_padding, other, token_padding).boxes - before).abs().max() <= 1e-6
        vision, text = model.encode_image(images, image_padding), model.encode_text(tokens, token_padding)
        changed = vision._replace(x=vision.x.masked_fill(vision.padding[..., None], 9.0))
        assert vision.padding[2].sum() == 16 and (model.ground(changed, text).boxes - before).abs().max() <= 1e-6


def test_adapter_options_reach_the_adapters():
    model = tiny(bottleneck=5, interaction_dim=32, interaction_bottleneck=7, scale=0.5, residual=True, text_layers=[1, 3])
    iea, pair = model.adapters.blocks[0]["attention"], model.adapters.blocks[0]["ffn"]
    assert (pair.vea.down.out_features, iea.text_down.out_features, iea.shared_up.out_features) == (5, 7, 32)
    assert (pair.lea.scale, iea.scale, pair.vea.residual, iea.residual) == (0.5, 0.5, True, True)
    assert model.adapters.layers["text"] == [1, 3]


@pytest.mark.parametrize("arguments, words", [
    (("nothing", "tiny", "random"), ("method", "m2ist", "nothing")), (("m2ist", "huge", "random"), ("size", "tiny")),
    (("m2ist", "tiny", "pretrained"), ("tiny", "shapes")), (("m2ist", "base", "shapes"), ("base", "pretrained")),
    (("m2ist", "tiny", "none"), ("weights", "random"))])
def test_unknown_arguments_are_named(arguments, words):
    with pytest.raises(m.InputError) as error:
        m.build_model(*arguments)
    assert all(word in str(error.value) for word in words)


def test_unknown_option_and_missing_cache_are_named(tmp_path):
    with pytest.raises(m.InputError, match="bottlenek"):
        tiny(bottlenek=3)
    with pytest.raises(m.InputError, match="train.py"):
        m.build_model("m2ist", "tiny", "shapes", cache=str(tmp_path))


# ---------------------------------------------------------------------------------------------------------------------
# Other places that weights come from

def test_the_hubs_detr_is_the_official_one_by_other_names(tmp_path):
    """facebook/detr-resnet-50 is named by transformers; q, k and v are apart there."""
    official, hub = official_detr(), {}
    for key, value in official.items():
        key = key.replace("backbone.0.body.", "model.backbone.conv_encoder.model.").replace("input_proj.", "model.input_projection.")
        key = key.replace("transformer.", "model.").replace("linear", "fc").replace("norm1", "self_attn_layer_norm").replace("norm2", "final_layer_norm")
        for theirs, ours in (("class_embed", "class_labels_classifier"), ("bbox_embed", "bbox_predictor"),
                             ("query_embed", "model.query_position_embeddings")):
            key = key.replace(theirs, ours)
        for part, rows in zip("qkv", value.chunk(3)):
            if "in_proj_" in key:
                hub[key.replace("in_proj_", f"{part}_proj.")] = rows.clone()
        if "in_proj_" not in key:
            hub[key] = value
    assert "model.encoder.layers.5.self_attn.v_proj.bias" in hub and "model.encoder.layers.0.final_layer_norm.weight" in hub
    save_file(hub, tmp_path / "model.safetensors")
    torch.save({"model": official}, tmp_path / "detr.pth")
    one, other = encoders()["vision"], encoders()["vision"]
    m.load_detr(one, str(tmp_path / "detr.pth"))
    m.load_detr(other, str(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    with pytest.raises(m.InputError, match="--vision-weights"):
        m.load_detr(other, str(tmp_path / "nowhere"))
    del hub["model.encoder.layers.0.fc1.bias"]
    save_file(hub, tmp_path / "model.safetensors")
    with pytest.raises(m.InputError, match="missing: layers.0.fc1.bias"):
        m.load_detr(other, str(tmp_path))


@pytest.mark.parametrize("size", ["base", "large"])
def test_full_size_clip_folders_load_key_by_key(tmp_path, size):
    """B/16 and L/14 as transformers saves them, random."""
    spec = m.SIZES[size]["clip"]
    sides = {side: dict(hidden_size=spec[side]["dim"], num_hidden_layers=spec[side]["layers"], num_attention_heads=spec[side]["heads"],
                        intermediate_size=spec[side]["hidden"]) for side in ("text", "vision")}
    with torch.device("meta"):
        theirs = transformers.CLIPModel(transformers.CLIPConfig(
            text_config=sides["text"], vision_config={**sides["vision"], "image_size": 224, "patch_size": spec["stride"]},
            projection_dim=spec["text"]["embedding"]))
        ours = m.build_encoders({"family": "clip", **spec})["clip"]
    state = {key: torch.full(value.shape, i / 1000, dtype=torch.float16) for i, (key, value) in enumerate(theirs.state_dict().items())}
    save_file(state, tmp_path / "model.safetensors")
    ours = ours.to_empty(device="cpu")
    m.load_hub(ours, str(tmp_path), "--clip-weights", m.CLIP_TABLE, m.CLIP_IGNORED)
    last = spec["vision"]["layers"] - 1
    assert ours.vision.layers[last].fc2.weight[0, 0] == state[f"vision_model.encoder.layers.{last}.mlp.fc2.weight"][0, 0].float()
    assert ours.text.projection.weight[0, 0] == state["text_projection.weight"][0, 0].float()
    del state[f"vision_model.encoder.layers.{last}.mlp.fc2.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(m.InputError, match=f"missing: vision.layers.{last}.fc2.weight"):
        m.load_hub(ours, str(tmp_path), "--clip-weights", m.CLIP_TABLE, m.CLIP_IGNORED)


def test_clip_in_a_file_of_hivgs_naming_is_merged_and_the_rest_named(tmp_path, capsys):
    theirs, ours = random_clip(tmp_path)
    plain = {key: value.clone() for key, value in load_file(tmp_path / "model.safetensors").items()}
    A, B = torch.randn(32, 32), torch.randn(32, 32)
    name = "vision_model.encoder.layers.1.self_attn.q_proj."
    state = {f"clip.base_model.model.{key}": value for key, value in plain.items()}
    state[f"clip.base_model.model.{name}base_layer.weight"] = state.pop(f"clip.base_model.model.{name}weight")
    state |= {f"clip.base_model.model.{name}lora_A.default.weight": A, f"clip.base_model.model.{name}lora_B.default.weight": B,
              "clip.base_model.model.vision_model.encoder.layers.0.cross_norm.weight": A, "reg_token.weight": A}
    torch.save({"model": state, "args": argparse.Namespace(lr=1)}, tmp_path / "best.pth")
    m.load_hub(ours, str(tmp_path / "best.pth"), "--clip-weights", m.CLIP_TABLE, m.CLIP_IGNORED)
    assert torch.allclose(ours.vision.layers[1].q.weight, plain[name + "weight"] + 0.5 * B @ A)
    assert torch.equal(ours.vision.layers[1].k.weight, plain[name.replace("q_proj", "k_proj") + "weight"])
    assert "cross_norm" in capsys.readouterr().out
    state[f"clip.base_model.model.{name}lora_A.default.weight"], state[f"clip.base_model.model.{name}lora_B.default.weight"] = A[:8], B[:, :8]
    torch.save(state, tmp_path / "best.pth")
    with pytest.raises(m.InputError, match="q_proj.lora_A.weight is of rank 8"):                  # whose α nobody knows
        m.load_hub(ours, str(tmp_path / "best.pth"), "--clip-weights", m.CLIP_TABLE, m.CLIP_IGNORED)
