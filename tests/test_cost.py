"""`python train.py --cost`: counts, and the memory of a training step simulated as on a GPU."""
import json

import pytest
import torch

import train

GIB = 2 ** 30


def options(*flags):
    return train.parse_args(["--weights", "random", "--device", "cpu", *flags])


def simulated(*flags):
    """The parts of the memory of a training step with the preset's batch."""
    args = options("--size", "base", *flags)
    return train.simulate(train.last_model(args, "meta"), args, args.batch_size)


def saved_bytes(model, step):
    """How many bytes autograd keeps during step() for the backward pass: each storage once, and not
    the model's own tensors. What is kept stays alive meanwhile, so no address is given out twice."""
    kept = {}

    def keep(tensor):
        tensor = tensor.detach()
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = step()    # as long as the result lives, so does its graph
    for tensor in [*model.parameters(), *model.buffers()]:
        kept.pop(tensor.untyped_storage()._cdata, None)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()), result


@pytest.mark.parametrize("method", ["clip-lora", "m2ist"])
def test_simulated_activations_are_those_that_autograd_keeps_on_a_cpu(method):
    """The tiny models have no dropout, so that operators are the same on a CPU, within 2%: the fused
    attention of a CPU keeps no map either."""
    args = options("--size", "tiny", "--method", method, "--attention-loss", "0")
    batch = 64
    parts = train.simulate(train.last_model(args, "meta"), args, batch)
    model = train.last_model(args, "cpu").train()
    inputs, boxes = train.random_batch(model, batch, "cpu")

    def step():
        return sum(train.weighted_losses(model(**inputs), boxes, args).values())

    real, loss = saved_bytes(model, step)
    assert parts["activations"] == pytest.approx(real, rel=0.02)
    loss.backward()

    tensors = [*model.parameters(), *model.buffers()]
    assert parts["parameters"] == pytest.approx(sum(t.nbytes for t in tensors), rel=0.06)
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    assert parts["gradients"] == pytest.approx(gradients, rel=0.06)    # blocks of 512 bytes
    assert parts["optimizer"] == 2 * parts["gradients"]
    known = sum(parts[name] for name in ("parameters", "optimizer", "activations"))
    assert parts["peak"] > known    # inputs, gradients and what lives for a moment


def test_memory_at_full_size_is_what_readme_promises():
    """float32, the papers' batches. What M²IST trains costs little more than frozen encoders."""
    peaks = {method: simulated("--method", method)["peak"] for method in ("m2ist", "full", "frozen")}
    assert peaks["m2ist"] < 4.6 * GIB
    assert peaks["m2ist"] < 0.24 * peaks["full"]
    assert peaks["m2ist"] < 1.2 * peaks["frozen"]
    assert simulated("--method", "hivg")["peak"] < 16.3 * GIB


def test_checkpointing_saves_memory_in_both_families():
    assert simulated("--method", "m2ist", "--checkpointing")["peak"] < 2.5 * GIB
    assert simulated("--method", "hivg", "--checkpointing")["peak"] < 8.4 * GIB


def test_bf16_halves_what_is_saved_of_full_fine_tuning():
    half = simulated("--method", "full", "--amp", "bf16")
    whole = simulated("--method", "full")
    assert 0.5 < half["activations"] / whole["activations"] < 0.6
    assert half["optimizer"] == whole["optimizer"]


def test_checkpointing_computes_the_same_gradients():
    """For both families, with dropout: the random numbers are drawn again."""
    for method in ("m2ist", "hivg"):
        gradients = []
        for flags in ([], ["--checkpointing"]):
            args = options("--size", "tiny", "--method", method, *flags)
            torch.manual_seed(0)
            model = train.last_model(args, "cpu").train()
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout) and module.training:
                    module.p = 0.1
            inputs, boxes = train.random_batch(model, 4, "cpu")
            inputs["tokens"] = torch.arange(5, 5 + inputs["tokens"].shape[1]).expand(4, -1)
            inputs["images"] = torch.arange(inputs["images"].numel(), dtype=torch.uint8).view_as(
                inputs["images"])
            torch.manual_seed(1)
            outputs = model(**inputs, attention=True)
            sum(train.weighted_losses(outputs, boxes, args).values()).backward()
            gradients.append({name: p.grad for name, p in model.named_parameters()
                              if p.grad is not None})
        plain, again = gradients
        assert plain.keys() == again.keys()
        for name, gradient in plain.items():
            torch.testing.assert_close(again[name], gradient, rtol=1e-4, atol=1e-6)


def test_the_largest_batch_leaves_the_reserve_free():
    """1 GiB, and half of one for each further sample: 8 GiB less the reserve of 2 hold eleven."""
    peaks = {1: GIB, 3: 2 * GIB, 5: 3 * GIB}
    assert train.largest_fit(peaks, 8 * GIB) == 11
    assert train.largest_fit(peaks, 4 * GIB) == 3
    assert train.largest_fit(peaks, 3.2 * GIB) == 1
    assert train.largest_fit(peaks, 2.5 * GIB) == 0


def test_cost_of_methods_and_rows(tmp_path, capsys):
    """The form of DESIGN, the share of `full`, the paper's figures, and other flags."""
    path = tmp_path / "cost.json"
    with pytest.raises(SystemExit):
        train.main(["--cost", "full", "m2ist", "m2ist/V/b", "--size", "tiny", "--json", str(path),
                    "--batch-size", "4", "--device", "cpu"])
    full, m2ist, row = json.loads(path.read_text())
    assert [full["method"], m2ist["method"], row["method"]] == ["full", "m2ist", "m2ist/V/b"]
    for found in (full, m2ist, row):
        assert set(found) >= {"method", "size", "total", "trainable", "encoder_tunable", "macs",
                              "peak_bytes", "fits", "simulated"}
        peaks = list(found["peak_bytes"].values())
        assert list(found["peak_bytes"]) == ["1", "8", "16", "32", "64", "128"]
        assert peaks == sorted(peaks)
        assert list(found["fits"]) == ["8", "12", "16", "24"]
    assert row["encoder_tunable"] < m2ist["encoder_tunable"] < full["encoder_tunable"]
    text = capsys.readouterr().out
    assert "% of full" in text and "39.6%" in text and "batch 4" in text
