"""What the PTX interpreter refuses, and in which words: bad accesses, deadlocks, absurd launches, unknown and damaged PTX."""

import re
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import sim_driver as sim
from sim_driver import ints, launch, poisoned

pytestmark = pytest.mark.skipif(bool(sim.missing()) or sim.ON_DEVICE, reason=sim.missing() or "a fault would end the process on a device")


def refused(kernel, args, module="warps", **how):
    with pytest.raises(sim.SimError) as caught:
        launch(kernel, args, module, **how)
    return str(caught.value)


def test_bad_accesses_name_kernel_source_and_access():
    a, d = ints(32), poisoned(32)
    for kernel, n, words in [
        ("out_of_bounds", 1, ("writes 4 bytes out of bounds", "128 bytes", "warps.cu")), ("out_of_bounds", -500, ("out of bounds",)),
        ("write_input", 0, ("may only be read",)), ("misaligned", 0, ("not a multiple of 8",)), ("null_pointer", 8, ("null pointer",)),
        ("null_pointer", -64, ("reads 4 bytes",)), ("trapped", 1, ("trap",)), ("stuck_lane", 0, ("lanes 0x00000008",)),
    ]:  # fmt: skip
        sentence = refused(kernel, [a, d, n])
        assert kernel in sentence and "PTX line" in sentence and "CTA (0,0,0) warp 0" in sentence
        for word in words:
            assert word in sentence, sentence
    assert "out of bounds of shared memory" in refused("shared_overflow", [a, d, 1], shared_bytes=128)
    assert "out of bounds of shared memory" in refused("shared_overflow", [a, d, 0], shared_bytes=0)
    launch("shared_overflow", [a, d, 0], shared_bytes=128)
    assert (d == 3).all()


def test_faults_of_asynchronous_code():
    a, d = ints(256), poisoned(256)
    assert "expects only" in refused("arrive_too_often", [a, d, 0], module="async")
    assert "overwritten" in refused("overwritten", [a, d, 5], module="async")
    assert "not a multiple of 16" in refused("bulk_misaligned", [a, d, 1], module="async")
    assert "lies in the memory of CTA" in refused("foreign_memory", [a, d, 0], module="async", grid=2, cluster=2)
    dead = refused("never_completes", [a, d, 0], module="async", block=64)
    assert "deadlock" in dead and "pending bytes 64" in dead and dead.count("waits for an mbarrier's phase") == 2


def test_deadlocks_are_dumped():
    dead = refused("stuck", [ints(64), poisoned(64), 0], block=64)
    assert "deadlock" in dead and "barrier 6" in dead and "barrier 7" in dead and "warp 1" in dead and "waits for a barrier of the CTA" in dead
    assert "spins for ever" in refused("endless", [ints(32), np.zeros(32, np.int32), 0])


ABSURD = [
    (dict(grid=0), "grid.x is 0"), (dict(block=0), "block.x is 0"), (dict(block=1025), "block.x is 1025"), (dict(block=(32, 32, 2)), "2048 threads"),
    (dict(grid=(1, 65536)), "grid.y"), (dict(grid=-1), "grid.x is 4294967295"), (dict(cluster=3), "not a multiple"), (dict(cluster=32, grid=32), "at most 16"),
    (dict(shared_bytes=232449), "at most 232448"), (dict(shared_bytes=-1), "at most 232448"), (dict(grid=2**31 - 1), "too large to interpret"),
    (dict(grid=(2**31 - 1, 65535, 65535)), "CTAs"), (dict(grid=(4, 4, 4), cluster=(4, 4, 4)), "a cluster of 64"), (dict(raw_params=b""), "parameters"),
    (dict(raw_params=bytes(999)), "999 bytes"), (dict(block=(1, 1, 65)), "block.z"),
]  # fmt: skip


@pytest.mark.parametrize("how, words", ABSURD, ids=[w for _, w in ABSURD])
def test_absurd_launches_are_refused(how, words):
    assert words in refused("votes", [ints(32), poisoned(384), 0], **how)


def test_launch_bounds_names_and_files():
    d = poisoned(64)
    assert "at most 64" in refused("bounded", [None, d, 0], block=128)
    launch("bounded", [None, d, 0], block=64)
    assert "has no kernel 'nothing'" in refused("nothing", [])
    with pytest.raises(sim.SimError, match="cannot be read"):
        sim.run("/nonexistent/x.ptx", "k")


def test_unknown_settings_are_refused(monkeypatch):
    monkeypatch.setenv("DSV4_SIM", "schedule=sideways")
    assert "DSV4_SIM holds 'schedule=sideways'" in refused("bounded", [None, poisoned(64), 0])
    monkeypatch.setenv("DSV4_SIM", "limit=100")
    assert "more than 100 warp instructions" in refused("diverge", [ints(1024), poisoned(1024), 0], block=1024)


def module_text(body, registers=""):
    return f".version 8.0\n.target sm_90a\n.address_size 64\n.visible .entry k()\n{{\n.reg .b32 %r<8>;\n.reg .pred %p<4>;\n{registers}\n{body}\nret;\n}}\n"


