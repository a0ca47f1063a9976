"""Packed layers against nn.Linear and nn.Embedding with the same zeros."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import numpy as np
import pytest

import foldprune
from foldprune import ModuleError, Packed, TensorError, TensorTypeError

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from foldprune.torch import PackedEmbedding, PackedLinear  # noqa: E402

SHAPES = [(70, 100), (64, 64), (1, 1), (3, 200), (130, 65), (128, 128)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def dense_linear(out: int = 70, width: int = 100, density: float = 0.3, bias: bool = True) -> Any:
    layer = nn.Linear(width, out, bias=bias)
    with torch.no_grad():
        layer.weight[torch.rand(out, width) > density] = 0
    return layer


def pair(**kwargs: Any) -> tuple[Any, Any]:
    layer = dense_linear(**kwargs)
    return layer, PackedLinear.from_dense(layer)


def dense_gradient(layer: PackedLinear, gradient: Any) -> Any:
    """The values' gradient at their places in the matrix."""
    packed = layer.packed()
    return torch.from_numpy(Packed(packed.shape, packed.mask, gradient.numpy()).unpack())


# ---- forward ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("leading", [(), (1,), (5,), (2, 3), (0,), (2, 0, 3), (40,)])
@pytest.mark.parametrize("grad", [True, False])
def test_linear(shape, leading, grad):
    out, width = shape
    dense, packed = pair(out=out, width=width)
    x = torch.randn(*leading, width)
    with torch.set_grad_enabled(grad):
        y = packed(x)
    assert y.shape == (*leading, out) and y.dtype == torch.float32
    torch.testing.assert_close(y, dense(x), rtol=1e-5, atol=1e-5)
    assert y.requires_grad == grad
    assert torch.equal(packed.weight, dense.weight)


@pytest.mark.parametrize("values", [*DTYPES, "int8"])
@pytest.mark.parametrize("inputs", DTYPES)
def test_dtypes(values, inputs):
    layer = dense_linear()
    packed = PackedLinear.from_dense(layer, dtype=values)
    x = torch.randn(4, 100).to(inputs)
    expected = nn.functional.linear(x.float(), packed.weight.float(), layer.bias)
    for context in (torch.enable_grad(), torch.no_grad(), torch.inference_mode()):
        with context:
            y = packed(x)
        assert y.dtype is inputs
        scale = float(expected.detach().abs().max())
        torch.testing.assert_close(y.float(), expected, rtol=0, atol=TOLERANCE[inputs] * scale)


def test_not_contiguous():
    dense, packed = pair()
    x = torch.randn(100, 6).T
    strided = torch.randn(8, 200)[::2, ::2]
    for given in (x, strided, x[None].expand(3, -1, -1)):
        for context in (torch.enable_grad(), torch.no_grad()):
            with context:
                torch.testing.assert_close(packed(given), dense(given), rtol=1e-5, atol=1e-5)


def test_autocast_is_linears():
    dense, packed = pair()
    x = torch.randn(4, 100)
    for context in (torch.enable_grad(), torch.no_grad()):
        with context, torch.autocast("cpu", torch.bfloat16):
            y, expected = packed(x), dense(x)
        assert y.dtype is expected.dtype is torch.bfloat16
        torch.testing.assert_close(y, expected, rtol=0, atol=2e-2)


def test_conv1d():
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    conv = Conv1D(70, 100)
    with torch.no_grad():
        conv.weight[torch.rand(100, 70) > 0.3] = 0
    packed = PackedLinear.from_dense(conv)
    x = torch.randn(3, 100)
    torch.testing.assert_close(packed(x), conv(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "int8"])
def test_embedding(dtype):
    table = nn.Embedding(50, 33)
    with torch.no_grad():
        table.weight[torch.rand(50, 33) > 0.3] = 0
    packed = PackedEmbedding.from_dense(table, dtype=dtype)
    for ids in (
        torch.randint(0, 50, (2, 7)),
        torch.tensor(3),
        torch.zeros(0, 4, dtype=torch.int64),
    ):
        for given in (ids, ids.to(torch.int32)):
            for context in (torch.enable_grad(), torch.no_grad()):
                with context:
                    rows = packed(given)
                assert rows.shape == (*ids.shape, 33)
                assert torch.equal(rows, packed.weight[ids])


