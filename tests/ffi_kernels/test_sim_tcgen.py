"""tcgen05 in the PTX interpreter: products of each kind with tensor memory, scale factors, pairs of CTAs, and their defects."""

import ml_dtypes
import numpy as np
import pytest
import sim_driver as sim

pytestmark = pytest.mark.skipif(bool(sim.missing()) or sim.ON_DEVICE, reason=sim.missing() or "needs sm_100a")
RNG = np.random.default_rng(9)
NARROW = {"e2m1": (4, ml_dtypes.float4_e2m1fn), "e2m3": (6, ml_dtypes.float6_e2m3fn), "e3m2": (6, ml_dtypes.float6_e3m2fn)}  # of mxf8f6f4
CODES = {"mxfp8": 0, "e2m3": 3, "e3m2": 4, "e2m1": 5}  # types in the instruction descriptor
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def scale_tile(codes, width):
    """[rows <= 128, blocks <= 4] to the 512 bytes that tcgen05.cp replicates: (r % 32) * 16 + (r / 32) * 4 + block."""
    out = np.zeros(512, np.uint8)
    for r in range(codes.shape[0]):
        out[r % 32 * 16 + r // 32 * 4 : r % 32 * 16 + r // 32 * 4 + width] = codes[r]
    return out


def elements(kind, shape):
    """(values, bytes of the innermost dimension) that are exact in the kind."""
    if kind.endswith("bf16"):
        v = RNG.integers(-8, 9, shape) / 4.0
        return v, v.astype(ml_dtypes.bfloat16).view(np.uint8)
    if "fp8" in kind:
        v = RNG.integers(-8, 9, shape) / 4.0
        return v, v.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    if kind in NARROW:  # 16 elements packed into the first bytes of 16
        bits, dtype = NARROW[kind]
        codes = RNG.integers(0, 1 << bits, shape).astype(np.uint8)
        spread = (codes.reshape(*shape[:-1], -1, 16, 1) >> np.arange(bits) & 1).reshape(*shape[:-1], -1, 16 * bits)
        packed = np.packbits(spread, axis=-1, bitorder="little")
        return codes.view(dtype).astype(float), np.concatenate([packed, np.full((*packed.shape[:-1], 16 - packed.shape[-1]), 0xFD, np.uint8)], -1).reshape(shape)
    codes = RNG.integers(0, 16, shape).astype(np.uint8)
    return E2M1[codes], codes[..., 0::2] | codes[..., 1::2] << 4


def product(kind, m, n, steps, pair=False, defect=0, ws="", module=None):
    """Runs a tile of D [m, n] over `steps` steps of 32 bytes; returns what tensor memory holds and A B^T, scaled."""
    k = {"bf16": 16, "nvfp4": 64}.get(kind, 32)
    (a, a_bytes), (b, b_bytes) = (elements(kind, (rows, k * steps)) for rows in (m, n))
    ctas = 2 if pair else 1
    halves = lambda x: np.split(x, ctas)
    lay = lambda x: np.concatenate([sim.core_tiles(part) for part in np.split(x, steps, axis=1)])
    memory_a = np.stack([lay(x) for x in halves(a_bytes)])
    memory_b = np.stack([lay(x) for x in halves(b_bytes)])
    blocks = {"nvfp4": 4, "bf16": 0, "fp8": 0}.get(kind, 1)
    scales, tiles = np.zeros((ctas, 512), np.uint8), (0, 0)
    if blocks:
        low, high = (0x30, 0x48) if kind == "nvfp4" else (124, 131)  # e4m3 0.5 .. 4; powers of two
        sa, sb = (RNG.integers(low, high, (rows, blocks * steps)).astype(np.uint8) for rows in (m, n))
        value = lambda s: s.view(ml_dtypes.float8_e4m3fn).astype(float) if kind == "nvfp4" else np.exp2(s.astype(float) - 127)
        a, b = a * np.repeat(value(sa), k // blocks, 1), b * np.repeat(value(sb), k // blocks, 1)
        tiles = (1, -(-n // 128))
        scales = np.stack([
            np.concatenate([
                scale_tile(part, blocks)
                for step in range(steps)
                for part in [rows[:, step * blocks : (step + 1) * blocks], *np.split(sb[:, step * blocks : (step + 1) * blocks], range(128, n, 128))]
            ])
            for rows in halves(sa)
        ])  # fmt: skip
    if kind == "bf16":
        idesc = 1 << 4 | 1 << 7 | 1 << 10 | n // 8 << 17 | m // 16 << 24
    elif kind == "fp8":
        idesc = 1 << 4 | n // 8 << 17 | m // 16 << 24
    elif kind == "nvfp4":
        idesc = 1 << 7 | 1 << 10 | n // 8 << 17 | m // 128 << 27
    else:
        idesc = 1 << 23 | n // 8 << 17 | m // 128 << 27 | CODES[kind] << 7 | CODES[kind] << 10
    parts = 128 // m if ws else 2 if pair and m == 128 else 1  # of the columns, in lanes of their own
    columns = n // parts
    d = np.zeros((ctas, 128, columns), np.uint32)
    rows_a, rows_b = m // ctas, n // ctas
    # the leading stride separates the two 16-byte columns: it differs between A and B, so both use the larger one
    assert rows_a == rows_b or kind, "layouts"
    leading = 16 * max(rows_a, rows_b)

    def spread(x, rows):
        parts = x.reshape(ctas, steps, 2, rows * 16)
        wide = np.zeros((ctas, steps, 2, leading), np.uint8)
        wide[..., : rows * 16] = parts
        return wide.reshape(ctas, -1)

    memory_a, memory_b = spread(memory_a, rows_a), spread(memory_b, rows_b)
    args = [memory_a, memory_b, scales, d, memory_a.shape[1], memory_b.shape[1], steps, 2 * leading, 2 * leading, *tiles, columns, leading, 128, 0, idesc, defect]
    sim.run(module or sim.ptx("tcgen", "sm_100a"), f"tile_{'mxfp8' if kind in NARROW else kind}{'_pair' if pair else ws}", args, grid=ctas, cluster=ctas, block=128,
            shared_bytes=memory_a.shape[1] + memory_b.shape[1] + max(512, scales.shape[1]))
    want = a @ b.T
    if ws:
        got = np.concatenate(np.split(d.view(np.float32)[0], parts), 1)
    elif m == 64:
        got = d.view(np.float32)[0].reshape(4, 32, n)[:, :16].reshape(64, n)
    elif pair and m == 128:
        got = np.concatenate([np.concatenate([x[:64], x[64:]], 1) for x in d.view(np.float32)])
    else:
        got = d.view(np.float32).reshape(-1, columns)[:m]
    return got, want.astype(np.float32)


SHAPES = [
    ("bf16", 128, 64, 3, False), ("bf16", 64, 40, 2, False), ("bf16", 256, 96, 2, True), ("bf16", 128, 64, 2, True), ("fp8", 128, 128, 2, False),
    ("nvfp4", 128, 64, 3, False), ("nvfp4", 128, 256, 2, False), ("nvfp4", 256, 192, 3, True), ("mxfp8", 128, 72, 2, False),
    ("e2m1", 128, 64, 3, False), ("e2m3", 128, 48, 2, False), ("e3m2", 128, 64, 2, False),
]  # fmt: skip


@pytest.mark.parametrize("kind, m, n, steps, pair", SHAPES)
@pytest.mark.parametrize("schedule", ["eager", "lazy", "random seed=1", "random seed=4"])
def test_products(kind, m, n, steps, pair, schedule, monkeypatch):
    monkeypatch.setenv("DSV4_SIM", f"schedule={schedule}")
    got, want = product(kind, m, n, steps, pair)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("defect, words", [
    (1, "fence.proxy.async"), (2, "differ between the quarters|synchronisation|not equal"), (3, "deadlock"), (4, "has not been waited for|no synchronisation"),
    (5, "reaches lanes"), (6, "without freeing"), (7, "tensor memory: writes columns .* reads"),
])  # fmt: skip
@pytest.mark.parametrize("schedule", ["eager", "lazy", "random seed=2"])
def test_defects(defect, words, schedule, monkeypatch):
    """No proxy fence; a scale tile left out; no commit; no wait for it; another warp's lanes; no dealloc; no wait for loads before it."""
    monkeypatch.setenv("DSV4_SIM", f"schedule={schedule}")
    with pytest.raises((sim.SimError, AssertionError), match=words):
        got, want = product("nvfp4", 128, 64, 2, defect=defect)
        np.testing.assert_array_equal(got, want)


def test_instructions_name_one_cta_group(tmp_path):
    """ptxas refuses a kernel that mixes them, so this one is made from PTX."""
    mixed = tmp_path / "mixed.ptx"
    mixed.write_text(sim.ptx("tcgen", "sm_100a").read_text().replace("tcgen05.commit.cta_group::1", "tcgen05.commit.cta_group::2"))
    with pytest.raises(sim.SimError, match="must name the same"):
        product("nvfp4", 128, 64, 2, module=mixed)


@pytest.mark.parametrize("habit", [5, 7])
@pytest.mark.parametrize("schedule", ["eager", "random seed=2"])
def test_what_devices_do_beyond_the_isa(habit, schedule, monkeypatch):
    """Lane 0 for every warp, or loads without a wait, are defects, unless a kernel relies on devices (strict=off)."""
    monkeypatch.setenv("DSV4_SIM", f"schedule={schedule} strict=off")
    np.testing.assert_array_equal(*product("nvfp4", 128, 64, 2, defect=habit))


@pytest.mark.parametrize("m, n", [(32, 64), (64, 128), (64, 256), (128, 64)])
@pytest.mark.parametrize("ws", ["_ws", "_ws_ts"])
@pytest.mark.parametrize("schedule", ["eager", "lazy", "random seed=3"])
def test_weight_stationary(m, n, ws, schedule, monkeypatch):
    """A in shared memory; in tensor memory, once for each part of the columns."""
    monkeypatch.setenv("DSV4_SIM", f"schedule={schedule}")
    np.testing.assert_array_equal(*product("bf16", m, n, 2, ws=ws))
