"""Several launches in one custom call: the same bits as one by one, and kernels that start early touch only what they may."""

import functools
import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sim_driver as sim

import ffi_kernels as ops
from ffi_kernels import library


def normal(seed, shape, dtype=jnp.bfloat16):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def calls(function, *args) -> list[int]:
    """Launches of each custom call of ours."""
    text = jax.jit(function).lower(*args).as_text()
    return [int(n) for n in re.findall(r"custom_call @dsv4\..*?\blaunches = (\d+)", text)]


WEIGHTS = {"norm": normal(0, (256,)), "up": normal(1, (512, 256)), "down": normal(2, (256, 512))}


def feed_forward(w, x):
    """Three launches in a row, with views between them and a product that needs nothing of them."""
    y = ops.rms_norm(x, w["norm"], 1e-6)
    y = ops.linear(y.reshape(1, -1, 256), w["up"], jnp.bfloat16)
    scale = jnp.cos(x[0, 0].astype(jnp.float32))
    return ops.linear(jnp.squeeze(y, 0), w["down"]), y.reshape(-1), scale


def test_a_run_of_launches_is_one_call_with_the_same_bits(backend):
    x = normal(3, (2, 256))
    same(jax.jit(ops.chained(feed_forward))(WEIGHTS, x), jax.jit(feed_forward)(WEIGHTS, x))
    assert calls(feed_forward, WEIGHTS, x) == [1, 1, 1] and calls(ops.chained(feed_forward), WEIGHTS, x) == [3]


def test_a_run_ends_where_xla_needs_a_result(backend):
    def function(w, x):
        y, *_ = feed_forward(w, x)
        y, z, _ = feed_forward(w, jnp.tanh(y).astype(jnp.bfloat16))
        return y, jnp.flip(z)

    x = normal(4, (3, 256))
    same(jax.jit(ops.chained(function))(WEIGHTS, x), jax.jit(function)(WEIGHTS, x))
    assert calls(ops.chained(function), WEIGHTS, x) == [3, 3]


def ring(start):
    return [jnp.arange(8 * 64, dtype=jnp.float32).reshape(1, 8, 64) + start]


def test_updates_in_place_keep_their_order(backend):
    """Rows are committed to a ring twice and it is read in between as it was before, once and afterwards: three values of one buffer."""

    def function(rings, rows, x):
        start, length = jnp.array([2], jnp.int32), jnp.array([1], jnp.int32)
        before = ops.linear(rings[0][0].astype(jnp.bfloat16), x)  # not of a launch: needs nothing that waits
        first = ops.commit_rows(rings, rows, start, length)
        second = ops.commit_rows(first, rows, start + 1, length)
        old = ops.rms_norm(rings[0], jnp.ones(64), 1e-6)  # after the first update, of what was there before it
        return before, first, second, old, ops.rms_norm(second[0], jnp.ones(64), 1e-6)

    rows, x = [normal(5, (1, 1, 64), jnp.float32)], normal(6, (32, 64))
    want = jax.jit(function)(ring(0), rows, x)
    same(jax.jit(ops.chained(function))(ring(0), rows, x), want)
    same(jax.jit(ops.chained(function), donate_argnums=0)(ring(0), rows, x), want)
    with ops.backend("xla"):
        reference = function(ring(0), rows, x)
    same([want[1], want[2]], [reference[1], reference[2]])


def test_a_view_is_updated_in_place(backend):
    """The ring is given flat: what is donated has another shape than what it is a view of."""

    def function(flat, rows, x):
        start, length = jnp.array([2], jnp.int32), jnp.array([1], jnp.int32)
        y = ops.rms_norm(x, jnp.ones(64), 1e-6)
        (new,) = ops.commit_rows([flat.reshape(1, 8, 64)], rows, start, length)
        return ops.linear(y, x), new.reshape(-1), ops.rms_norm(flat.reshape(8, 64), jnp.ones(64), 1e-6)

    flat = lambda: ring(3)[0].reshape(-1)  # noqa: E731
    rows, x = [normal(11, (1, 1, 64), jnp.float32)], normal(12, (8, 64))
    want = jax.jit(function)(flat(), rows, x)
    same(jax.jit(ops.chained(function))(flat(), rows, x), want)
    same(jax.jit(ops.chained(function), donate_argnums=0)(flat(), rows, x), want)


def test_numbers_that_stand_in_the_jaxpr(backend):
    """Global scales that are known while tracing are no variables of it."""
    up, down = (ops.quantize_nvfp4_weight(normal(seed, shape, jnp.float32)) for seed, shape in ((8, (64, 128)), (9, (32, 64))))

    def function(x):
        y = ops.linear(ops.Unquantized(x), ops.NVFP4Tensor(up.data, up.scale, jnp.float32(0.5)), jnp.bfloat16)
        return ops.linear(ops.Unquantized(y), ops.NVFP4Tensor(down.data, down.scale, jnp.float32(0.25)))

    x = normal(10, (2, 128))
    same(jax.jit(ops.chained(function))(x), jax.jit(function)(x))
    assert calls(ops.chained(function), x) == [2]