# ---- gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_the_masked_layers(shape):
    out, width = shape
    dense, packed = pair(out=out, width=width)
    mask = dense.weight != 0
    x = torch.randn(3, 5, width, requires_grad=True)
    dy = torch.randn(3, 5, out)
    expected = torch.autograd.grad(dense(x), (x, dense.weight, dense.bias), dy)
    dx, dvalues, dbias = torch.autograd.grad(packed(x), (x, packed.values, packed.bias), dy)
    torch.testing.assert_close(dx, expected[0], rtol=1e-4, atol=1e-5)
    found = dense_gradient(packed, dvalues)
    torch.testing.assert_close(found, expected[1] * mask, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dbias, expected[2], rtol=1e-4, atol=1e-5)


def test_gradcheck():
    packed = PackedLinear.from_dense(dense_linear(5, 70).double())
    x = torch.randn(2, 3, 70, dtype=torch.float64, requires_grad=True)

    def call(x: Any, values: Any, bias: Any) -> Any:
        return torch.ops.foldprune.packed_linear(
            x, values, packed.mask, packed.offset, None, bias, 5, 70
        )

    assert torch.autograd.gradcheck(call, (x, packed.values, packed.bias))
    table = PackedEmbedding.from_dense(dense_linear(6, 9).weight.detach().double())
    ids = torch.tensor([[0, 5, 5], [2, 0, 1]])
    assert torch.autograd.gradcheck(
        lambda values: torch.ops.foldprune.packed_embedding(
            ids, values, table.mask, table.offset, None, 6, 9, -1
        ),
        (table.values,),
    )


def test_operators_are_sound():
    _, packed = pair()
    x = torch.randn(3, 100, requires_grad=True)
    matrix = (packed.values, packed.mask, packed.offset, None)
    torch.library.opcheck(
        torch.ops.foldprune.packed_linear.default, (x, *matrix, packed.bias, 70, 100)
    )
    table = PackedEmbedding.from_dense(dense_linear().weight)
    ids = torch.randint(0, 70, (2, 3))
    matrix = (table.values, table.mask, table.offset, None)
    torch.library.opcheck(torch.ops.foldprune.packed_embedding.default, (ids, *matrix, 70, 100, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_have_the_values_dtype(dtype):
    packed = PackedLinear.from_dense(dense_linear(), dtype=dtype)
    x = torch.randn(4, 100, dtype=dtype, requires_grad=True)
    packed(x).float().sum().backward()
    assert packed.values.grad.dtype is dtype and x.grad.dtype is dtype
    assert packed.bias.grad.dtype is torch.float32


def test_embedding_gradient_and_padding():
    table = nn.Embedding(20, 9, padding_idx=3)
    packed = PackedEmbedding.from_dense(table)
    ids = torch.tensor([[0, 3, 5], [5, 19, 3]])
    dy = torch.randn(2, 3, 9)
    table(ids).backward(dy)
    packed(ids).backward(dy)
    torch.testing.assert_close(dense_gradient(packed, packed.values.grad), table.weight.grad)


def test_int8_does_not_train():
    packed = PackedLinear.from_dense(dense_linear(), dtype="int8")
    assert not packed.values.requires_grad
    with pytest.raises(RuntimeError, match="floating point"):
        packed.values.requires_grad_()
    x = torch.randn(4, 100, requires_grad=True)
    packed(x).sum().backward()
    torch.testing.assert_close(x.grad, packed.weight.sum(0).expand(4, -1), rtol=1e-4, atol=1e-5)


def test_second_derivative_is_an_error():
    _, packed = pair()
    x = torch.randn(2, 100, requires_grad=True)
    (dx,) = torch.autograd.grad(packed(x).square().sum(), x, create_graph=True)
    with pytest.raises(ModuleError, match="second derivative"):
        dx.sum().backward()


def test_values_changed_before_backward_are_an_error():
    _, packed = pair()
    x = torch.randn(2, 100, requires_grad=True)
    y = packed(x).sum()
    with torch.no_grad():
        packed.values.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_training_changes_kept_weights_alone():
    dense, packed = pair()
    mask = dense.weight != 0
    x, target = torch.randn(16, 100), torch.randn(16, 70)
    losses = []
    optimiser = torch.optim.AdamW(packed.parameters(), 1e-2)
    for _ in range(20):
        optimiser.zero_grad()
        loss = (packed(x) - target).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    weight = packed.weight
    assert torch.equal(weight != 0, mask) and not torch.equal(weight, dense.weight)
    with torch.no_grad():  # what inference has kept in mind follows
        expected = nn.functional.linear(x, weight, packed.bias)
        torch.testing.assert_close(packed(x), expected, rtol=1e-5, atol=1e-5)


def test_checkpointing():
    from torch.utils.checkpoint import checkpoint

    _, packed = pair()
    x = torch.randn(4, 100, requires_grad=True)
    expected = torch.autograd.grad(packed(x).square().sum(), (x, packed.values))
    for reentrant in (True, False):
        y = checkpoint(packed, x, use_reentrant=reentrant).square().sum()
        y.backward()
        assert torch.equal(x.grad, expected[0]) and torch.equal(packed.values.grad, expected[1])
        x.grad = packed.values.grad = None


# ---- compilers ----------------------------------------------------------------------------------


def test_compile_and_export():
    _, packed = pair()
    model = nn.Sequential(PackedEmbedding.from_dense(nn.Embedding(20, 100)), packed)
    ids = torch.randint(0, 20, (3, 4))
    expected = model(ids)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    y = compiled(ids)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert packed.values.grad is not None
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids), expected)
    batch = torch.export.Dim("batch")
    exported = torch.export.export(model, (ids,), dynamic_shapes=({0: batch},))
    again = torch.randint(0, 20, (5, 4))
    torch.testing.assert_close(exported.module()(again), model(again))
    kinds = {str(node.target) for node in exported.graph.nodes}
    assert {"foldprune.packed_linear.default", "foldprune.packed_embedding.default"} <= kinds


