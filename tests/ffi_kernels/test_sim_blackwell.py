"""What came with sm_100 beside products of tensor memory: work stealing, packed tensors, rings that commits free, pairs."""

import ml_dtypes
import numpy as np
import pytest
import sim_driver as sim
from sim_draws import Draws

pytestmark = pytest.mark.skipif(bool(sim.missing()) or sim.ON_DEVICE, reason=sim.missing() or "needs sm_100a")
RNG = Draws()
SCHEDULES = ["eager", "lazy", *(f"random seed={seed}" for seed in range(1, 7))]


def steal(grid, cluster, defect=0):
    owner, tiles = np.zeros(grid[::-1], np.int32), np.zeros(1, np.int32)
    sim.run(sim.ptx("blackwell", "sm_100a"), "steal", [owner, tiles, defect], grid=grid, cluster=cluster)
    return owner, int(tiles[0])


@pytest.mark.parametrize("grid, cluster", [((12, 1), 1), ((6, 5), 2), ((4, 1), 4)])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_tile_is_done_once(grid, cluster, schedule, monkeypatch):
    monkeypatch.setenv("DSV4_SIM", f"schedule={schedule}")
    owner, tiles = steal(grid, cluster)
    assert tiles == grid[0] * grid[1] and (owner > 0).all()
    firsts = set(owner.ravel().tolist())
    assert all((first - 1) % cluster == 0 for first in firsts)
    # a cluster that ran owns its own tiles, and a whole cluster's tiles go to one owner
    assert all(owner.ravel()[first - 1] == first for first in firsts)
    assert (owner.reshape(-1, cluster) == owner.reshape(-1, cluster)[:, :1]).all()
    if schedule == "eager":
        assert firsts == {1}


@pytest.mark.parametrize("defect, words", [(1, "none is left"), (2, "has not been waited for|no answer|no synchronisation"), (3, "was not canceled")])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_defects_of_work_stealing(defect, words, schedule, monkeypatch):
    monkeypatch.setenv("DSV4_SIM", f"schedule={schedule}")
    with pytest.raises(sim.SimError, match=words):
        steal((6, 1), 2, defect)


def packed(kind, swizzle, corner, rows=11, width=256, box_rows=8):
    """(what shared memory holds of a box of 128 elements by box_rows, the codes of the tensor)"""
    bits = int(kind[0])
    codes = RNG.integers(0, 1 << bits, (rows, width)).astype(np.uint8)
    raw = sim_aligned(packed_bits(codes, bits))
    padded = "to 16 bytes" in kind
    moved, held = 16 * bits * box_rows, (128 if padded else 64) * box_rows
    seen = np.zeros(held, np.uint8)
    tensor = sim.tensor_map(raw, (128, box_rows), swizzle=swizzle, type_=kind, dims=(width, rows))
    sim.run(sim.ptx("blackwell", "sm_100a"), "packed", [tensor, seen, *corner, moved, held], shared_bytes=held, memory=[raw])
    return seen, codes


def packed_bits(codes, bits):
    return np.packbits((codes[..., None] >> np.arange(bits) & 1).reshape(codes.shape[0], -1), axis=1, bitorder="little")


def sim_aligned(array):
    """A copy at a multiple of 32 bytes, as maps of padded elements ask for."""
    room = np.zeros(array.nbytes + 32, np.uint8)
    at = -room.ctypes.data % 32
    out = room[at : at + array.nbytes].reshape(array.shape)
    out[...] = array
    return out


@pytest.mark.parametrize("corner", [(0, 0), (128, 2), (128, 6), (0, -3)])
@pytest.mark.parametrize("kind, swizzle", [("4 bits", 0), ("4 bits", 64), ("4 bits, 16 to 16 bytes", 0), ("4 bits, 16 to 16 bytes", 128), ("4 bits, 16 to 16 bytes", "128 in 32"), ("6 bits, 16 to 16 bytes", 128)])
def test_packed_boxes(kind, swizzle, corner):
    seen, codes = packed(kind, swizzle, corner)
    want = np.zeros((8, 128), np.uint8)
    low, high = max(0, corner[1]), min(11, corner[1] + 8)
    want[low - corner[1] : high - corner[1]] = codes[low:high, corner[0] : corner[0] + 128]
    pieces = packed_bits(want, int(kind[0])).reshape(8, 8, -1)  # of 16 elements
    if kind != "4 bits":
        pieces = np.concatenate([pieces, np.full((8, 8, 16 - pieces.shape[2]), 0xFD, np.uint8)], 2)  # padding is nobody's: poison
    linear = np.arange(pieces.size)
    mask, bit = {0: (0, 4), 64: (3, 4), 128: (7, 4), "128 in 32": (3, 5)}[swizzle]
    np.testing.assert_array_equal(seen[linear ^ (linear >> 7 & mask) << bit], pieces.ravel())


