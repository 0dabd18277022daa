"""Packed NVFP4 weights: every byte where the formula says, the way back bit for bit, and refusals by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ffi_kernels as ops
from ffi_kernels import dispatch, layout
from ffi_kernels.tensor import array_fields

SHAPES = [(128, 64), (1, 16), (129, 80), (40, 256), (256, 48), (300, 320)]  # whole tiles, and neither rows nor blocks


def weight(rows: int, k: int, leading=(), seed=0) -> ops.NVFP4Tensor:
    rng = np.random.default_rng(seed)
    scale = jnp.asarray(rng.integers(0, 127, (*leading, rows, k // 16), np.uint8))
    return ops.NVFP4Tensor(
        jnp.asarray(rng.integers(0, 256, (*leading, rows, k // 2), np.uint8)),
        jax.lax.bitcast_convert_type(scale, jnp.float8_e4m3fn), jnp.asarray(rng.random(leading, np.float32)),
    )  # fmt: skip


def codes(scale) -> np.ndarray:
    return np.asarray(scale).view(np.uint8)


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("rows, k", SHAPES)
def test_scales_lie_where_the_formula_says(run, rows, k):
    w = weight(rows, k)
    packed = run(layout.pack_tcgen05)(w)
    tiles, scale = np.asarray(packed.scale), codes(w.scale)
    assert tiles.dtype == np.uint8 and packed.layout == "tcgen05" and packed.shape == w.shape
    assert tiles.shape == (-(-rows // 128), -(-k // 64), 512)
    filled = np.zeros(tiles.shape, bool)
    for row in range(rows):
        for block in range(k // 16):
            r, c = row % 128, block % 4
            at = row // 128, block // 4, (r % 32) * 16 + (r // 32) * 4 + c
            assert tiles[at] == scale[row, block], (row, block)
            filled[at] = True
    assert not tiles[~filled].any(), "the padding is zero"


@pytest.mark.parametrize("rows, k", SHAPES)
@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
def test_the_way_back_is_exact(run, rows, k, leading):
    w = weight(rows, k, leading)
    assert_same_bits(run(layout.unpack_tcgen05)(run(layout.pack_tcgen05)(w)), w)


@pytest.mark.parametrize("rows, k, leading", [(8, 16, ()), (64, 64, (2,)), (136, 80, (3,)), (256, 128, (2, 2))])
def test_gate_and_up_alternate_by_eight_rows(run, rows, k, leading):
    w1, w3 = weight(rows, k, leading, 1), weight(rows, k, leading, 2)
    packed = run(layout.pack_gate_up)(w1, w3)
    assert packed.layout == "tcgen05_gate_up" and packed.shape == (*leading, 2 * rows, k)
    tiles = np.asarray(packed.scale)
    for row in range(2 * rows):
        source, at = (w1, w3)[row // 8 % 2], row // 16 * 8 + row % 8
        assert np.array_equal(packed.data[..., row, :], source.data[..., at, :]), row
        r = row % 128
        offset = (r % 32) * 16 + (r // 32) * 4
        block = k // 16 - 1
        assert np.array_equal(tiles[..., row // 128, block // 4, offset + block % 4], codes(source.scale)[..., at, block])
    assert np.array_equal(packed.global_scale, np.stack([w1.global_scale, w3.global_scale], -1))
    assert_same_bits(run(layout.unpack_gate_up)(packed), (w1, w3))


def test_layout_is_static():
    packed = layout.pack_tcgen05(weight(16, 32))
    assert len(jax.tree.leaves(packed)) == 3 and jax.tree.map(lambda x: x, packed).layout == "tcgen05"
    assert jax.tree.structure(packed) != jax.tree.structure(weight(16, 32))
    for kind, names in [(ops.NVFP4Tensor, 3), (ops.MXFP4Tensor, 2), (ops.FP8Tensor, 2), (jax.Array, 0)]:
        assert len(array_fields(kind)) == names and "layout" not in array_fields(kind)


X = ops.quantize_nvfp4_rows(jnp.ones((2, 3, 32)))
PACKED = layout.pack_tcgen05(weight(16, 32))
EXPERTS = layout.pack_gate_up(weight(16, 32, (3,)), weight(16, 32, (3,)))
ODD = ops.MXFP4Tensor(jnp.ones((16, 16), jnp.uint8), jnp.ones((16, 1), jnp.uint8), "other")
REFUSED = {
    "linear": lambda: ops.linear(X, PACKED),
    "grouped_linear": lambda: ops.grouped_linear(X, EXPERTS),
    "gathered_linear": lambda: ops.gathered_linear(X, EXPERTS, jnp.zeros((2, 3), jnp.int32)),
    "dequantize": lambda: ops.dequantize(PACKED),
    "mxfp4_to_nvfp4": lambda: ops.mxfp4_to_nvfp4(ODD),
    "pack_tcgen05": lambda: layout.pack_tcgen05(PACKED),
    "unpack_tcgen05": lambda: layout.unpack_tcgen05(weight(16, 32)),
    "pack_gate_up": lambda: layout.pack_gate_up(PACKED, weight(16, 32)),
    "unpack_gate_up": lambda: layout.unpack_gate_up(PACKED),
}


@pytest.mark.parametrize("op", REFUSED)
def test_an_op_refuses_a_layout_it_does_not_take(op):
    with pytest.raises(ValueError, match=rf"^{op} got a \w+ in layout '\w+', but takes '\w+' .*; unpack the model .*\.$"):
        REFUSED[op]()


def test_an_implementation_names_the_layouts_it_takes(monkeypatch):
    def implementation(x, w, *_):
        return jnp.zeros((2, 3, 16))

    implementation.layouts = ("linear", "tcgen05")
    monkeypatch.setitem(dispatch._OPS["xla"], "linear", implementation)
    assert ops.linear(X, PACKED).shape == (2, 3, 16)
    with pytest.raises(ValueError, match="takes 'linear' or 'tcgen05'"):
        ops.linear(X, EXPERTS)


def test_rows_that_cannot_be_interleaved():
    with pytest.raises(ValueError, match=r"w1 \(12, 32\) and w3 \(12, 32\) by 8 rows: .* a multiple of 8 rows on each device"):
        layout.pack_gate_up(weight(12, 32), weight(12, 32))
    with pytest.raises(ValueError, match="must have one shape"):
        layout.pack_gate_up(weight(16, 32), weight(24, 32))