@pytest.mark.parametrize("line, words", [
    ("frobnicate.b32 %r1, %r2;", "'frobnicate' is not modelled"), ("add.wide.s32 %r1, %r2, %r3;", ".wide is not modelled"), ("add.s32 %r1, %r2;", "too few operands"),
    ("add.s32 %r1, %r2, %r3, %r4;", "one too many"), ("add.s32 %r1, %r9, %r3;", "register %r9 is not modelled"), ("bra nowhere;", "'nowhere' is not defined"),
    ("mov.u32 %r1, %pm0;", "%pm0 is not modelled"), ("setp.eq.s32 %r1, %r2, %r3;", "type .b32 where .pred"), ("cvt.s32.f32 %r1, %r2;", "needs .rni"),
    ("mma.sync.aligned.m16n8k99.row.col.f32.bf16.bf16.f32 {%r1}, {%r1}, {%r1}, {%r1};", "not modelled"), ("ld.global.b32 %r1, %r2;", "address in brackets"),
    ("shfl.bfly.b32 %r1, %r2, 1, 31;", ".sync"), ("tcgen05.shift.down.cta_group::1 [%r1];", "as far as this interpreter models it"),
])  # fmt: skip
def test_what_is_not_modelled_is_named(tmp_path, line, words):
    path = tmp_path / "m.ptx"
    path.write_text(module_text(line))
    with pytest.raises(sim.SimError) as caught:
        sim.run(path, "k")
    assert words in str(caught.value) and "PTX line 9" in str(caught.value), caught.value


def test_a_changed_file_is_read_again(tmp_path):
    path = tmp_path / "m.ptx"
    path.write_text(module_text("trap;"))
    with pytest.raises(sim.SimError, match="trap"):
        sim.run(path, "k")
    path.write_text(module_text("// now nothing"))
    sim.run(path, "k")


def mutated(text, rng):
    """One to three small damages: characters, tokens, lines."""
    for _ in range(rng.integers(1, 4)):
        kind, at = rng.integers(0, 7), int(rng.integers(0, len(text)))
        if kind == 0:
            text = text[:at] + chr(rng.integers(1, 127)) + text[at + 1 :]
        elif kind == 1:
            text = text[:at] + text[at + int(rng.integers(1, 30)) :]
        elif kind == 2:
            other = int(rng.integers(0, len(text)))
            text = text[:at] + text[other : other + 20] + text[at:]
        elif kind == 3:
            numbers = list(re.finditer(r"\d+", text))
            n = numbers[int(rng.integers(0, len(numbers)))]
            text = text[: n.start()] + str(rng.choice([0, 1, 7, 31, 255, 4096, 2**31 - 1, 2**63, 10**30])) + text[n.end() :]
        elif kind == 4:
            lines = text.split("\n")
            a, b = rng.integers(0, len(lines), 2)
            lines[a], lines[b] = lines[b], lines[a]
            text = "\n".join(lines)
        elif kind == 5:
            words = list(re.finditer(r"[%$.]?\w+", text))
            a, b = (words[int(rng.integers(0, len(words)))] for _ in range(2))
            text = text[: a.start()] + b.group() + text[a.end() :]
        else:
            text = text[:at]
        if not text:
            return "."
    return text


@pytest.mark.parametrize("module, kernel", [("warps", "diverge"), ("async", "pipeline"), ("matrix", "gemm"), ("warps", "calls"), ("async", "remote_async")])
def test_damaged_ptx_never_crashes(tmp_path, monkeypatch, module, kernel, request):
    """Mutated files end in a sentence or run; nothing else. Each file holds one kernel, so that damage matters."""
    monkeypatch.setenv("DSV4_SIM", "limit=200000")
    text = sim.ptx(module).read_text()
    text = text[: text.find(".section")] if ".section" in text else text
    head, *functions = re.split(r"(?=^\t?// \.globl)|(?=^\.visible)|(?=^\.func)", text, flags=re.M)
    keep = [f for f in functions if f".entry {kernel}(" in f or f.startswith((".func", "\t// .globl\t_Z", ".visible .func"))]
    text = head + "".join(keep)
    rng, outcomes, start = np.random.default_rng(len(kernel)), {}, time.time()
    for i in range(400):
        path = tmp_path / f"{i}.ptx"
        path.write_text(mutated(text, rng))
        a, d = ints(2048), poisoned(4096)
        args = [a.view(np.uint16), a.view(np.uint16), d, 16, 8, 32] if module == "matrix" else [a, d, 2]
        try:
            sim.run(path, kernel, args, grid=2, block=96 if kernel == "pipeline" else 32, cluster=2 if kernel == "remote_async" else 1)
            outcomes["ran"] = outcomes.get("ran", 0) + 1
        except sim.SimError as error:
            assert len(str(error)) > 20
            outcomes["sentence"] = outcomes.get("sentence", 0) + 1
        path.unlink()
        if time.time() - start > 20:
            break
    assert outcomes["sentence"] > outcomes.get("ran", 0) / 20


def test_threads_share_the_interpreter():
    """Launches from several threads at once do not disturb each other."""
    def one(seed):
        a, d = np.random.default_rng(seed).integers(0, 100, 256 * 5).astype(np.int32), poisoned(256 * 5)
        launch("pipeline", [a, d, 5], module="async", block=96)
        return (d.reshape(-1, 256) == a.reshape(-1, 256)[:, ::-1]).all()

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(one, range(16)))