@pytest.mark.parametrize("kind, box, dims, words", [
    ("4 bits", (127, 8), (256, 11), "multiple of 2"), ("4 bits, 16 to 16 bytes", (64, 8), (256, 11), "the box 128"), ("4 bits, 16 to 16 bytes", (128, 8), (192, 11), "multiple of 128"),
    ("4 bits", (128, 8), (256, 11), "more than the swizzle"),
])  # fmt: skip
def test_packed_maps_are_refused(kind, box, dims, words):
    with pytest.raises(sim.SimError, match=words):
        sim.tensor_map(sim_aligned(np.zeros((dims[1], dims[0] // 2), np.uint8)), box, swizzle=32 if "swizzle" in words else 0, type_=kind, dims=dims)


def test_a_packed_box_starts_at_a_whole_pack():
    with pytest.raises(sim.SimError, match="must be a multiple of 128"):
        packed("4 bits, 16 to 16 bytes", 0, (64, 0))


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_commit_frees_the_stage_that_copies_fill(schedule, stored, monkeypatch):
    """Who fills the stage again has waited for the commit alone: it knows that the earlier copies or stores had ended."""
    monkeypatch.setenv("DSV4_SIM", f"schedule={schedule}")
    rounds, n = 5, 32
    a, b = (RNG.integers(-8, 9, (rounds, rows, 16)) / 4.0 for rows in (128, n))
    lay = lambda x: np.stack([sim.core_tiles(part.astype(ml_dtypes.bfloat16).view(np.uint8)) for part in x])
    d = np.zeros((128, n), np.float32)
    args = [lay(a), lay(b), d, rounds]
    sim.run(sim.ptx("blackwell", "sm_100a"), "ring", [*args, 2 * stored], block=128)
    want = a[0] @ b[0].T
    first = want.copy()
    for x, y in zip(a[1:], b[1:]):
        want = want / 2 + x @ y.T
    for lanes in (slice(8, 24), slice(64, 96)):
        want[lanes] = first[lanes]
    np.testing.assert_array_equal(d, want.astype(np.float32))
    if stored:
        return
    with pytest.raises(sim.SimError, match="hazard|expects|range"):
        sim.run(sim.ptx("blackwell", "sm_100a"), "ring", [*args, 1], block=128)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_pairs_of_ctas(schedule, own, monkeypatch):
    monkeypatch.setenv("DSV4_SIM", f"schedule={schedule}")
    source = RNG.integers(0, 1 << 32, 128).astype(np.uint32)
    d = np.zeros((4, 4, 32, 4), np.uint32)
    args = [sim.tensor_map(source, (128,)), d]
    sim.run(sim.ptx("blackwell", "sm_100a"), "pairs", [*args, 2 * own], grid=4, cluster=4, block=128, memory=[source])
    np.testing.assert_array_equal(d, np.broadcast_to(source.reshape(32, 4), d.shape))
    with pytest.raises(sim.SimError, match="it may be one of the pair's other CTA"):
        sim.run(sim.ptx("blackwell", "sm_100a"), "pairs", [*args, 1], grid=4, cluster=4, block=128, memory=[source])


@pytest.mark.parametrize("swizzle", [0, 128])
def test_four_rows(swizzle):
    source, back = RNG.integers(0, 1 << 16, (20, 128)).astype(np.uint16), np.zeros((20, 128), np.uint16)
    chosen, x = [17, 3, 30, 4], 64  # row 30 does not exist
    seen = np.zeros(4 * 128, np.uint8)
    maps = [sim.tensor_map(a, (64, 1), swizzle=swizzle) for a in (source, back)]
    sim.run(sim.ptx("blackwell", "sm_100a"), "rows", [*maps, seen, x, *chosen, seen.nbytes], shared_bytes=1024, memory=[source, back])
    want = np.stack([source[r, x:] if r < 20 else np.zeros(64, np.uint16) for r in chosen])
    linear = np.arange(seen.size)
    np.testing.assert_array_equal(seen[linear ^ (linear >> 7 & (7 if swizzle else 0)) << 4].view(np.uint16).reshape(4, 64), want)
    expected = np.zeros_like(back)
    for r, row in zip(chosen[::-1], want):
        if r < 20:
            expected[r, x:] = row
    np.testing.assert_array_equal(back, expected)
    with pytest.raises(sim.SimError, match="it must be 1"):
        wide = [sim.tensor_map(a, (64, 2)) for a in (source, back)]
        sim.run(sim.ptx("blackwell", "sm_100a"), "rows", [*wide, seen, x, *chosen, seen.nbytes], shared_bytes=1024, memory=[source, back])
