"""``foldprune.torch.calibrate`` against statistics taken by hand from the same models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from calibrating import (
    Net,
    X,
    batches_for,
    close,
    everything,
    linear_layers,
    next_token_loss,
    quiet,
)

from foldprune import ModelError, TensorError

torch = pytest.importorskip("torch")

from foldprune.torch import calibrate  # noqa: E402

FAMILIES = ["bert", "roberta", "gpt2", "llama-gqa", "qwen3"]


def inputs_by_hand(model: Any, batches: list[Any]) -> dict[str, list[tuple[Any, Any]]]:
    """Every layer's inputs in float64 with the batch's mask."""
    met: dict[str, list[tuple[Any, Any]]] = {}
    for batch in batches:
        handles = [
            module.register_forward_hook(
                lambda m, args, out, name=name, mask=batch["attention_mask"]: met.setdefault(
                    name, []
                ).append((args[0].double().numpy(), mask.bool().numpy()))
            )
            for name, module in linear_layers(model).items()
        ]
        with torch.no_grad():
            model(**batch)
        for handle in handles:
            handle.remove()
    return met


# ---- inputs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_moments_are_those_of_the_real_inputs(make_model, family):
    model, batches = make_model(family), batches_for()
    calibration = quiet(model, batches, held_out=3, gradients=0)
    met = inputs_by_hand(model, batches)
    assert set(met) <= set(calibration.names)
    for name, pairs in met.items():
        moments = calibration.moments(name)
        flat = np.concatenate([x[mask] for x, mask in pairs])
        assert moments.count == len(flat)
        assert close(moments.second, flat.T @ flat / len(flat)), name
        assert close(moments.mean, flat.mean(0)), name
        sequences = [(x[i][mask[i]]) for x, mask in pairs for i in range(4)]
        held = np.concatenate(sequences[2::3])
        assert moments.held_rows == len(held)
        assert close(moments.held, held.T @ held / len(held)), name
        assert calibration.gradient(name) is None


def test_layers_that_read_one_tensor_are_counted_once(make_model):
    calibration = quiet(make_model("llama-gqa"), batches_for(), gradients=0)
    want = {}
    for i in range(2):
        block = f"model.layers.{i}."
        want[f"{block}self_attn.k_proj"] = want[f"{block}self_attn.v_proj"] = (
            f"{block}self_attn.q_proj"
        )
        want[f"{block}mlp.up_proj"] = f"{block}mlp.gate_proj"
    assert calibration.shared == want
    d, f = 48, 80  # q, o, gate and head read d numbers, down f, of two blocks and one head
    sums = 7 * (d * d + d) + 2 * (f * f + f)
    assert calibration.nbytes == 8 * (2 * sums + 2 * 89)  # uses and updates of the embedding's rows


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama-tied"])
def test_embeddings_are_counted_without_padding(make_model, family):
    model, batches = make_model(family), batches_for()
    calibration = quiet(model, batches, gradients=0)
    name = next(n for n, m in model.named_modules() if m is model.get_input_embeddings())
    used = torch.cat([b["input_ids"][b["attention_mask"].bool()] for b in batches])
    assert np.array_equal(calibration.row_use(name), np.bincount(used, minlength=89))
    if family == "bert":
        types = calibration.row_use("bert.embeddings.token_type_embeddings")
        assert types.tolist() == [len(used), 0]


@pytest.mark.parametrize("family", ["bert", "llama-gqa"])
def test_groups_of_layers_give_the_same_bytes(make_model, family):
    model, batches = make_model(family), batches_for()
    want = everything(quiet(model, batches, gradients=3))
    for most in (2 * 8 * 80**2, 5 * 8 * 80**2):
        passes = []
        have = calibrate(
            model,
            batches,
            gradients=3,
            max_bytes=most,
            progress=lambda done, total, name, passes=passes: passes.append((done, total, name)),
        )
        assert everything(have) == {name: want[name] for name in have.names}
        assert set(have.names) == set(want)
        assert passes[-1][0] == passes[-1][1] == len(passes) >= 2 * len(batches)
    with pytest.raises(ValueError, match="alone take"):
        quiet(model, batches, max_bytes=1000)
    with pytest.raises(TypeError, match="an iterator gives one"):
        quiet(model, iter(batches), max_bytes=2 * 8 * 80**2)
    assert everything(quiet(model, iter(batches), gradients=3, max_bytes=10**9)) == want


def test_thread_count_does_not_matter(make_model):
    model, batches = make_model("gpt2"), batches_for()
    assert everything(quiet(model, batches, threads=1)) == everything(
        quiet(model, batches, threads=3)
    )


def test_a_compiled_model_is_measured_alike(make_model):
    model, batches = make_model("bert"), batches_for()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    compiled(**batches[0])  # its code is there before hooks are
    found = everything(quiet(compiled, batches))
    whole = everything(quiet(model, batches))
    assert {name.removeprefix("_orig_mod."): read for name, read in found.items()} == whole


@pytest.mark.parametrize("patterns", ["*.mlp.*", ["*.q_proj.weight", "*.1.mlp.down_proj"]])
def test_only_the_layers_asked_for(make_model, patterns):
    model = make_model("llama-gqa")
    calibration = quiet(model, batches_for(), names=patterns)
    known = set(linear_layers(model))
    want = (
        {n for n in known if ".mlp." in n}
        if isinstance(patterns, str)
        else {n for n in known if n.endswith("q_proj")} | {"model.layers.1.mlp.down_proj"}
    )
    assert set(calibration.names) == want
    whole = everything(quiet(model, batches_for()))
    read = everything(calibration)
    for name in want:
        assert read[name][:4] == whole[name][:4]
        have, full = (np.frombuffer(r[name][4]) for r in (read, whole))
        assert close(have, full, 1e-4)  # the backward pass begins elsewhere
    with pytest.raises(ModelError, match=r"'\*.qq_proj'; some are .*q_proj"):
        quiet(model, batches_for(), names="*.qq_proj")


def test_batches_of_other_kinds_count_alike(make_model):
    model = make_model("bert")
    batch = batches_for(count=1)[0]
    want = everything(quiet(model, [batch]))
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for other in ((ids, mask), [ids, mask], {"input_ids": ids, "attention_mask": mask.bool()}):
        assert everything(quiet(model, [other])) == want
    unmasked = everything(quiet(model, [{"input_ids": ids}]))
    for other in (ids, (ids,)):
        assert everything(quiet(model, [other])) == unmasked
    assert unmasked != want


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_models_of_other_dtypes(make_model, dtype):
    model, batches = make_model("llama-gqa").to(getattr(torch, dtype)), batches_for()
    calibration = quiet(model, batches, gradients=2)
    for name, pairs in inputs_by_hand(model, batches).items():
        flat = np.concatenate([x[mask] for x, mask in pairs])
        assert close(calibration.moments(name).second, flat.T @ flat / len(flat)), name
        assert (calibration.gradient(name) > 0).any()


def test_memory_that_is_used_again_is_another_tensor():
    def rule(net: Net, x: Any) -> Any:
        for _ in range(20):  # the allocator hands the same memory out again
            net.a(x + 1)
            net.b(x + 2)
        y = x * 3
        net.c(y)
        return y

    calibration = quiet(Net(rule), [X], gradients=0)
    assert calibration.shared == {}
    flat = X.double().reshape(-1, 4).numpy()
    for name, shift in (("a", 1), ("b", 2)):
        assert close(calibration.moments(name).mean, (flat + shift).mean(0), 1e-6)
        assert calibration.moments(name).count == 20 * 30


def test_a_tensor_that_changed_in_place_is_another_one():
    def rule(net: Net, x: Any) -> Any:
        y = x.clone()
        net.a(y)
        y += 1
        net.b(y)
        return net.c(y)

    calibration = quiet(Net(rule), [X], gradients=0)
    assert calibration.shared == {"c": "b"}
    shift = calibration.moments("b").mean - calibration.moments("a").mean
    assert close(shift, np.ones(4), 1e-6)


def test_layers_share_only_if_all_their_inputs_are_the_same():
    def rule(net: Net, x: Any) -> Any:
        y = x + 1
        return net.a(x) + net.b(x) + net.b(y) + net.c(x) + net.c(y)

    calibration = quiet(Net(rule), [X], gradients=2)
    assert calibration.shared == {"c": "b"}
    assert calibration.moments("a").count == 30 and calibration.moments("c").count == 60


def test_sharing_that_ends_is_an_error():
    calls = []

    def rule(net: Net, x: Any) -> Any:
        calls.append(x)
        return net.a(x) + net.b(x if len(calls) < 3 else x + 1)

    with pytest.raises(ModelError, match="batch 1: 'b' read the same input as 'a' in batch 0"):
        quiet(Net(rule), [X, X], gradients=0)


def test_layers_that_are_not_reached_are_left_out():
    calibration = quiet(Net(lambda net, x: net.a(x)), [X])
    assert calibration.names == ["a"]
    with pytest.raises(ModelError, match="none of the 3 layers"):
        quiet(Net(lambda net, x: x.clone()), [X], gradients=0)


def test_flattened_inputs_are_the_same_tokens(make_model):
    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(89, 6)
            self.a, self.b = torch.nn.Linear(6, 3), torch.nn.Linear(6, 3)

        def forward(self, input_ids: Any, attention_mask: Any = None) -> Any:
            x = self.embed(input_ids)
            return self.a(x) + self.b(x.reshape(-1, 6)).reshape(*input_ids.shape, 3)

    torch.manual_seed(0)
    read = everything(quiet(Flat(), batches_for(), held_out=2, gradients=5))
    assert read["a"] == read["b"] and None not in read["a"][:3]


def test_encoders_and_decoders_have_masks_of_their_own():
    import transformers as t

    config = t.BartConfig(
        vocab_size=89,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=20,
    )
    torch.manual_seed(0)
    model = t.BartForConditionalGeneration(config).eval()
    batch = batches_for(count=1)[0]
    ids = batch["input_ids"]
    decoder = (torch.arange(9) < torch.tensor([4, 9, 3, 2])[:, None]).long()
    encoder_count, decoder_count = int(batch["attention_mask"].sum()), int(decoder.sum())
    assert encoder_count != decoder_count
    labels = ids.masked_fill(decoder == 0, -100)
    for more in (
        {"decoder_input_ids": ids, "decoder_attention_mask": decoder},
        {"labels": labels},
    ):
        calibration = quiet(model, [{**batch, **more}], gradients=2)
        count = {name: m.count for name in calibration.names if (m := calibration.moments(name))}
        assert count["model.encoder.layers.0.fc1"] == encoder_count
        assert count["model.decoder.layers.0.fc1"] == decoder_count
        assert count["model.decoder.layers.0.encoder_attn.q_proj"] == decoder_count
        assert count["model.decoder.layers.0.encoder_attn.k_proj"] == encoder_count
        assert "model.decoder.embed_positions" not in count
        assert calibration.row_use("model.decoder.embed_positions") is None  # its ids are offset
        assert calibration.gradient("model.encoder.layers.0.fc1").any()


# ---- what it leaves behind, what it refuses -----------------------------------------------------


def snapshot(model: Any) -> Any:
    return (
        {name: (p.requires_grad, p.grad is None) for name, p in model.named_parameters()},
        {name: m.training for name, m in model.named_modules()},
        [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for m in model.modules()
        ],
        {name: t.numpy().tobytes() for name, t in model.state_dict().items()},
        torch.get_rng_state().tolist(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
    )


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, RuntimeError])
def test_the_model_is_left_as_it_was(make_model, error):
    model = make_model("llama-gqa").train()
    model.model.layers[0].mlp.eval()
    model.lm_head.weight.requires_grad_(False)
    before = snapshot(model)

    def loss(model: Any, batch: Any) -> Any:
        if error and len(seen) > 1:
            raise error
        seen.append(model.training)
        assert not any(p.requires_grad for p in model.parameters())
        return next_token_loss(model, batch)

    seen: list[bool] = []
    if error is None:
        quiet(model, batches_for(), loss=loss)
    else:
        with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else ModelError):
            quiet(model, batches_for(), loss=loss)
    assert seen and not any(seen)
    assert snapshot(model) == before


def test_it_works_in_any_grad_mode(make_model):
    model, batches = make_model("gpt2"), batches_for()
    want = everything(quiet(model, batches))
    with torch.no_grad():
        assert everything(quiet(model, batches)) == want
    with torch.inference_mode():
        assert everything(quiet(model, batches)) == want
        quiet(Net(lambda net, x: net.a(x)), [X.clone()])


def test_bad_batches_are_named(make_model):
    model, (good, *_) = make_model("bert"), batches_for()
    ids, mask = good["input_ids"], good["attention_mask"]
    for error, message, batch in [
        (TypeError, "batch 1: expected a mapping", "text"),
        (TypeError, "batch 1: expected a mapping", None),
        (TypeError, "batch 1: expected a mapping", ()),
        (ModelError, "batch 1: BertForMaskedLM.forward does not take it", (ids,) * 30),
        (TensorError, "batch 1: .*token ids from 9", {"input_ids": ids + 900}),
        (TensorError, "batch 1: attention_mask: expected 1", {**good, "attention_mask": mask - 1}),
        (
            TensorError,
            r"batch 1: .*\(4, 4\), the tokens of",
            {**good, "attention_mask": mask[:, :4]},
        ),
        (ModelError, "batch 1: the model failed on it", {"inputs_embeds": torch.zeros(2, 3, 5)}),
    ]:
        with pytest.raises(error, match=message):
            quiet(model, [good, batch])
    for batches in (good, ids, "text"):
        with pytest.raises(TypeError, match="pass a list of it"):
            quiet(model, batches)
    with pytest.raises(ModelError, match="no batches"):
        quiet(model, [])
    with pytest.raises(TypeError):
        quiet(model, 3)


def test_activations_that_are_not_finite_are_named(make_model):
    model = make_model("llama-gqa")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    with pytest.raises(
        TensorError, match=r"batch 0: 'model.layers.1.mlp.down_proj': activations of row \d+ hold"
    ):
        quiet(model, batches_for())


def test_losses_that_are_none(make_model):
    model = make_model("bert")
    for message, loss in [
        ("one number", lambda m, b: m(**b).logits),
        ("one number", lambda m, b: 3.0),
        ("does not depend", lambda m, b: (m(**b), torch.ones(()))[1]),
        ("ValueError: mine", failing),
    ]:
        with pytest.raises(ModelError, match=message):
            quiet(model, batches_for(), loss=loss)
    with pytest.raises(TensorError, match=r"batch 0: 'cls.predictions.decoder': gradients of row"):
        quiet(model, batches_for(), loss=lambda m, b: m(**b).logits.sum() * float("nan"))


def failing(model: Any, batch: Any) -> Any:
    raise ValueError("mine")


def test_bad_arguments(make_model):
    model = make_model("bert")
    for error, options in [
        (TypeError, {"gradients": True}),
        (ValueError, {"gradients": -1}),
        (TypeError, {"max_bytes": 1e9}),
        (ValueError, {"held_out": 1}),
        (ValueError, {"threads": 0}),
        (TypeError, {"names": [3]}),
    ]:
        with pytest.raises(error):
            quiet(model, batches_for(), **options)
    with pytest.raises(TypeError, match="torch module"):
        quiet({}, batches_for())
    with pytest.raises(ModelError, match="no linear layer"):
        quiet(torch.nn.ReLU(), [X])


def test_progress_counts_batches(make_model, capsys):
    model, batches = make_model("bert"), batches_for()

    def stream() -> Iterator[Any]:
        yield from batches

    for source, total in ((batches, 3), (stream(), 0)):
        calls: list[tuple[int, int]] = []
        calibrate(
            model,
            source,
            gradients=0,
            progress=lambda done, total, name, calls=calls: calls.append((done, total)),
        )
        assert calls == [(1, total), (2, total), (3, total)]
    calibrate(model, stream(), gradients=0)
    calibrate(model, batches, gradients=0, progress=False)
    assert capsys.readouterr().out == ""