# ---- state --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "int8"])
def test_round_trips(dtype):
    packed = PackedLinear.from_dense(dense_linear(), dtype=dtype)
    x = torch.randn(3, 100)
    with torch.no_grad():
        expected = packed(x)
    stream = io.BytesIO()
    torch.save(packed, stream)
    stream.seek(0)
    blank = PackedLinear(100, 70, dtype=dtype)
    assert torch.equal(blank.bias, torch.zeros(70).to(blank.bias.dtype)) and blank.density == 1
    blank.load_state_dict(packed.state_dict())
    assert blank.values.shape == packed.values.shape
    others = [
        copy.deepcopy(packed),
        pickle.loads(pickle.dumps(packed)),
        torch.load(stream, weights_only=False),
        PackedLinear.from_packed(packed.packed(), packed.bias),
        blank,
    ]
    for other in others:
        assert other.values is not packed.values
        with torch.no_grad():
            torch.testing.assert_close(other(x), expected, rtol=1e-2, atol=1e-2)
        assert torch.equal(other.weight, packed.weight)
        assert other.values.data_ptr() != packed.values.data_ptr()
    assert "offset" not in packed.state_dict() and "_cached" not in packed.state_dict()


def test_converting_dtypes():
    _, packed = pair()
    weight = packed.weight
    x = torch.randn(2, 100)
    with torch.no_grad():
        expected = packed(x)
    for convert, dtype in ((packed.bfloat16, torch.bfloat16), (packed.half, torch.float16)):
        half = copy.deepcopy(packed)
        assert getattr(half, convert.__name__)().values.dtype is dtype
        assert torch.equal(half.weight, weight.to(dtype))
        with torch.no_grad():
            y = half(x.to(dtype))
        torch.testing.assert_close(y.float(), expected, rtol=0, atol=3e-2)
    eight = PackedLinear.from_dense(weight, dtype="int8").half()
    assert eight.scale.dtype is torch.float32 and eight.values.dtype is torch.int8
    table = PackedEmbedding.from_packed(packed.packed(), out_dtype=torch.float32)
    assert table.bfloat16()(torch.tensor([1])).dtype is torch.bfloat16
    double = copy.deepcopy(packed).double()
    with torch.no_grad():
        torch.testing.assert_close(double(x.double()).float(), expected)


def test_sharing():
    packed = PackedLinear.from_dense(dense_linear(bias=False))
    table = PackedEmbedding.from_packed(packed.packed())
    table.share(packed)
    model = nn.ModuleDict({"table": table, "head": packed})
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for other in (
        model,
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(stream, weights_only=False),
        copy.deepcopy(model).half().float(),
    ):
        assert other["table"].values is other["head"].values
        assert other["table"].mask is other["head"].mask
        assert len(list(other.parameters())) == 1
    # another number of kept values: still one parameter
    sparser = PackedLinear.from_dense(dense_linear(density=0.1, bias=False))
    state = {f"{name}.{k}": v for name in model for k, v in sparser.state_dict().items()}
    model.load_state_dict(state)
    assert model["table"].values is model["head"].values
    x = torch.randn(2, 100)
    with torch.no_grad():
        assert torch.equal(model["head"](x), sparser(x))
        assert torch.equal(model["table"](torch.arange(70)), sparser.weight)
    with pytest.raises(ModuleError, match="cannot be tied"):
        table.share(PackedEmbedding(3, 4))


