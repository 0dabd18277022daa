"""Tensor copies of the PTX interpreter: boxes of one to five dimensions, swizzles, fill, strides, stores, reductions, multicast."""

import itertools

import ml_dtypes
import numpy as np
import pytest
import sim_driver as sim
from sim_draws import Draws
from sim_record import any_nan

pytestmark = pytest.mark.skipif(bool(sim.missing()), reason=sim.missing() or "-")
RNG = Draws()
BF16 = ml_dtypes.bfloat16
SLACK = 1024  # for aligning dynamic shared memory


def swizzled(offset, swizzle):
    """Where a byte at `offset` from a multiple of 1024 lies under a swizzle of that many bytes."""
    return offset ^ ((offset >> 7 & {0: 0, 32: 1, 64: 3, 128: 7}[swizzle]) << 4)


def boxed(tensor, corner, box, strides, fill):
    """The box of a tensor, out of bounds filled; corner, box and strides count from the innermost dimension."""
    counts = [-(-b // s) for b, s in zip(box, strides)]
    out = np.full(counts[::-1], fill, tensor.dtype)
    for index in itertools.product(*map(range, counts[:0:-1])):
        place = [c + i * s for c, i, s in zip(corner[:0:-1], index, strides[:0:-1])]
        if all(0 <= p < n for p, n in zip(place, tensor.shape)):
            row = tensor[tuple(place)]
            for i in range(counts[0]):
                if 0 <= corner[0] + i < len(row):
                    out[(*index, i)] = row[corner[0] + i]
    return out


def numbers(shape, kind):
    """Small numbers that every type holds, signed where it has a sign."""
    low = 0 if np.dtype(kind).kind == "u" else -60
    return RNG.integers(low, 60, shape).astype(kind)


def load(tensor, corner, box, *, swizzle=0, shift=0, strides=None, fill_nan=False, type_=None, to=None, to_corner=None, compare=None):
    """Bytes of shared memory from a multiple of 1024 on, after a load; a store goes on to the tensor `to`."""
    rank = tensor.ndim
    strides = strides or [1] * rank
    count = int(np.prod([-(-b // s) for b, s in zip(box, strides)])) * tensor.dtype.itemsize
    total = (shift + count + 1023) // 1024 * 1024
    seen, target = np.zeros(total, np.uint8), tensor if to is None else to
    maps = [sim.tensor_map(t, box, swizzle=swizzle, element_strides=strides, fill_nan=fill_nan, type_=type_) for t in (tensor, target)]
    tensor.flags.writeable = False
    pad = lambda x: [*x, *[0] * (5 - rank)]
    sim.run(sim.ptx("tma"), f"box{rank}", [*maps, seen, *pad(corner), *pad(to_corner or corner), shift, count, total, int(to is not None)],
            shared_bytes=total + SLACK, memory=[tensor] if to is None else [tensor, to], **({} if compare is None else dict(compare=compare)))  # fmt: skip
    return seen, count


def check_box(seen, count, want, swizzle, shift=0):
    place = swizzled(shift + np.arange(count), swizzle)
    np.testing.assert_array_equal(seen[place], np.ascontiguousarray(want).reshape(-1).view(np.uint8))
    assert (np.delete(seen, place) == 0xEE).all()


SHAPES = {1: (320,), 2: (11, 96), 3: (5, 11, 96), 4: (3, 5, 7, 64), 5: (3, 2, 5, 7, 64)}
BOXES = {1: (), 2: (6,), 3: (6, 2), 4: (3, 4, 2), 5: (3, 4, 1, 2)}  # behind the innermost dimension
CORNERS = {  # inside, over the upper edges, below zero (innermost in pieces of 16 bytes)
    "inside": ((1,), (1, 2), (1, 2, 1), (1, 2, 1, 1), (1, 2, 0, 1, 0)), "above": ((18,), (5, 8), (5, 9, 4), (3, 5, 3, 2), (3, 5, 2, 1, 2)),
    "below": ((-1,), (-1, -2), (0, -3, -1), (-2, 1, -2, 0), (-1, -1, -1, 0, -1)),
}  # fmt: skip


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize("where", CORNERS)
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
def test_boxes(rank, where, swizzle):
    """Loads of every rank, and where the corner allows it, stores into another tensor."""
    kind = np.dtype((np.uint8, BF16, np.float32, np.float16, np.int32)[rank - 1])
    piece = 16 // kind.itemsize
    tensor, box = numbers(SHAPES[rank], kind), ((swizzle or 48) // kind.itemsize, *BOXES[rank])
    corner = CORNERS[where][rank - 1]
    corner = (corner[0] * piece, *corner[1:])
    back = None if where == "below" else numbers(SHAPES[rank], kind)
    before = None if back is None else back.copy()
    seen, count = load(tensor, corner, box, swizzle=swizzle, to=back)
    check_box(seen, count, boxed(tensor, corner, box, [1] * rank, 0), swizzle)
    if back is not None:
        region = tuple(slice(c, c + b) for c, b in zip(corner[::-1], box[::-1]))
        before[region] = tensor[region]
        np.testing.assert_array_equal(back, before)


@pytest.mark.parametrize("swizzle", [32, 64, 128])
@pytest.mark.parametrize("shift", [128, 384, 640, 896])
def test_swizzles_follow_the_address(swizzle, shift):
    """A box may start at any multiple of 128 bytes: the pattern belongs to the address, not to the box."""
    tensor, box = numbers((24, 64), np.float32), (swizzle // 4, 9)
    seen, count = load(tensor, (16, 3), box, swizzle=swizzle, shift=shift)
    check_box(seen, count, boxed(tensor, (16, 3), box, (1, 1), 0), swizzle, shift)


@pytest.mark.parametrize("kind", ["uint8", "uint16", "uint32", "int32", "uint64", "int64", "float16", "float32", "float64", "bfloat16"])
def test_types(kind):
    dtype = np.dtype(getattr(ml_dtypes, kind, None) or kind)
    tensor, back = numbers((9, 128), dtype), numbers((9, 128), dtype)
    box, corner = (64 // dtype.itemsize, 4), (32 // dtype.itemsize, 7)
    before = back.copy()
    seen, count = load(tensor, corner, box, to=back, swizzle=64)
    check_box(seen, count, boxed(tensor, corner, box, (1, 1), 0), 64)
    before[7:, corner[0] : corner[0] + box[0]] = tensor[7:, corner[0] : corner[0] + box[0]]
    np.testing.assert_array_equal(back, before)


@pytest.mark.parametrize("type_", ["float32_ftz", "tfloat32", "tfloat32_ftz"])
def test_types_of_which_a_copy_may_change_the_bits(type_):
    """Of numbers that all of these hold, nothing changes."""
    tensor = numbers((9, 128), np.float32)
    seen, count = load(tensor, (8, 2), (16, 4), type_=type_)
    check_box(seen, count, boxed(tensor, (8, 2), (16, 4), (1, 1), 0), 0)


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("swizzle", [0, 128])
def test_fill_with_nan(kind, swizzle):
    """Which nan is the device's."""
    dtype = np.dtype(getattr(ml_dtypes, kind, None) or kind)
    tensor, box, corner = numbers((5, 32), dtype), (128 // dtype.itemsize, 4), (-32 // dtype.itemsize, 3)
    seen, count = load(tensor, corner, box, swizzle=swizzle, fill_nan=True, compare=any_nan(dtype))
    got = seen[swizzled(np.arange(count), swizzle)].view(dtype).reshape(box[::-1]).astype(np.float64)
    np.testing.assert_array_equal(got, boxed(tensor.astype(np.float64), corner, box, (1, 1), np.nan))


@pytest.mark.parametrize("strides", [(1, 2), (1, 3), (1, 2, 3), (1, 1, 2), (1, 8, 1)])
def test_element_strides(strides):
    tensor = numbers((13, 17, 32)[3 - len(strides) :], np.float32)
    box, corner = (16, 8, 5)[: len(strides)], (8, 6, 9)[: len(strides)]
    seen, count = load(tensor, corner, box, strides=strides, swizzle=64)
    check_box(seen, count, boxed(tensor, corner, box, strides, 0), 64)


def test_rows_with_a_pitch():
    """The tensor need not fill its rows."""
    wide = numbers((8, 48), np.float32)
    tensor = wide[:, :29]
    seen, box = np.zeros(1024, np.uint8), (16, 5)
    wide.flags.writeable = False
    made = sim.tensor_map(tensor, box)
    sim.run(sim.ptx("tma"), "hints", [made, seen, 20, 4, 320], shared_bytes=320 + SLACK, memory=[wide])
    np.testing.assert_array_equal(seen[:320].view(np.float32).reshape(5, 16), boxed(tensor, (20, 4), box, (1, 1), 0))


def test_hints():
    tensor, seen = numbers((16, 64), np.float32), np.zeros(4096, np.uint8)
    tensor.flags.writeable = False
    sim.run(sim.ptx("tma"), "hints", [sim.tensor_map(tensor, (32, 8), swizzle=128), seen, 16, 5, 1024], shared_bytes=1024 + SLACK, memory=[tensor])
    check_box(seen[:1024], 1024, boxed(tensor, (16, 5), (32, 8), (1, 1), 0), 128)


def test_a_store_beside_the_tensor_changes_nothing():
    """Boxes that lie wholly beyond the upper edge: loads are fill, stores are nothing."""
    tensor, back = numbers((8, 32), np.float32), numbers((8, 32), np.float32)
    before = back.copy()
    seen, count = load(tensor, (32, 8), (16, 4), to=back)
    assert not seen[:count].any()
    np.testing.assert_array_equal(back, before)


# --- reductions -----------------------------------------------------------------------------------------------------

INTEGERS, ALL = ("uint32", "int32", "uint64"), ("uint32", "int32", "uint64", "int64", "float16", "bfloat16")
REDUCTIONS = [
    *[("add", kind) for kind in ("uint32", "int32", "uint64", "float32", "float16", "bfloat16")], *[(op, kind) for op in ("min", "max") for kind in ALL],
    ("inc", "uint32"), ("dec", "uint32"), *[(op, kind) for op in ("and", "or", "xor") for kind in INTEGERS],
]  # fmt: skip
MEANING = {
    "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "inc": lambda old, most: np.where(old >= most, 0, old + 1), "dec": lambda old, most: np.where((old == 0) | (old > most), most, old - 1),
}  # fmt: skip


def reduced(op, tensor, values, corner, swizzle=0):
    """The tensor after a reduction of a box of values into it."""
    laid_out = np.zeros((values.nbytes + 1023) // 1024 * 1024, np.uint8)
    laid_out[swizzled(np.arange(values.nbytes), swizzle)] = values.reshape(-1).view(np.uint8)
    laid_out.flags.writeable = False
    out = tensor.copy()
    made = sim.tensor_map(out, values.shape[::-1], swizzle=swizzle)
    sim.run(sim.ptx("tma"), f"reduce_{op}", [made, laid_out, *corner, len(laid_out)], shared_bytes=len(laid_out) + SLACK, memory=[out])
    return out


@pytest.mark.parametrize("op, kind", REDUCTIONS)
def test_reductions(op, kind):
    dtype = np.dtype(getattr(ml_dtypes, kind, None) or kind)
    tensor, values = numbers((8, 64), dtype), numbers((4, 64 // dtype.itemsize), dtype)
    want = tensor.copy()
    region = want[2:6, 16 : 16 + values.shape[1]]
    region[:] = MEANING[op](region, values).astype(dtype)
    np.testing.assert_array_equal(reduced(op, tensor, values, (16, 2)), want)


def test_sums_keep_subnormal_numbers():
    tensor, values = np.float32([[1e-40, 3e-39, 1.5e-38, -1.5e-38] * 4] * 2), np.float32([[2e-40, 1.3e-38, -1e-39, 1.4e-38] * 4] * 2)
    want = (tensor.astype(np.float64) + values).astype(np.float32)
    np.testing.assert_array_equal(reduced("add", tensor, values, (0, 0)).view(np.uint32), want.view(np.uint32))


@pytest.mark.parametrize("swizzle", [32, 64, 128])
def test_reductions_of_swizzled_boxes_over_the_edge(swizzle):
    tensor, values = numbers((8, 64), np.float32), numbers((5, swizzle // 4), np.float32)
    want = tensor.copy()
    want[6:, 56:] += values[:2, :8]
    np.testing.assert_array_equal(reduced("add", tensor, values, (56, 6), swizzle), want)


# --- multicast ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masks", [(3, 0), (2, 1), (1, 3), (15, 0, 0, 0), (8, 4, 2, 1), (5, 10, 15, 0), (129, 66, 36, 24, 24, 36, 66, 129)], ids=str)
@pytest.mark.parametrize("swizzle", [0, 128])
def test_multicast(masks, swizzle):
    """CTA r loads rows 4 r .. and gives them to the CTAs of masks[r], each at the same place."""
    size = len(masks)
    tensor, seen = numbers((4 * size, 32), np.float32), np.zeros((size, size, 512), np.uint8)
    tensor.flags.writeable = False
    made = sim.tensor_map(tensor, (32, 4), swizzle=swizzle)
    sim.run(sim.ptx("tma"), "multicast", [made, seen, 512, *masks, *[0] * (8 - size)], grid=size, cluster=size, shared_bytes=size * 512 + SLACK, memory=[tensor])
    for rank, r in itertools.product(range(size), repeat=2):
        got = seen[rank, r]
        if masks[r] >> rank & 1:
            place = swizzled(r * 512 % 1024 + np.arange(512), swizzle) - r * 512 % 1024
            np.testing.assert_array_equal(got[place].view(np.float32).reshape(4, 32), tensor[4 * r : 4 * r + 4])
        else:
            assert (got == 0xEE).all()


# --- refusals -------------------------------------------------------------------------------------------------------

interpreter_only = pytest.mark.skipif(sim.ON_DEVICE, reason="on a device these end in an error that names nothing")


@pytest.mark.parametrize("how, words", [
    (dict(box=(512, 1)), "limit is 256"), (dict(box=(3, 1)), "multiple of 16"), (dict(box=(64, 1), swizzle=64), "more than the swizzle"),
    (dict(box=(16, 0)), "limit is 256"), (dict(box=(16, 4), element_strides=[1, 9]), "limit is 8"), (dict(box=(16, 4), element_strides=[2, 1]), "a device ignores it"),
])  # fmt: skip
@interpreter_only
def test_tensor_maps_are_refused(how, words):
    with pytest.raises(sim.SimError, match=words):
        sim.tensor_map(np.zeros((8, 64), np.float16), **how)


@interpreter_only
@pytest.mark.parametrize("kind, corner, store, words", [
    (np.uint8, (8, 0), False, "starts at element 8 .* 8 bytes .* not a multiple of 16"), (BF16, (-4, 0), False, "starts at element -4"), (np.float32, (2, 1), True, "not a multiple of 16"),
    (np.float32, (-4, 1), True, "store starts at -4 in dimension 0; only loads"), (np.float32, (4, -1), True, "store starts at -1 in dimension 1"),
])  # fmt: skip
def test_places_that_a_device_refuses(kind, corner, store, words):
    tensor = numbers((8, 64), kind)
    with pytest.raises(sim.SimError, match=words):
        load(tensor, corner, (64 // tensor.dtype.itemsize, 2), to=tensor.copy() if store else None)


@interpreter_only
@pytest.mark.parametrize("op, kind", [
    ("add", "uint8"), ("add", "uint16"), ("add", "int64"), ("add", "float64"), ("min", "float32"), ("max", "float64"), ("inc", "int32"), ("dec", "uint64"), ("and", "float32"), ("xor", "uint16"),
    ("and", "int64"), ("or", "int64"), ("xor", "int64"),
])  # fmt: skip
def test_reductions_that_no_device_has(op, kind):
    with pytest.raises(sim.SimError, match="no such reduction"):
        reduced(op, numbers((8, 64), kind), numbers((4, 16), kind), (16, 2))
