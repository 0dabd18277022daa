"""Clusters in the PTX interpreter: what CTAs do in each other's shared memory."""

import numpy as np
import pytest
import sim_driver as sim
from sim_driver import ints, launch, poisoned

pytestmark = pytest.mark.skipif(bool(sim.missing()), reason=sim.missing() or "-")
SIZES = [2, 4, 8]


def i32(x):
    return np.asarray(x).astype(np.int64).astype(np.uint32).view(np.int32)


@pytest.mark.parametrize("size", SIZES)
def test_loads_stores_and_atomics(size):
    a, d = ints(256 * 2 * size), poisoned(512 * 2 * size)
    launch("dsmem", [a, d, 0], module="remote", grid=2 * size, cluster=size)
    blocks = a.reshape(2, size, 8, 32)
    after = blocks.copy()
    d = d.reshape(2, size, 16, 32)
    for rank in range(size):
        mine, there = blocks[:, rank], blocks[:, (rank + 1) % size]
        v, got, new = mine[:, 0], d[:, rank], after[:, (rank + 1) % size]
        np.testing.assert_array_equal(got[:, :6], there[:, :6])
        np.testing.assert_array_equal(got[:, 6], there[:, 6])
        new[:, 0] += v
        new[:, 1] = np.minimum(new[:, 1], v)
        new[:, 2] = np.maximum(new[:, 2].view(np.uint32), np.ascontiguousarray(v).view(np.uint32)).view(np.int32)
        new[:, 3] = v
        new[:, 4] ^= v
        old, most = new[:, 5].view(np.uint32).astype(np.int64), np.ascontiguousarray(v).view(np.uint32).astype(np.int64)
        new[:, 5] = i32(np.where(old >= most, 0, old + 1))
        new[:, 6] = np.where(there[:, 6] == mine[:, 6], 77, there[:, 6])
    for rank in range(size):
        there, got = after[:, (rank + 1) % size], d[:, rank]
        lane = np.arange(32)
        np.testing.assert_array_equal(got[:, 7], there[:, 4 * (lane & 1), 2])
        np.testing.assert_array_equal(got[:, 8], there[:, 4 * (lane & 1), 3])
        for i in range(4):
            np.testing.assert_array_equal(got[:, 9 + i], there[:, 7, lane // 4 * 4 + i])
        assert (got[:, 13] == 2 + 1010 * ((rank + 1) % size)).all()
        mine = after[:, rank].astype(np.int64)
        np.testing.assert_array_equal(got[:, 14], i32(sum(k * mine[:, i] for i, k in enumerate((1, 3, 5, 7, 11, 13, 17)))))
        v = blocks[:, (rank - 1) % size, 0]
        want = np.ascontiguousarray(after[:, rank, 7]).view(np.uint8).reshape(2, 32, 4)
        want[..., 1] = v.astype(np.uint8)
        want[..., 2:] = np.ascontiguousarray((v * 3).astype(np.uint16)).view(np.uint8).reshape(2, 32, 2)
        np.testing.assert_array_equal(got[:, 15], want.view(np.int32)[..., 0])


@pytest.mark.parametrize("size", SIZES)
def test_asynchronous_stores(size):
    a, d = ints(32 * 2 * size), poisoned(512 * 2 * size)
    launch("stores", [a, d, 0], module="remote", grid=2 * size, cluster=size)
    for v, got in zip(np.roll(a.reshape(2, size, 32), 1, 1).reshape(-1, 32).astype(np.int64), d.reshape(-1, 512)):
        words = [v.astype(np.int32), (v * 1000003), np.stack([v + 1, v + 2], 1).astype(np.int32), np.stack([v, -v, v ^ 5, np.full(32, 7)], 1).astype(np.int32),
                 np.stack([v << 33, -v], 1), (v * 0.5).astype(np.float32), np.zeros(64, np.int32)]  # fmt: skip
        np.testing.assert_array_equal(got, np.concatenate([np.ascontiguousarray(w).reshape(-1).view(np.int32) for w in words]))


@pytest.mark.parametrize("size", SIZES)
def test_asynchronous_reductions(size):
    a, d = ints(32 * 2 * size), poisoned(384 * 2)
    launch("reductions", [a, d, 0], module="remote", grid=2 * size, cluster=size)
    for v, got in zip(a.reshape(2, size, 32), d.reshape(2, 12, 32)):
        u = v.view(np.uint32)
        start = lambda i, kind: np.full((1, 32), 1000 + i, kind)
        want = [1000 + v.sum(0), 1001 + v.sum(0), np.concatenate([start(2, np.uint32), u]).min(0), np.concatenate([start(3, np.int32), v]).min(0), np.concatenate([start(4, np.uint32), u]).max(0),
                np.concatenate([start(5, np.int32), v]).max(0), np.bitwise_and.reduce(np.concatenate([start(6, np.int32), v])), np.bitwise_or.reduce(np.concatenate([start(7, np.int32), v])),
                np.bitwise_xor.reduce(np.concatenate([start(8, np.int32), v])), np.full(32, 1009 + size)]  # fmt: skip
        for i, row in enumerate(want):
            np.testing.assert_array_equal(got[i], i32(row), err_msg=str(i))
        first = np.repeat([1010, 1011], 32).astype(np.int32).view(np.int64)
        np.testing.assert_array_equal(got[10:].reshape(-1).view(np.int64), first + (v.astype(np.int64) << 20).sum(0))


@pytest.mark.parametrize("size", SIZES)
def test_bulk_copies_and_reductions(size):
    a, d = ints(192 * 2 * size), poisoned(384 * 2 * size)
    launch("bulk", [a, d, 0], module="remote", grid=2 * size, cluster=size)
    for source, got in zip(np.roll(a.reshape(2, size, 3, 64), 1, 1).reshape(-1, 3, 64), d.reshape(-1, 6, 64)):
        u = source.view(np.uint32)
        sums = np.full(64, 55, np.int32).view(np.int64) + np.ascontiguousarray(source[2]).view(np.int64)
        want = [source[0], 51 + source[1], np.minimum(52, source[2]), np.maximum(np.uint32(53), u[0]).view(np.int32), 54 ^ source[1], sums.view(np.int32)]
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("size", SIZES)
def test_arrivals_on_barriers_of_another_cta(size):
    a, d = ints(32 * 2 * size), poisoned(32 * 2 * size)
    launch("arrivals", [a, d, 0], module="remote", grid=2 * size, cluster=size)
    v = a.reshape(2, size, 32)
    want = np.repeat(v[:, size - 1 : size, ::-1], size, 1).copy()
    want[:, 0] += 1000 * (2 * v[:, 0] + v[:, 1])
    np.testing.assert_array_equal(d.reshape(2, size, 32), want)


@pytest.mark.skipif(sim.ON_DEVICE, reason="undefined on a device")
def test_bulk_copies_within_a_cta_are_refused():
    with pytest.raises(sim.SimError, match="of the same CTA; it must go to another one"):
        launch("bulk", [ints(192), poisoned(384), 0], module="remote", grid=1)
