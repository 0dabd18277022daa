"""Tensor copies, swizzles and wgmma in the PTX interpreter."""

import ml_dtypes
import numpy as np
import pytest
import sim_driver as sim

pytestmark = pytest.mark.skipif(bool(sim.missing()), reason=sim.missing() or "-")
RNG = np.random.default_rng(5)


def swizzled(row_bytes, swizzle, rows):
    """Where byte (row, i) of rows of `row_bytes` lies, under a swizzle of that many bytes."""
    linear = np.arange(rows * row_bytes)
    mask = {0: 0, 32: 1, 64: 3, 128: 7}[swizzle]
    return linear ^ ((linear >> 7 & mask) << 4)


@pytest.mark.parametrize("kind", ["uint8", "bfloat16", "float32"])
@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize("corner", [(0, 0, 0), (16, 3, 1), (-8, -2, 0), (40, 9, 2)])
def test_boxes(kind, swizzle, corner):
    """Interior and ragged boxes: fill out of bounds, swizzles, the way back, reductions."""
    dtype = np.dtype(getattr(ml_dtypes, kind, None) or kind)
    width = (swizzle or 64) // dtype.itemsize
    box = (width, 6, 2)
    source = RNG.integers(0, 100, (3, 11, 64)).astype(dtype)
    back = np.zeros_like(source)
    count = box[0] * box[1] * box[2] * dtype.itemsize
    seen = np.zeros(count, np.uint8)
    maps = [sim.tensor_map(a, box, swizzle=swizzle) for a in (source, back)]
    reducible = kind == "float32"

    def go():
        sim.run(sim.ptx("tensor"), "box", [*maps, seen, *corner, count], shared_bytes=16384, memory=[source, back])

    if reducible:
        go()
    elif sim.ON_DEVICE:
        pytest.skip("adds elements of a type that .add does not take")
    else:
        with pytest.raises(sim.SimError, match="reduction"):
            go()
    x, y, z = corner
    want = np.zeros(box[::-1], dtype)
    inside = [slice(max(0, c), min(n, c + b)) for c, b, n in zip((z, y, x), box[::-1], source.shape)]
    within = tuple(slice(i.start - c, i.stop - c) for i, c in zip(inside, (z, y, x)))
    want[within] = source[tuple(inside)]
    place = swizzled(box[0] * dtype.itemsize, swizzle, box[1] * box[2])
    np.testing.assert_array_equal(seen[place], want.reshape(-1).view(np.uint8))
    if reducible:
        twice = np.zeros_like(source)
        twice[tuple(inside)] = 2 * source[tuple(inside)]
        np.testing.assert_array_equal(back, twice)


@pytest.mark.parametrize("how, words", [
    (dict(box=(512, 1)), "limit is 256"), (dict(box=(3, 1)), "multiple of 16"), (dict(box=(64, 1), swizzle=64), "more than the swizzle"),
    (dict(box=(16, 0)), "limit is 256"), (dict(box=(16, 4), element_strides=[1, 9]), "limit is 8"),
])  # fmt: skip
@pytest.mark.skipif(sim.ON_DEVICE, reason="the driver says no more than invalid value")
def test_tensor_maps_are_refused(how, words):
    with pytest.raises(sim.SimError, match=words):
        sim.tensor_map(np.zeros((8, 64), np.float16), **how)


@pytest.mark.skipif(sim.ON_DEVICE, reason="a fault would end the process on a device")
def test_a_copy_signals_its_own_cta():
    source = np.zeros((2, 8, 64), np.float32)
    maps = [sim.tensor_map(a, (16, 6, 2)) for a in (source, source)]
    with pytest.raises(sim.SimError, match="a tensor copy to CTA 0 signals an mbarrier of CTA 1; it must be of the same CTA, or with .cta_group::2 of its pair"):
        sim.run(sim.ptx("tensor"), "foreign", [*maps, np.zeros(64, np.uint8), 0, 0, 0, 768], grid=2, cluster=2, shared_bytes=16384, memory=[source])


KINDS = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "tf32": np.float32, "e4m3": ml_dtypes.float8_e4m3fn}


