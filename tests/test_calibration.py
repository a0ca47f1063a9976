"""Statistics of layers' inputs: ``Calibration`` and its file, against float64 references written
from the definitions."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import zlib
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from reference_moments import close, rows, second_moment

import foldprune
from foldprune import Calibration, FormatError, TensorError, TensorTypeError
from foldprune.calibration import TOTALS

# ---- Calibration --------------------------------------------------------------------------------


def test_moments_of_batches():
    batches = [rows((5, 11, 6), seed=1), rows((3, 7, 6), "f8", 2), rows((4, 2, 9, 6), "f2", 3)]
    masks = [np.random.default_rng(i).random(x.shape[:-1]) < 0.7 for i, x in enumerate(batches)]
    calibration = Calibration()
    for x, mask in zip(batches, masks, strict=True):
        x[~mask] = np.nan
        calibration.update("layer.weight", x, mask)
    moments = calibration.moments("layer")
    n = sum(mask.sum() for mask in masks)
    flat = np.concatenate([x[m].astype(np.float64) for x, m in zip(batches, masks, strict=True)])
    assert moments.count == n == moments.rows and moments.width == 6
    assert close(moments.second, flat.T @ flat / n)
    assert close(moments.mean, flat.mean(0))
    assert close(moments.covariance, np.cov(flat.T, bias=True))
    # 5 + 3 + 8 sequences: the 8th and the 16th are held out
    held = np.concatenate([batches[1][2][masks[1][2]], batches[2][3, 1][masks[2][3, 1]]])
    held = held.astype(np.float64)
    assert moments.held_rows == len(held) and moments.fit_rows == n - len(held)
    assert close(moments.held, held.T @ held / len(held))
    assert close(moments.fit, (flat.T @ flat - held.T @ held) / (n - len(held)))


def test_float_weights():
    x = rows((6, 5, 4))
    w = np.random.default_rng(0).random((6, 5))
    calibration = Calibration(held_out=2)
    calibration.update("a", x, w)
    moments = calibration.moments("a")
    assert moments.count == pytest.approx(w.sum())
    assert close(moments.second, second_moment(x, w) / w.sum())
    assert close(moments.held, second_moment(x[1::2], w[1::2]) / w[1::2].sum())


@pytest.mark.parametrize("splits", [[700], [1, 699], [130, 300, 270], [128, 128, 444]])
def test_rows_without_sequences_are_held_out_in_blocks(splits):
    x = rows((700, 3), "f8")
    calibration = Calibration(held_out=3)
    for part in np.split(x, np.cumsum(splits)[:-1]):
        calibration.update("a", part)
    moments = calibration.moments("a")
    held = np.arange(700) // 128 % 3 == 2
    assert moments.held_rows == held.sum()
    assert close(moments.held, second_moment(x[held]) / held.sum())
    assert close(moments.fit, second_moment(x[~held]) / (~held).sum())


@pytest.mark.parametrize("held_out", [None, 0])
def test_nothing_held_out(held_out):
    x = rows((20, 5, 3))
    calibration = Calibration(held_out=held_out)
    calibration.update("a", x)
    moments = calibration.moments("a")
    assert moments.held is None and moments.held_rows == 0 and moments.fit_rows == 100
    assert np.array_equal(moments.fit, moments.second)
    assert calibration.nbytes == 8 * (3 * 3 + 3)


def test_too_few_sequences_to_hold_any_out():
    calibration = Calibration()
    calibration.update("a", rows((7, 5, 3)))
    moments = calibration.moments("a")
    assert moments.held is None and np.array_equal(moments.fit, moments.second)


def test_all_padding():
    calibration = Calibration(held_out=2)
    calibration.update("a", np.full((2, 3, 4), np.nan), np.zeros((2, 3)))
    assert calibration.moments("a") is None and "a" in calibration
    x = rows((1, 3, 4))  # the third sequence: not held out
    calibration.update("a", x)
    assert close(calibration.moments("a").second, second_moment(x) / 3)
    assert calibration.moments("a").held is None


def test_moments_are_a_live_view():
    calibration = Calibration()
    calibration.update("a", rows((2, 3, 4)))
    moments = calibration.moments("a")
    before = moments.second
    moments.second[:] = 0  # a fresh array each time
    moments.fit[:] = 0
    assert np.array_equal(moments.second, before)
    calibration.update("a", rows((1, 3, 4), seed=5))
    assert moments.count == 9 and not np.array_equal(moments.second, before)
    with pytest.raises(AttributeError):
        moments.count = 3


def test_names_and_shared_inputs():
    calibration = Calibration()
    calibration.update("q.weight", rows((2, 3, 4)))
    calibration.share("k", "q")
    calibration.share("v.weight", "k")
    calibration.share("v", "q")  # said twice
    calibration.update_tokens("embed", np.arange(4), 9)
    calibration.update_gradient("q", rows((2, 3, 5)))
    assert calibration.names == ["q", "k", "v", "embed"] and len(calibration) == 4
    assert calibration.shared == {"k": "q", "v": "q"}
    assert "k" in calibration and "k.weight" in calibration and "o" not in calibration
    assert 3 not in calibration
    assert np.array_equal(calibration.moments("v").second, calibration.moments("q").second)
    assert calibration.moments("embed") is None and calibration.moments("o") is None
    assert calibration.row_use("q") is None and calibration.gradient("k") is None
    assert calibration.nbytes == 8 * (16 + 4 + 2 * 9 + 5)
    assert "4 layers" in repr(calibration) and "6 tokens" in repr(calibration)
    for call in (
        lambda: calibration.update("k", rows((2, 3, 4))),
        lambda: calibration.share("q", "q"),
        lambda: calibration.share("a", "nobody"),
        lambda: calibration.share("a", "embed"),
    ):
        with pytest.raises(TensorError):
            call()
    calibration.update("up", rows((2, 3, 4)))
    for name in ("up", "k"):
        with pytest.raises(TensorError, match="statistics of its own or of another"):
            calibration.share(name, "q" if name == "up" else "up")


def test_row_use_and_gradients():
    calibration = Calibration()
    ids = np.random.default_rng(0).integers(0, 11, (4, 6))
    mask = ids % 3 > 0
    for dtype in (np.int32, np.uint8, np.uint64):
        calibration.update_tokens("embed.weight", ids.astype(dtype), 11, mask)
    assert np.array_equal(calibration.row_use("embed"), 3 * np.bincount(ids[mask], minlength=11))
    g = [rows((4, 6, 5), seed=1), rows((9, 5), seed=2)]
    calibration.update_gradient("a", g[0], mask)
    calibration.update_gradient("a", g[1])
    flat = np.concatenate([g[0][mask], g[1]]).astype(np.float64)
    assert close(calibration.gradient("a"), (flat**2).mean(0))
    calibration.row_use("embed")[:] = 0  # a copy
    assert calibration.row_use("embed").any()


def test_what_is_known_by_row():
    """In how many updates a row was used, and how large the gradient was where it was."""
    calibration = Calibration()
    ids = np.array([[3, 3, 5], [5, 7, 0]])
    mask = np.array([[1, 1, 1], [1, 0.5, 0]])
    calibration.update_tokens("embed", ids, 9, mask)
    calibration.update_tokens("embed", np.array([5, 1, 1]), 9)
    updates, total = calibration.row_updates("embed")
    assert total == 2 and np.array_equal(updates, [0, 1, 0, 1, 0, 2, 0, 1, 0])
    assert calibration.row_gradient("embed") is None
    g = rows((2, 3, 4))
    g[1, 2] = np.nan  # padding may hold anything
    calibration.update_gradient("embed", g, mask, ids=ids)
    calibration.update_gradient("embed", g[:1], ids=ids[:1].astype(np.uint16))
    squares, tokens = calibration.row_gradient("embed")
    weights = np.stack([mask[0] + 1, mask[1]])
    norms = np.square(np.nan_to_num(g), dtype=np.float64).sum(-1)
    assert close(squares, np.bincount(ids.ravel(), (weights * norms).ravel(), 9))
    assert np.array_equal(tokens, np.bincount(ids.ravel(), weights.ravel(), 9))
    assert close(squares.sum() / tokens.sum(), calibration.gradient("embed").sum())


def g5() -> np.ndarray:
    return rows((5, 2))


NAN = rows((2, 3, 4))
NAN[1, 0, 2] = np.nan


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TensorError, "row 3 hold nan", lambda c: c.update("a", NAN)),
        (TensorError, "3 inputs, but 4", lambda c: c.update("a", rows((2, 3, 3)))),
        (TensorError, r"mask of shape \(3,\).*\(2, 3\)", lambda c: c.update("a", NAN, np.ones(3))),
        (TensorError, "not negative", lambda c: c.update("a", NAN, -np.ones((2, 3)))),
        (TensorTypeError, "mask of complex", lambda c: c.update("a", NAN, np.ones((2, 3)) * 1j)),
        (TensorTypeError, "int64", lambda c: c.update("a", np.ones((2, 3), int))),
        (TensorTypeError, "float8", lambda c: c.update("a", NAN.astype(ml_dtypes.float8_e5m2))),
        (TensorTypeError, "got list", lambda c: c.update("a", [[1.0]])),
        (TensorError, "two dimensions", lambda c: c.update("a", np.ones(4))),
        (TensorError, "two dimensions", lambda c: c.update("a", np.ones(()))),
        (TensorError, "is empty", lambda c: c.update("a", np.ones((0, 4)))),
        (TensorError, "is empty", lambda c: c.update("b", np.ones((3, 0)))),
        (TensorError, "from -1 to 5", lambda c: c.update_tokens("a", np.array([5, -1]), 9)),
        (TensorError, "expected 0 to 8", lambda c: c.update_tokens("a", np.array([9]), 9)),
        (TensorError, "18446744073709551615", lambda c: c.update_tokens("a", HUGE, 9)),
        (TensorError, "rows=0", lambda c: c.update_tokens("a", np.array([0]), 0)),
        (TensorError, "7 rows, but 9", lambda c: c.update_tokens("e", np.array([0]), 7)),
        (TensorError, "no token ids", lambda c: c.update_tokens("a", np.zeros(0, int), 7)),
        (TensorTypeError, "integers", lambda c: c.update_tokens("a", np.ones(3), 9)),
        (TensorError, "gradients of row 3", lambda c: c.update_gradient("b", NAN)),
        (TensorError, "ids of 3 tokens", lambda c: c.update_gradient("e", g5(), ids=np.arange(3))),
        (TensorError, "not counted yet", lambda c: c.update_gradient("b", g5(), ids=np.arange(5))),
        (TensorError, "from 5 to 9", lambda c: c.update_gradient("e", g5(), ids=np.arange(5) + 5)),
        (TensorTypeError, "integers", lambda c: c.update_gradient("e", g5(), ids=np.ones(5))),
        (TensorError, "3 outputs, but 2", lambda c: c.update_gradient("a", np.ones((2, 3)))),
    ],
)
def test_bad_input_names_the_layer_and_adds_nothing(error, message, call):
    calibration = Calibration(held_out=2)
    calibration.update("a", rows((2, 3, 4)))
    calibration.update_tokens("e", np.arange(9), 9)
    calibration.update_gradient("a", rows((5, 2)))
    before = state(calibration)
    with pytest.raises(error, match=message) as caught:
        call(calibration)
    assert str(caught.value).startswith(("'a'", "'b'", "'e'"))
    assert state(calibration) == before


HUGE = np.array([2**64 - 1], np.uint64)


@pytest.mark.parametrize("held_out", [1, -2])
def test_held_out_must_leave_something(held_out):
    with pytest.raises(ValueError, match="at least 2"):
        Calibration(held_out=held_out)
    with pytest.raises(TypeError):
        Calibration(held_out=0.5)
    with pytest.raises(TypeError):
        Calibration().update(3, rows((2, 3)))


def state(calibration: Calibration) -> tuple[Any, ...]:
    """Everything there is, bit by bit."""
    inputs = {
        name: (
            one.sequences,
            one.position,
            *(
                (s.weight, s.rows, s.second.tobytes(), s.sum.tobytes()) if s.rows else None
                for s in one.sets
            ),
        )
        for name, one in calibration._inputs.items()
    }
    totals = [
        {name: (t.weight, t.sums.tobytes()) for name, t in by_name.items()}
        for by_name in (getattr(calibration, attribute) for attribute in TOTALS.values())
    ]
    return inputs, calibration.shared, *totals, calibration.held_out


def test_byte_orders_and_torch_tensors_count_alike():
    torch = pytest.importorskip("torch")
    x = rows((4, 5, 6))
    mask = np.random.default_rng(0).random((4, 5)) < 0.5
    reference, swapped, tensors = (Calibration(held_out=2) for _ in range(3))
    reference.update("a", x, mask)
    swapped.update("a", x.astype(">f4"), mask.astype(">i4"))
    tensors.update("a", torch.from_numpy(x).requires_grad_(), torch.from_numpy(mask))
    assert state(reference) == state(swapped) == state(tensors)
    half = torch.from_numpy(x).bfloat16()
    one, other = Calibration(), Calibration()
    one.update("a", half)
    other.update("a", x.astype(ml_dtypes.bfloat16))
    assert state(one) == state(other)


def test_thread_count_does_not_matter():
    results = []
    for threads in (1, 2, 5):
        calibration = Calibration(held_out=2)
        calibration.update("a", rows((8, 100, 230)), threads=threads)
        calibration.update_gradient("a", rows((8, 100, 300)), threads=threads)
        results.append(state(calibration))
    assert results[0] == results[1] == results[2]


# ---- merge --------------------------------------------------------------------------------------


def counted(parts: list[np.ndarray], held_out: int | None = 4) -> Calibration:
    calibration = Calibration(held_out=held_out)
    for x in parts:
        calibration.update("q", x)
        calibration.update("flat", x.reshape(-1, x.shape[-1]))
        calibration.update_tokens("embed", (x[..., 0] > 0).astype(int), 2)
        calibration.update_gradient("q", x[..., :2])
        calibration.update_gradient("embed", x[..., :2], ids=(x[..., 0] > 0).astype(int))
    calibration.share("k", "q")
    return calibration


@pytest.mark.parametrize("cut", [8, 5])
def test_merged_shards_equal_one_count(cut):
    x = [rows((1, 128, 5), seed=i) for i in range(19)]
    together, left, right = counted(x), counted(x[:cut]), counted(x[cut:])
    assert left.merge(right) is left
    for name in ("q", "k", "flat"):
        have, want = left.moments(name), together.moments(name)
        assert (have.count, have.rows) == (want.count, want.rows)
        assert close(have.second, want.second) and close(have.mean, want.mean)
        if cut % 4 == 0:
            assert have.held_rows == want.held_rows == 4 * 128
            assert close(have.held, want.held) and close(have.fit, want.fit)
    assert np.array_equal(left.row_use("embed"), together.row_use("embed"))
    assert close(left.gradient("q"), together.gradient("q"))
    assert close(left.row_gradient("embed")[0], together.row_gradient("embed")[0])
    assert np.array_equal(left.row_updates("embed")[0], together.row_updates("embed")[0])
    assert left.names == together.names
    tail = rows((1, 128, 5), seed=99)  # sequences are counted on
    for calibration in (left, together):
        calibration.update("q", tail)
    assert left.moments("q").held_rows - 4 * 128 == 128 or cut % 4


def test_merging_into_an_empty_one_copies():
    source = counted([rows((6, 3, 4), seed=1)])
    before = state(source)
    target = Calibration(held_out=4).merge(source)
    assert state(target) == before
    target.merge(source)
    target.update("q", rows((6, 3, 4)))
    assert state(source) == before


def test_calibrations_of_different_models_do_not_merge():
    base = counted([rows((4, 3, 4))])
    others = {
        "inputs": counted([rows((4, 3, 5))]),
        "held_out": counted([rows((4, 3, 4))], held_out=3),
        "shares": Calibration(held_out=4),
        "rows": Calibration(held_out=4),
        "outputs": Calibration(held_out=4),
    }
    others["shares"].update("k", rows((4, 3, 4)))
    others["rows"].update_tokens("embed", np.array([0]), 7)
    others["outputs"].update_gradient("q", rows((4, 7)))
    before = state(base)
    for message, other in others.items():
        with pytest.raises(ValueError, match=message):
            base.merge(other)
        if message != "held_out":
            with pytest.raises(ValueError, match=message):
                other.merge(base)
    assert state(base) == before
    with pytest.raises(TypeError):
        base.merge({})


# ---- files --------------------------------------------------------------------------------------


def test_files_hold_the_same_bits(tmp_path):
    calibration = counted([rows((6, 3, 4), seed=i) * 1e-3**i for i in range(3)])
    calibration.update("padding", np.zeros((2, 3, 4)), np.zeros((2, 3)))
    calibration.update("zero", np.full((2, 3, 2), -0.0))
    path, again = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    calibration.save(path)
    loaded = Calibration.load(str(path))
    assert state(loaded) == state(calibration) and loaded.names == calibration.names
    loaded.save(again)
    assert path.read_bytes() == again.read_bytes()
    for one in (calibration, loaded):
        one.update("q", rows((7, 3, 4)))
    assert state(loaded) == state(calibration)
    assert {p.name for p in tmp_path.iterdir()} == {"a.safetensors", "b.safetensors"}

    empty = Calibration(held_out=None)
    empty.save(path)
    assert state(Calibration.load(path)) == state(empty)


def test_other_readers_open_the_file(tmp_path):
    from safetensors.numpy import load_file

    calibration = Calibration(held_out=None)
    calibration.update("a", rows((2, 3, 4)))
    calibration.save(tmp_path / "a")
    arrays = load_file(tmp_path / "a")
    second = calibration.moments("a").second * 6
    assert close(arrays["inputs.0.fit.second"], second[np.tril_indices(4)])


def test_damage_is_found(tmp_path):
    path = tmp_path / "a"
    counted([rows((5, 3, 2))]).save(path)
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    for position in [*range(8), *rng.integers(8, len(good), 250)]:
        damaged = bytearray(good)
        damaged[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(FormatError, match=str(path)):
            Calibration.load(path)
    for size in [0, 1, 7, 8, 100, *rng.integers(0, len(good), 20), len(good) - 1]:
        path.write_bytes(good[: int(size)])
        with pytest.raises(FormatError):
            Calibration.load(path)
    path.write_bytes(good + b"\0")
    with pytest.raises(FormatError):
        Calibration.load(path)


def rewritten(path: Any, change: Any) -> None:
    """The file with another header, its checksums right."""
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    outer = json.loads(raw[8 : 8 + size])
    header = json.loads(outer["__metadata__"]["foldprune_calibration"])
    change(header, outer)
    text = json.dumps(header)
    outer["__metadata__"] |= {
        "foldprune_calibration": text,
        "foldprune_calibration_crc32": str(zlib.crc32(text.encode())),
    }
    new = json.dumps(outer).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + size :])


@pytest.mark.parametrize(
    "change",
    [
        lambda h, o: h.update(version=2),
        lambda h, o: h.pop("version"),
        lambda h, o: h.update(held_out=1),
        lambda h, o: h.update(held_out=-8),
        lambda h, o: h["inputs"][0].update(width=3),
        lambda h, o: h["inputs"][0].update(width=1 << 40),
        lambda h, o: h["inputs"][0].update(width=4.0),
        lambda h, o: h["inputs"][0].update(name=3),
        lambda h, o: h["inputs"][1].update(name="q"),
        lambda h, o: h["inputs"][0].update(sequences=-1),
        lambda h, o: h["inputs"][0].pop("fit"),
        lambda h, o: h["inputs"][0]["fit"].update(weight=-1.0),
        lambda h, o: h["inputs"][0]["fit"].update(weight=float("nan")),
        lambda h, o: h["inputs"][0]["fit"].update(rows=True),
        lambda h, o: h["inputs"].append(h["inputs"][0]),
        lambda h, o: h.update(inputs=7),
        lambda h, o: h["shared"].update(k="nobody"),
        lambda h, o: h["shared"].update(flat="q"),
        lambda h, o: h["row_use"].clear(),
        lambda h, o: h["row_squares"][0].update(name="q"),
        lambda h, o: h["gradients"][0].update(weight="1"),
        lambda h, o: h["crc32"].pop("inputs.0.fit.sum"),
        lambda h, o: h["crc32"].update(extra=0),
        lambda h, o: h["crc32"].update({"inputs.0.fit.sum": 1}),
        lambda h, o: o["inputs.0.fit.sum"].update(dtype="I64"),
        lambda h, o: o["inputs.0.fit.second"].update(shape=[2, 5]),
        lambda h, o: o.update(renamed=o.pop("row_use.0")),
    ],
)
def test_headers_that_lie(tmp_path, change):
    path = tmp_path / "a"
    counted([rows((6, 3, 4))]).save(path)
    rewritten(path, lambda header, outer: None)
    Calibration.load(path)
    rewritten(path, change)
    with pytest.raises(FormatError):
        Calibration.load(path)


def test_other_files(tmp_path):
    from safetensors.numpy import save_file

    path = tmp_path / "a.safetensors"
    with pytest.raises(FileNotFoundError):
        Calibration.load(path)
    with pytest.raises(IsADirectoryError):
        Calibration.load(tmp_path)
    save_file({"a": np.zeros(3)}, path)
    with pytest.raises(FormatError, match="not a calibration"):
        Calibration.load(path)
    path.write_bytes(b"not at all")
    with pytest.raises(FormatError):
        Calibration.load(path)
    counted([rows((6, 3, 4))]).save(path)
    with pytest.raises(FormatError, match="not a foldprune file"):
        foldprune.load(path)
    with pytest.raises(OSError):
        Calibration().save(tmp_path)
    with pytest.raises(OSError):
        Calibration().save(tmp_path / "missing" / "a")
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_numpy_alone_is_enough():
    code = (
        "import sys, numpy as np, foldprune\n"
        "c = foldprune.Calibration()\n"
        "c.update('a', np.ones((9, 2, 3), np.float32)); c.update_tokens('e', np.arange(3), 3)\n"
        "c.save('c.safetensors'); foldprune.Calibration.load('c.safetensors')\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_matrices_on_disk_add_up_as_in_memory(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    one, other = (counted([rows((6, 3, 4))]) for _ in range(2))
    one._spill(["q", "flat"])
    assert isinstance(one._inputs["q"].fit.second, np.memmap)
    for calibration in (one, other):
        calibration.update("q", rows((6, 3, 4), seed=1))
        calibration.merge(counted([rows((6, 3, 4), seed=2)]))
    assert state(one) == state(other)
    for matrix in (one.moments("q").second, one.moments("q").fit, one.moments("flat").second):
        assert type(matrix) is np.ndarray
    one.save(tmp_path / "a")
    assert state(Calibration.load(tmp_path / "a")) == state(other)