def test_bad_state_dicts():
    _, packed = pair()
    before = packed.weight
    good = packed.state_dict()
    past = good["mask"].clone()
    past[-1] = -1
    for changes, message in (
        ({"mask": past}, "inner.mask: bits are set past the last column"),
        ({"mask": good["mask"][:-1]}, r"inner.mask: expected torch.int64 \(140,\)"),
        ({"mask": good["mask"].float()}, "inner.mask: expected torch.int64"),
        ({"values": good["values"][:-1]}, "inner.values: the mask keeps"),
        ({"values": good["values"].to(torch.int8)}, "inner.values: torch.int8 cannot be loaded"),
    ):
        model = nn.ModuleDict({"inner": packed})
        state = {f"inner.{k}": v for k, v in {**good, **changes}.items()}
        with pytest.raises(RuntimeError, match=message):
            model.load_state_dict(state)
        assert torch.equal(packed.weight, before)
    dense, _ = pair()
    for strict in (True, False):  # transformers' Trainer loads without
        with pytest.raises(RuntimeError, match="weight: a dense matrix for a layer that is packed"):
            packed.load_state_dict(dense.state_dict(), strict=strict)
        assert torch.equal(packed.weight, before)
    fewer = dict(good)
    del fewer["values"]
    fewer["mask"] = torch.zeros_like(good["mask"])
    with pytest.raises(RuntimeError, match="no values"):
        packed.load_state_dict(fewer)
    with torch.no_grad():
        packed.mask.zero_()
        with pytest.raises(ModuleError, match="does not fit the values"):
            copy.deepcopy(packed)(torch.randn(1, 100))


# ---- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [True, False])
def test_bad_input(grad):
    _, packed = pair()
    with torch.set_grad_enabled(grad):
        for x, message in (
            (torch.randn(3, 99), "last dimension must be 100"),
            (torch.randn(3, 128), "last dimension must be 100"),
            (torch.tensor(1.0), "last dimension must be 100"),
            (torch.randn(3, 100).double(), "float64 goes with float64"),
            (torch.ones(3, 100, dtype=torch.int64), "input has dtype torch.int64"),
        ):
            with pytest.raises(ModuleError, match=message):
                packed(x)
        table = PackedEmbedding(7, 5)
        for ids in (torch.tensor([7]), torch.tensor([-1])):
            with pytest.raises(IndexError, match="index out of range in self"):
                table(ids)
        with pytest.raises(ModuleError, match=r"torch.int64 or torch.int32"):
            table(torch.randn(3))
        meta = copy.deepcopy(packed).to("meta")
        assert meta(torch.empty(3, 100, device="meta")).shape == (3, 70)


def test_other_devices():
    _, packed = pair()

    class Elsewhere:
        device = torch.device("cuda", 0)

    with pytest.raises(ModuleError, match="run on the CPU: the input is on cuda:0"):
        packed._check_device(Elsewhere())


def test_bad_construction():
    layer = dense_linear()
    with pytest.raises(TensorError, match="mask"):
        PackedLinear.from_dense(layer, torch.ones(100, 70, dtype=torch.bool))
    with pytest.raises(TensorTypeError, match="boolean"):
        PackedLinear.from_dense(layer, torch.ones(70, 100))
    with pytest.raises(TensorTypeError, match="expected"):
        PackedLinear.from_dense(layer, dtype=torch.int32)
    with pytest.raises(TensorTypeError, match="torch tensor"):
        PackedLinear.from_dense(np.zeros((2, 3)))
    with pytest.raises(TensorError, match="bias"):
        PackedLinear.from_packed(foldprune.pack(np.ones((2, 3), np.float32)), torch.ones(3))
    with pytest.raises(TensorTypeError, match="Packed"):
        PackedLinear.from_packed(layer.weight)
    with pytest.raises(TensorError, match="padding_idx"):
        PackedEmbedding.from_packed(foldprune.pack(np.ones((2, 3), np.float32)), padding_idx=2)


def test_what_is_shown():
    _, packed = pair()
    assert "in_features=100, out_features=70, bias=True, dtype=float32, density=0.2" in repr(packed)
    assert packed.in_features == 100 and packed.out_features == 70
    assert "7, 5, padding_idx=2" in repr(PackedEmbedding(7, 5, 2))