def gemm(kind, m, n, k, swizzle, grid, defect=0):
    """Quarter integers: every sum is exact."""
    dtype = np.dtype(KINDS[kind])
    pad = -(-k * dtype.itemsize // 16) * 16 // dtype.itemsize
    a, b = (RNG.integers(-8, 9, (rows, pad)) / 4.0 for rows in (m, n))
    a[:, k:] = b[:, k:] = 0
    a, b = a.astype(dtype), b.astype(dtype)
    box = swizzle // dtype.itemsize
    kinds = dict(type_="uint8") if kind == "e4m3" else {}
    maps = [sim.tensor_map(x, (box, rows), swizzle=swizzle, **kinds) for x, rows in ((a, 64), (b, 32))]
    d = np.full((m, n), np.nan, np.float32)
    sim.run(sim.ptx("tensor"), f"gemm_{kind}", [*maps, d, m, n, pad, dtype.itemsize, swizzle, defect], grid=grid, block=160, shared_bytes=2 * 96 * 128 + 1024, memory=[a, b])
    want = a.astype(np.float64) @ b.astype(np.float64).T
    return d, (-want if kind == "f16" else want).astype(np.float32)  # the f16 kernel negates B


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("swizzle", [32, 64, 128])
def test_gemm_of_every_type_and_swizzle(kind, swizzle):
    d, want = gemm(kind, 128, 64, 2 * 128 // np.dtype(KINDS[kind]).itemsize, swizzle, grid=2)
    np.testing.assert_array_equal(d, want)


@pytest.mark.parametrize("m, n, k", [(64, 32, 64), (70, 50, 200), (200, 130, 72), (1, 1, 8)])
@pytest.mark.parametrize("schedule", ["eager", "lazy", "random seed=1", "random seed=2", "random seed=3"])
def test_ragged_sizes_and_more_tiles_than_ctas(m, n, k, schedule, monkeypatch):
    monkeypatch.setenv("DSV4_SIM", f"schedule={schedule}")
    d, want = gemm("bf16", m, n, k, 128, grid=3 if m > 64 else 1)
    np.testing.assert_array_equal(d, want)


@pytest.mark.parametrize("defect, words", [(1, "synchronisation|waited|expects only"), (2, None), (3, "synchronisation|waited"), (4, None), (5, "synchronisation|waited")])
@pytest.mark.skipif(sim.ON_DEVICE, reason="a fault would end the process on a device")
def test_defects_of_a_gemm(defect, words):
    """No wait for an empty stage; a wrong row; no wait for data; a wrong stride; products still running when a stage is freed."""
    if words is None:
        d, want = gemm("bf16", 128, 64, 512, 128, grid=1, defect=defect)
        assert not np.array_equal(d, want)
    else:
        with pytest.raises(sim.SimError, match=words):
            gemm("bf16", 128, 64, 512, 128, grid=1, defect=defect)


def laid_out(matrix, place, size):
    """`matrix` of 16-bit elements into a buffer: element (r, c) at byte place(r, c)."""
    out = np.zeros(size // 2, np.uint16)
    bits = matrix.view(np.uint16)
    for r in range(matrix.shape[0]):
        for c in range(matrix.shape[1]):
            out[place(r, c) // 2] = bits[r, c]
    return out.view(np.uint8)


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize("transposed", [0, 1])
def test_canonical_layouts(swizzle, transposed):
    """Operands that threads lay out, as CuTe writes the canonical layouts of the ISA; strides are not the least ones."""
    a, b = (RNG.integers(-8, 9, shape) / 4.0 for shape in ((64, 16), (32, 16)))
    a, b = a.astype(ml_dtypes.bfloat16), b.astype(ml_dtypes.bfloat16)
    mask = {0: 0, 32: 1, 64: 3, 128: 7}[swizzle]
    bend = lambda at: at ^ ((at >> 7 & mask) << 4)
    width = swizzle or 16
    if transposed:  # mn-major: ((T, w, m), (8, k)) : ((1, T, LBO), (wT, SBO)); without swizzle ((T, 1, m), (8, k)) : ((1, T, SBO), (T, LBO))
        group, eight = (2048, 1024) if swizzle else (256, 2048)  # to the next span of mn; to the next 8 of k
        leading, stride = (group, eight) if swizzle else (eight, group)
        place = lambda mn, k: bend(mn * 2 // width * group + mn * 2 % width + k % 8 * width + k // 8 * eight)
    else:  # k-major: ((8, m), (T, 2k)) : ((w, SBO), (1, LBO))
        leading, stride = (2048, 128) if not swizzle else (16, max(1024, 8 * width))
        place = lambda mn, k: bend(mn % 8 * width + mn // 8 * stride + (k * 2 if swizzle else k // 8 * leading + k % 8 * 2))
    if transposed and swizzle == 128:
        group, eight = 2048, 1024
    size = 16384
    one = [laid_out(x, place, size) for x in (a, b)]
    d = np.zeros((16, 128), np.float32)
    args = [*one, d, size, size, leading, stride, leading, stride, swizzle, transposed]
    sim.run(sim.ptx("tensor"), "one", [*args, 0], block=128, shared_bytes=3 * 16384)
    lane, warp = np.arange(128) % 32, np.arange(128) // 32
    want = a.astype(np.float32) @ b.astype(np.float32).T
    for i in range(16):
        row, col = 16 * warp + lane // 4 + 8 * (i // 2 & 1), i // 4 * 8 + lane % 4 * 2 + (i & 1)
        np.testing.assert_array_equal(d[i], want[row, col] + 100 + np.arange(128))
    if sim.ON_DEVICE:
        return
    with pytest.raises(sim.SimError, match="fence.proxy.async"):
        sim.run(sim.ptx("tensor"), "one", [*args, 1], block=128, shared_bytes=3 * 16384)


@pytest.mark.parametrize("schedule", ["eager", "lazy", "random seed=1", "random seed=2"])
@pytest.mark.skipif(sim.ON_DEVICE, reason="a device gives no alarm")
def test_results_of_wgmma_before_the_wait(schedule, monkeypatch):
    """The compiler may move a copy of a result across the wait, nothing else. Devices wait, and begin when all four warps are there."""
    monkeypatch.setenv("DSV4_SIM", f"schedule={schedule}")
    a, b = (RNG.integers(-8, 9, (rows, 16)) / 4.0 for rows in (64, 32))
    place = lambda mn, k: mn % 8 * 16 + mn // 8 * 128 + k // 8 * 2048 + k % 8 * 2
    one = [laid_out(x.astype(ml_dtypes.bfloat16), place, 16384) for x in (a, b)]

    def go(defect):
        d = np.zeros((16, 128), np.float32)
        sim.run(sim.ptx("tensor"), "one", [*one, d, 16384, 16384, 2048, 128, 2048, 128, 0, 0, defect], block=128, shared_bytes=3 * 16384)
        return d

    np.testing.assert_array_equal(go(3), go(0))
    for defect in (2, 4):
        with pytest.raises(sim.SimError, match="no wgmma.wait_group lies between"):
            go(defect)
    with pytest.raises(sim.SimError, match="hazard in shared memory: .*(waited for|no synchronisation between)"):
        go(5)
    monkeypatch.setenv("DSV4_SIM", f"schedule={schedule} strict=off")
    np.testing.assert_array_equal(go(2), go(0))
    np.testing.assert_array_equal(go(5), go(0))
