"""The PTX interpreter: control flow, warps, barriers, memory, asynchronous copies, clusters."""

import numpy as np
import pytest
import sim_driver as sim
from sim_draws import Draws
from sim_driver import ints, launch, poisoned
from sim_record import Compare

pytestmark = pytest.mark.skipif(bool(sim.missing()), reason=sim.missing() or "-")
RNG = Draws()


# --- control flow and warps -----------------------------------------------------------------------------------------


def c_mod(v, n):
    return int(np.fmod(v, n))


def diverged(v, thread):
    for k in range(thread & 7):
        if v & 1:
            v = 3 * v + 1
            if c_mod(v, 5) == 0:
                continue
            v -= 2
        else:
            v >>= 1
            if v < 3:
                break
        case = (v + k) & 7
        v = v + 10 if case == 0 else v ^ 77 if case == 1 else v * 3 if case == 2 else v - 1000 if case == 5 else v + k
    return v


def test_divergence_and_reconvergence():
    a, d = ints(96), poisoned(96)
    launch("diverge", [a, d, 96], grid=1, block=96)
    v = np.array([diverged(int(x), i) for i, x in enumerate(a)])
    np.testing.assert_array_equal(d, v + v.reshape(-1, 2)[:, ::-1].ravel())


def test_shuffles_under_divergence():
    a, d = ints(32), poisoned(32)
    launch("split_shuffle", [a, d, 32])
    odd = a[31]
    down = [a[lane + 2] if lane % 8 + 2 < 8 else a[lane] for lane in range(32)]
    v = np.array([a[i] + odd if i & 1 else a[i] - down[i] for i in range(32)])
    groups = [[k for k in range(32) if k // 5 == i // 5] for i in range(32)]
    v = np.array([x + 100 * len(groups[i]) if i // 5 == 2 else x for i, x in enumerate(v)])
    for k in range(5):
        v = np.array([x + v[(groups[i][0] + k % len(groups[i])) & 31] for i, x in enumerate(v)])
    np.testing.assert_array_equal(d, v)


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("width", [32, 8, 2])
def test_shuffle_modes(mode, width):
    a, b = ints(32), RNG.integers(0, 40, 64).astype(np.int32)
    segment = (32 - width) << 8
    b[32:] = segment | (0 if mode == "up" else 31)
    d, valid = poisoned(32), poisoned(32)
    launch(f"shfl_{mode}", [a, b, d, valid])
    for lane in range(32):
        n, first = b[lane] & 31, lane // width * width
        source = {"up": lane - n, "down": lane + n, "bfly": lane ^ n, "idx": first | (n & (width - 1))}[mode]
        inside = source >= first if mode == "up" else source < first + width
        assert valid[lane] == inside
        assert d[lane] == a[source if inside else lane]


def with_any_leader(arrays):
    """Which lane elect.sync elects is open: only how many there are counts."""
    d = arrays[-1].reshape(32, 12)
    return [d[:, :11], d[:, 11:].sum(0)]


ANY_LEADER = Compare(with_any_leader)


def test_votes_matches_and_reductions():
    a = ints(32, -3, 8)
    d = poisoned(32 * 12)
    launch("votes", [a, d, 32], compare=ANY_LEADER)
    d = d.reshape(32, 12)
    mask = lambda which: int(sum(1 << i for i in range(32) if which[i]))
    as_signed = lambda v: int(np.uint32(v).astype(np.int32))
    for i in range(32):
        want = [as_signed(mask(a > 0)), int((a > 5).any()), 1, as_signed(mask(a == a[i])), 0, 0, a.sum(), a.min(), as_signed(a.view(np.uint32).max()),
                int(np.bitwise_xor.reduce(a)), as_signed(mask(a > 0)) if a[i] > 0 else 0]  # fmt: skip
        np.testing.assert_array_equal(d[i, :11], want)
    assert d[:, 11].sum() == 1


def test_match_all_of_equal_values():
    d = poisoned(32 * 12)
    launch("votes", [np.full(32, 5, np.int32), d, 32], compare=ANY_LEADER)
    assert (d.reshape(32, 12)[:, 4] == -1).all() and (d.reshape(32, 12)[:, 5] == 1).all()


def test_barriers():
    a, d = ints(3 * 256), poisoned(3 * 256)
    launch("barriers", [a, d, 0], grid=3, block=256)
    for block in range(3):
        s = a[256 * block :][:256].astype(int)
        s = s.reshape(8, 32).sum(0)
        s = s + s.reshape(-1, 2)[:, ::-1].ravel()
        count = int((s > 0).sum()) * 8
        np.testing.assert_array_equal(d[256 * block :][:256], np.tile(s, 8) + 1000 * count + 7)


def test_barriers_between_some_warps():
    a, d = ints(32 * 6), poisoned(32 * 6)
    launch("producer_consumer", [a, d, 6], block=64)
    np.testing.assert_array_equal(d.reshape(6, 32), 2 * a.reshape(6, 32)[:, ::-1])


def weighed(v):
    def collatz(x, steps):
        while x != 1 and steps < 200:
            x, steps = 3 * x + 1 if x & 1 else x // 2 if x >= 0 else -(-x // 2), steps + 1
        return x, steps

    table = [0] * 16
    for k in range(16):
        table[k * 7 & 15] = v * k
    if v & 1:
        x, steps = collatz(v, 0)
        steps += x
    else:
        _, steps = collatz(v + 2, 0)
    return table[v & 15] + steps


def test_calls_and_local_memory_under_divergence():
    a, d = ints(64, 1, 1000), poisoned(64)
    launch("calls", [a, d, 0], block=64)
    np.testing.assert_array_equal(d, [weighed(int(v)) if v % 3 else -weighed(int(v) + 1) for v in a])


def test_atomics():
    sums, d, f = np.zeros(16, np.int32), poisoned(128), np.zeros(1, np.float32)
    launch("atomics", [sums, d, f, 0], grid=2, block=64)
    np.testing.assert_array_equal(sums[:8], [2 * sum(range(k, 64, 8)) for k in range(8)])
    np.testing.assert_array_equal(sums[8:14], [63, -63, -1, 128 % 101, 7, 128])
    np.testing.assert_array_equal(d, np.arange(128))
    assert f[0] == 32


def test_ctas_that_hand_over_and_ctas_that_wait_for_each_other():
    sums, d = np.zeros(16, np.int32), poisoned(20)
    launch("last_block", [sums, d, np.zeros(1, np.float32), 0], grid=20)
    assert sums[1] == sum(i * i for i in range(20))
    sums, d = np.zeros(16, np.int32), poisoned(32 * 8)
    launch("grid_barrier", [sums, d, np.zeros(1, np.float32), 0], grid=8)
    assert (d == 8).all()


def test_three_dimensions():
    d = poisoned(24 * 70)
    launch("three_dimensions", [None, d, 0], grid=(2, 3, 4), block=(5, 7, 2))
    np.testing.assert_array_equal(d.reshape(24, 70), np.arange(24)[:, None] * 10000 + np.arange(70))


# --- asynchronous copies, clusters ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [128, 500, 1024, 3])
def test_cp_async_ring(n):
    a, tiles = ints(n), -(-n // 128)
    d = poisoned(128 * tiles)
    launch("ring", [a, d, n], module="async")
    padded = np.zeros(128 * tiles, np.int32)
    padded[:n] = a
    np.testing.assert_array_equal(d, padded.reshape(-1, 2)[:, ::-1].ravel() + 1)


@pytest.mark.parametrize("tiles", [1, 2, 7])
def test_bulk_pipeline(tiles):
    a, d = ints(256 * tiles), poisoned(256 * tiles)
    launch("pipeline", [a, d, tiles], module="async", block=96)
    np.testing.assert_array_equal(d.reshape(-1, 256), a.reshape(-1, 256)[:, ::-1])


def test_bulk_copies_out_and_reductions():
    a, d = ints(3 * 256), np.zeros(4 * 256, np.int32)
    launch("bulk_out", [a, d, 3 * 256], module="async", grid=3, block=256)
    np.testing.assert_array_equal(d[: 3 * 256], a * 5)
    np.testing.assert_array_equal(d[3 * 256 :], a.reshape(3, 256).sum(0) * 5)


def test_cp_async_arrives_on_mbarriers():
    a, d = ints(128), poisoned(64)
    launch("arrive_later", [a, d, 0], module="async", block=64)
    np.testing.assert_array_equal(d, a[63::-1] + 1000 * a[127:63:-1])


@pytest.mark.parametrize("size", [2, 4, 8, 16])
def test_clusters(size):
    a, d = ints(64 * size), poisoned(64 * size)
    launch("neighbours", [a, d, 0], module="async", grid=2 * size, cluster=size)
    blocks = a.reshape(2, size, 32)
    want = np.roll(blocks, -1, 1) + 100000 * np.roll(np.arange(size), 1)[None, :, None]
    want[:, 0] += 100 * blocks.sum(1)
    np.testing.assert_array_equal(d.reshape(2, size, 32), want)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_remote_stores_arrivals_and_multicast(size):
    a, d = ints(64 * size), poisoned(64 * size)
    launch("remote_async", [a, d, 0], module="async", grid=2 * size, cluster=size)
    blocks = a.reshape(2, size, 32)
    np.testing.assert_array_equal(d.reshape(2, size, 32), np.roll(blocks, 1, 1) + 1000 * a[63:31:-1])