def test_nothing_changes_on_xla():
    with ops.backend("xla"):
        x = normal(7, (2, 256))
        same(ops.chained(feed_forward)(WEIGHTS, x), feed_forward(WEIGHTS, x))


# --- what a kernel may touch before it waits ---------------------------------------------------------------------------

MISTAKES = {
    1: r"reads 4 bytes .* before griddepcontrol.wait: .* still run and write them",
    2: r"writes 4 bytes .* before griddepcontrol.wait: .* still run and read them",
    3: r"reads 4 bytes .* before griddepcontrol.wait",
    4: r"never executes griddepcontrol.wait",
}


@pytest.fixture
def interpreter():
    if sim.missing() or sim.ON_DEVICE:
        pytest.skip(sim.missing() or "the interpreter checks what a device cannot show")


def add(mistake, follows=True):
    weights, x, out = np.arange(32, dtype=np.int32), np.full(32, 5, np.int32), np.zeros(32, np.int32)
    weights.flags.writeable = x.flags.writeable = False
    sim.run(sim.ptx("dependent"), "add", [weights, x, out, mistake], unsettled=[x] if follows else [])
    return out


def test_a_launch_that_waits_in_time(interpreter):
    np.testing.assert_array_equal(add(0), np.arange(32) + 5)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_launch_that_does_not(interpreter, mistake):
    with pytest.raises(sim.SimError, match=MISTAKES[mistake]):
        add(mistake)
    add(mistake, follows=False)  # alone, it may


def test_a_launch_that_lets_the_next_one_start_too_soon(interpreter, monkeypatch):
    """A late launch is counted on to have waited; this one has not."""
    norm = importlib.import_module("ffi_kernels.norm")
    monkeypatch.setattr(norm, "launch", functools.partial(norm.launch, late=True))
    with ops.backend("sim"), pytest.raises(Exception, match="launch_dependents before griddepcontrol.wait, but its launch is late"):
        np.asarray(jax.jit(lambda x: ops.rms_norm(x, jnp.ones(64), 1e-6))(normal(13, (1, 64))))


def mixture():
    """Weights of six experts and a shared one, and a router."""
    sizes = {"w1": (128, 256), "w3": (128, 256), "w2": (256, 128)}
    with ops.backend("xla"):
        routed = {n: ops.quantize_mxfp4(normal(20 + i, (6, *s), jnp.float32) / 16) for i, (n, s) in enumerate(sizes.items())}
        shared = {n: ops.quantize_fp8_weight(normal(30 + i, s, jnp.float32) / 16) for i, (n, s) in enumerate(sizes.items())}
    return {"routed": routed, "shared": shared, "norm": jnp.ones(256), "gate": normal(40, (6, 256)), "bias": normal(41, (6,), jnp.float32)}


@pytest.mark.parametrize("launches_between", ["none", "one that does not wait for x", "one that does"])
@pytest.mark.parametrize("rows", [1, 2])
def test_inputs_that_are_read_early(backend, rows, launches_between):
    """experts reads its input, and its second launch the picks, while launches in front of it may still run: not those that write them."""

    def function(w, x):
        x = ops.rms_norm(x, w["norm"], 1e-6)
        ids, weights = jnp.asarray([[3, 1]] * rows, jnp.int32), jnp.full((rows, 2), 0.5)
        y = ()
        if launches_between == "one that does":
            ids, weights = ops.route_tokens(x, w["gate"], w["bias"], None, None, count=2, scale=1.5)
        elif launches_between != "none":
            y = ops.linear(w["gate"][:2], w["gate"])
        return ops.experts(x, w["routed"], w["shared"], ids, weights, 10.0, jnp.bfloat16), y

    weights, x = mixture(), normal(14, (rows, 256))
    same(jax.jit(ops.chained(function))(weights, x), jax.jit(function)(weights, x))
    assert calls(ops.chained(function), weights, x) == [{"none": 3, "one that does": 5}.get(launches_between, 4) + (rows > 1)]


def test_every_kernel_waits():
    """In PTX: each entry of our kernels lets the next one start, and waits for the one before."""
    if (missing := library.why_not("sim")) is not None:
        pytest.skip(missing)
    for image in library.directory().glob("*.ptx"):
        for entry in image.read_text().split(".visible .entry ")[1:]:
            assert "griddepcontrol.wait" in entry and "griddepcontrol.launch_dependents" in entry, f"{entry.split('(')[0]} of {image.name}"


def test_a_call_with_too_few_attributes(backend):
    """A custom call that promises more launches than it has is refused by a sentence."""

    def function(x):
        joined = jax.ffi.ffi_call(f"dsv4.rms_norm.{backend}", jax.ShapeDtypeStruct(x.shape, x.dtype))
        return joined(x, launches=np.int64(2))

    ops.rms_norm(normal(8, (1, 64)), jnp.ones(64), 1e-6).block_until_ready()
    with pytest.raises(Exception, match="lacks the attribute"):
        np.asarray(jax.jit(function)(normal(8, (1, 64))))
