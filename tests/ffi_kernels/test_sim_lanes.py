"""Lanes in groups and branches of their own, jumps, barriers that reduce, special registers, in the PTX interpreter."""

import functools

import numpy as np
import pytest
import sim_driver as sim
from sim_draws import Draws
from sim_driver import ints, launch, poisoned

pytestmark = pytest.mark.skipif(bool(sim.missing()), reason=sim.missing() or "-")
RNG = Draws()


def s32(x):
    x = int(x) & 0xFFFFFFFF
    return x - (x >> 31 << 32)


def mask_of(lanes):
    return sum(1 << int(lane) for lane in lanes)


@pytest.mark.parametrize("keys", ["one", "two", "quads", "any", "each"])
def test_groups_of_lanes(keys):
    """Votes, matches, reductions and shuffles of several groups at the same instruction."""
    key = {"one": np.zeros(32), "two": np.arange(32) % 2, "quads": np.arange(32) // 4, "any": RNG.integers(0, 5, 32), "each": np.arange(32)}[keys].astype(np.int32)
    a, d = ints(32, -4, 5), poisoned(32 * 20)
    key.flags.writeable = False
    launch("groups", [a, key, d], module="lanes")
    for lane in range(32):
        group = np.flatnonzero(key == key[lane])
        v, positive = a[group], a[group] > 0
        same = mask_of(group[v == a[lane]])
        equal = bool((v & 1 == v[0] & 1).all())
        unsigned = v.view(np.uint32)
        want = [mask_of(group[positive]), positive.any(), positive.all(), positive.all() or not positive.any(), same, same, mask_of(group) if equal else 0, equal, mask_of(group), 1,
                v.sum(), v.min(), v.max(), unsigned.min(), unsigned.max(), np.bitwise_and.reduce(v), np.bitwise_or.reduce(v), np.bitwise_xor.reduce(v), v[0], v[-1]]  # fmt: skip
        np.testing.assert_array_equal(d.reshape(32, 20)[lane], [s32(x) for x in want])


def test_lanes_that_leave_a_loop():
    a, d = ints(32, 0, 100), poisoned(32)
    launch("leaving", [a, a, d], module="lanes")
    for lane in range(32):
        total = 0
        for k in range(a[lane] & 15):
            left = a[(a & 15) > k]
            total += left.sum() + left[0] * k
        assert d[lane] == total


def test_branches_within_branches():
    a, d = ints(32), poisoned(32)
    launch("branches", [a, a, d], module="lanes")
    r = a.astype(int).copy()
    r[:12] = a[11::-1]
    odd = r[1:12:2].copy()
    r[1:12:2] = odd + np.roll(odd, -1)
    for k in range(3):
        even = r[0:12:2].copy()
        r[0:12:2] = even - (np.roll(even, -2) + k)
    r[12:20] = a[12:20].reshape(4, 2)[:, ::-1].ravel() * 3
    r[20:] = np.roll(a[20:], -1)
    r[26:] ^= r[26:].reshape(-1, 2)[:, ::-1].ravel()
    np.testing.assert_array_equal(d, r + r[::-1])


def test_lanes_that_are_done_early():
    a, d = ints(128), poisoned(128)
    launch("early", [a, a, d], module="lanes", block=128)
    for warp in range(4):
        v = a[32 * warp :][:32]
        alive = v[v > 0]
        want = np.full(32, -1)
        want[v > 0] = np.roll(alive, -1) + alive.max()
        np.testing.assert_array_equal(d[32 * warp :][:32], want)


@functools.cache
def ackermann(m, n):
    return n + 1 if m == 0 else ackermann(m - 1, 1) if n == 0 else ackermann(m - 1, ackermann(m, n - 1))


def jumped(v):
    def c_div(a, b):
        return int(abs(a) // b * (1 if a >= 0 else -1))

    for k in range(6):
        case = v & 15
        if case == 0:
            v = v * 5 + 1
        elif case == 1:
            v ^= 0x55
        elif case in (2, 3):
            v += (k if case == 2 else 0) - 11
        elif case == 4:
            v = (v & 0xFFFFFFFF).bit_count() + 9
        elif case == 5:
            v = v << 2 | k
        elif case == 6:
            v = -v
        elif case == 7:
            v >>= 1
        elif case == 8:
            v += 100
        elif case == 9:
            v = v * v & 0xFFFF
        elif case == 10:
            v |= 3
        elif case == 11:
            v = int(f"{v & 0xFFFFFFFF:032b}"[::-1], 2) >> 20
        elif case == 12:
            v = 7
        elif case == 13:
            v = c_div(v, 3)
        elif case == 14:
            v -= 77 * c_div(v, 77)
        else:
            v += 1
        v = s32(v)
    return v


def test_jump_tables_and_recursion():
    a, d = ints(64, 0, 5000), poisoned(64)
    launch("jumps", [a, a, d], module="lanes", block=64)
    np.testing.assert_array_equal(d, [jumped(int(v)) + 100000 * ackermann(i % 3, i % 4) for i, v in enumerate(a)])


def test_barriers_that_reduce():
    a, d = ints(256), poisoned(256)
    launch("reductions", [a, a, d], module="lanes", block=256)
    for group in range(4):
        v = a[64 * group :][:64]
        want = int((v > 0).sum()) + 1000 * (v > -900).all() + 10000 * (v > 900).any() + 100000 * int((a < 0).sum())
        assert (d[64 * group :][:64] == want).all()


@pytest.mark.parametrize("cluster", [1, (2, 1, 1), (1, 2, 2), (2, 2, 1)])
def test_special_registers(cluster):
    grid, block = (4, 2, 2), (5, 3, 4)
    d = poisoned(16 * 60 * 36)
    launch("registers", [d], module="lanes", grid=grid, block=block, cluster=cluster, shared_bytes=1040)
    c = (1, 1, 1) if cluster == 1 else cluster
    for index, row in enumerate(d.reshape(-1, 36)):
        ctas, threads = divmod(index, 60)
        cta = (ctas % 4, ctas // 4 % 2, ctas // 8)
        inside = tuple(x % n for x, n in zip(cta, c))
        lane = threads % 32
        want = [threads % 5, threads // 5 % 3, threads // 15, *block, *cta, *grid, lane, 1 << lane, (2 << lane) - 1, (1 << lane) - 1, 2**32 - (1 << lane), 2**32 - (2 << lane),
                *(x // n for x, n in zip(cta, c)), *(g // n for g, n in zip(grid, c)), *inside, *c, inside[0] + c[0] * (inside[1] + c[1] * inside[2]), c[0] * c[1] * c[2],
                1040, cluster != 1, 0, 0]  # fmt: skip
        np.testing.assert_array_equal(row, [s32(x) for x in want])


def test_what_changes_no_result():
    """setmaxnreg, griddepcontrol, fences of every scope and proxy, prefetches, nanosleep."""
    a, d = ints(256), poisoned(256)
    launch("hints", [a, a, d], module="lanes", block=256)
    np.testing.assert_array_equal(d, np.concatenate([a[:128] + 1, a[128:] * 2])[::-1])
