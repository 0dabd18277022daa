"""The command line on the embedded model: output, exit codes, sentences for bad input."""

import functools
import json
import types

import jax
import numpy as np
import pytest

import dsv4_jax as dsv4
from dsv4_jax import bench, cache
from dsv4_jax.chat import answer, chat
from dsv4_jax.cli import main, parse_mesh
from dsv4_jax.sampling import Greedy

TEXT = "def read_lines(path):\n"


@pytest.fixture(autouse=True)
def _no_compile_cache(monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")


def run(capsys, *argv):
    code = main(list(argv))
    out = capsys.readouterr()
    return code, out.out, out.err


def test_generate_continues_the_prompt(capsys):
    code, out, err = run(capsys, "generate", TEXT, "--max-new-tokens", "24")
    assert code == 0 and out.startswith(TEXT) and len(out) > len(TEXT) + 20
    assert "[24 tokens, 1.00 per step" in err
    again = run(capsys, "generate", TEXT, "--max-new-tokens", "24", "--draft", "1")
    assert again[1] == out
    code, out, _ = run(capsys, "generate", TEXT, "import ", "--max-new-tokens", "5", "--temperature", "0.8", "--top-p", "0.9")
    assert code == 0 and "--- 0\n" + TEXT in out and "--- 1\nimport " in out


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (["generate", ""], "prompt 0 is empty"),
        (["generate", "x", "--recipe", "int3"], "recipe 'int3' is not known"),
        (["generate", "x", "--model", "/nowhere"], "/nowhere"),
        (["generate", "x", "--mesh", "tensor=3"], "tensor=3 does not divide"),
        (["generate", "x", "--mesh", "tensor=64"], "needs 64 devices"),
        (["generate", "x", "--mesh", "rows=2"], "write for example tensor=8"),
        (["generate", "x", "--max-new-tokens", "9000"], "max_position_embeddings = 8192"),
        (["generate", "x", "--top-p", "2", "--temperature", "1"], "top_p = 2.0 must be in"),
        (["bench", "decode", "--batch", "0"], "must each be one number of at least 1"),
        (["bench", "lower", "--model", "flash", "--mesh", "tensor=3"], "tensor=3 does not divide"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(capsys, argv, sentence):
    code, out, err = run(capsys, *argv)
    assert code == 2 and not out and sentence in err and "Traceback" not in err and err.count("\n") == 1


def test_help_teaches(capsys):
    for argv in (["--help"], ["generate", "--help"], ["chat", "--help"], ["verify", "--help"], ["bench", "decode", "--help"]):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 0 and len(capsys.readouterr().out) > 200


def test_bench_decode_ends_in_json(capsys):
    code, out, _ = run(capsys, "bench", "decode", "--tokens", "16", "--context", "20")
    figures = json.loads(out.splitlines()[-1])
    assert code == 0 and figures["tokens_per_s"] > 0 and figures["hlo_ops"] > 1000
    assert figures["state_bytes_per_token_flash"] == cache.bytes_per_token(dsv4.FLASH, dsv4.RECIPES["bf16"])


def test_state_bytes_per_token_are_those_of_the_facts():
    official = dsv4.RECIPES["official"]
    assert cache.bytes_per_token(dsv4.FLASH, official) == 3514.25
    assert cache.bytes_per_token(dsv4.PRO, official) == 5031.4375


def test_stablehlo_counts_follow_calls():
    text = (
        "module {\n  func.func public @main(%a: f32) {\n    call @f(%a)\n    call @f(%a)\n    %1 = stablehlo.add %a\n  }\n"
        '  func.func private @f(%a: f32) {\n    %0 = "stablehlo.all_reduce"(%a)\n  }\n}'
    )
    assert bench.stablehlo_op_counts(text) == {"all_reduce": 2, "add": 1}


def test_mesh_spelling():
    assert parse_mesh(None) is None and dict(parse_mesh("data=2,tensor=4").shape) == {"data": 2, "tensor": 4}


def test_chat_streams_and_keeps_the_conversation(capsys, monkeypatch):
    model = dsv4.load("tiny", recipe="bf16")
    pieces = list(answer(model, [{"role": "user", "content": "hi"}], Greedy(), 20, thinking=False))
    assert "".join(pieces) and len(pieces) > 1
    lines = iter(["hi", "/clear", "", "again", "/exit"])
    monkeypatch.setattr("builtins.input", lambda _="": next(lines))
    assert chat(model, Greedy(), 12, thinking=False, system="You write Python.") == 0
    assert len(capsys.readouterr().out.splitlines()) >= 2


def test_notebook_api_in_the_readme_order():
    model = dsv4.load("tiny", recipe="bf16")
    ids = model.tokenizer.encode(TEXT, add_special_tokens=False).ids
    logits, state = dsv4.prefill(model, np.array([ids]), np.array([len(ids)]), dsv4.init_state(model, batch=1, max_len=64))
    logits, state = dsv4.decode_step(model, np.argmax(logits, -1), state)
    assert logits.shape == (1, model.config.vocab_size) and int(state.position[0]) == len(ids) + 1


def test_bench_of_random_weights_refuses_what_does_not_fit(capsys):
    assert main(["bench", "decode", "--model", "flash", "--layers", "99"]) == 2
    assert "layers = 99 and experts = 256 must lie in 1..43 and 6..256" in capsys.readouterr().err
    assert main(["bench", "decode", "--model", "flash", "--draft", "1"]) == 2
    assert "without drafts" in capsys.readouterr().err
    assert main(["bench", "decode", "--layers", "2"]) == 2
    assert "--layers and --experts trim random weights" in capsys.readouterr().err


def test_bench_of_random_weights_keeps_each_setting_at_once(capsys, monkeypatch, tmp_path):
    """The embedded model's shapes in place of Flash: one setting is timed, one does not fit, and time may be over after the first."""
    from dsv4_jax import bench_step

    monkeypatch.setitem(bench_step.PRESETS, "flash", dsv4.TINY)
    monkeypatch.setattr(bench_step, "roofline", lambda: (1e9, 1e9))
    monkeypatch.setattr(bench_step, "STEPS", 2)
    monkeypatch.setattr(bench_step, "LOOPS", 1)
    monkeypatch.setattr(bench_step, "random_weights", functools.cache(bench_step.random_weights))
    timed = bench_step._time

    def time_or_fail(model, batch, context, read):
        if context == 64:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory\nmore")
        return timed(model, batch, context, read) if batch == 1 else {"ms_per_step": 7.0}

    monkeypatch.setattr(bench_step, "_time", time_or_fail)
    kept = tmp_path / "rows"
    command = ["bench", "decode", "--model", "flash", "--recipe", "bf16", "--layers", "1", "--context", "32,64", "--batch", "1,2", "--out", str(kept)]
    code, out, _ = run(capsys, *command)
    rows = [json.loads(line) for line in kept.read_text().splitlines()]
    assert code == 0 and [(row["batch"], row["context"]) for row in rows] == [(1, 32), (1, 64), (2, 32), (2, 64)]
    assert rows[0]["ms_per_step"] > 0 and rows[0]["compile_s"] > 0 and rows[0]["native_launches"] == 0
    assert rows[0]["cpu_ms_per_step"] > 0 and 0 < rows[0]["call_ms_per_step"] <= rows[0]["ms_per_step"]
    assert "kernels" not in rows[0] or jax.default_backend() != "cpu", "a CPU has no device events to make figures of"
    assert rows[1]["error"] == "RESOURCE_EXHAUSTED: out of memory" and rows[2]["ms_per_step"] == 7
    figures = json.loads(out.splitlines()[-1])
    assert figures["layers"] == 1 and len(figures["steps"]) == 4 and figures["steps"][1]["error"] == rows[1]["error"]
    monkeypatch.setattr(bench_step, "_time", lambda *args: {"ms_per_step": 7.0})
    code, out, _ = run(capsys, *command, "--seconds", "1e-6")
    assert code == 0 and "stopped here" in out and len(kept.read_text().splitlines()) == 5


def test_bytes_of_a_step_have_every_picked_expert_once():
    from dsv4_jax import bench_step

    config = dsv4.TINY
    weights = {"embed": np.zeros(1000, np.uint8), "layers": [{"experts": np.zeros((config.n_routed_experts, 64), np.uint8), "norm": np.zeros(10, np.uint8)}]}
    need = lambda batch: bench_step.bytes_per_step(config, weights, types.SimpleNamespace(position=np.zeros(batch), layers=()))  # noqa: E731
    picked, all_of_them = config.num_experts_per_tok * 64, config.n_routed_experts * 64
    assert need(1) == 10 + picked and need(1000) in (9 + all_of_them, 10 + all_of_them)
    assert need(2) == 10 + int(2 * picked - picked * picked / all_of_them), "two sequences share some"


def profile(planes: dict):
    """Stands for jax.profiler.ProfileData: {plane: {line: [(event, start_ns, duration_ns)]}}."""

    def named(name, **fields):
        return types.SimpleNamespace(name=name, **fields)

    def line(name, events):
        return named(name, events=[named(event, start_ns=start, duration_ns=ns) for event, start, ns in events])

    return types.SimpleNamespace(planes=[named(p, lines=[line(*item) for item in lines.items()]) for p, lines in planes.items()])


def test_figures_of_a_profile():
    """Two steps: what the device lines hold by kernel, the driver calls of the host, and nothing twice, nor time in which two run."""
    from dsv4_jax.bench_step import profile_figures

    device = {
        "Stream #15(Kernel)": [("linear", 0, 3000), ("post", 2500, 2500), ("linear", 10000, 5000)],
        "Stream #16(Memcpy)": [("MemcpyD2H", 16000, 2000)],
        "XLA Ops": [("while", 0, 99000)],
    }
    host = {"python": [("cuGraphLaunch", 0, 4000), ("cuGraphLaunch", 5000, 6000), ("cuStreamSynchronize", 6000, 90000), ("main", 0, 5)]}
    figures = profile_figures([profile({"/device:GPU:0": device, "/host:CPU": host})], 2)
    table = figures.pop("kernels")
    assert figures == {
        "graph_launches_per_step": 1.0, "kernel_launches_per_step": 0.0, "driver_ms_per_step": 0.005,
        "kernel_ms_per_step": 0.006, "span_ms_per_step": 0.009,
    }  # fmt: skip
    assert [row["name"] for row in table] == ["linear", "post", "MemcpyD2H"] and sum(row["percent"] for row in table) == pytest.approx(100)
    assert table[0] == {"name": "linear", "launches_per_step": 1.0, "median_us": 4.0, "us_per_step": 4.0, "percent": pytest.approx(800 / 12)}
    assert table[1]["median_us"] == 2.5 and table[1]["us_per_step"] == 1.0  # it starts 0.5 us before the one ahead of it ends
    assert profile_figures([profile({"/host:CPU": {"python": [("main", 0, 5)]}})], 2) == profile_figures([], 2) == {}


def test_kernels_of_a_step_are_printed_on_request(capsys, monkeypatch):
    from dsv4_jax import bench_step

    monkeypatch.setitem(bench_step.PRESETS, "flash", dsv4.TINY)
    monkeypatch.setattr(bench_step, "roofline", lambda: (1e9, 1e9))
    monkeypatch.setattr(bench_step, "random_weights", lambda *_: {})
    table = [{"name": "linear_fp8_1", "launches_per_step": 4.0, "median_us": 12.5, "us_per_step": 50.0, "percent": 100.0}]
    monkeypatch.setattr(bench_step, "_time", lambda *_: {"ms_per_step": 7.0, "kernels": table})
    command = ["bench", "decode", "--model", "flash", "--layers", "1", "--context", "32"]
    code, out, _ = run(capsys, *command, "--kernels")
    line = next(line.split() for line in out.splitlines() if "linear_fp8_1" in line)
    assert code == 0 and line == ["linear_fp8_1", "4.00", "12.50", "50.0", "100.0"]
    code, out, _ = run(capsys, *command)
    *shown, last = out.splitlines()
    assert code == 0 and "linear_fp8_1" not in "".join(shown) and json.loads(last)["steps"][0]["kernels"] == table


def test_selftest_and_kernel_benchmarks_need_native_kernels(capsys, monkeypatch):
    monkeypatch.delenv("DSV4_BACKEND", raising=False)
    for command in (["selftest"], ["bench", "kernels"]):
        if jax.default_backend() == "cpu":
            assert main(command) == 2
            assert "has no native kernels; choose --backend sim" in capsys.readouterr().err
        assert main([*command, "--backend", "xla"]) == 2
        assert main([*command, "--only", "("]) == 2
        capsys.readouterr()


def test_bench_kernels_shows_both_times(capsys, monkeypatch):
    """In the table, under their names, and in the JSON line; --help says what they mean."""
    from ffi_kernels import bench as kernels
    from ffi_kernels import library

    if (missing := library.why_not("sim")) is not None:
        pytest.skip(missing)
    row = {"model": "flash", "case": "one", "rows": 1, "time_us": 9.25, "alone_us": 12.5, "launches": 1, "bandwidth_gbs": 3.0, "tflops": 2.0,
           "roofline_percent": 78.0, "bytes": 5}  # fmt: skip
    monkeypatch.setattr(kernels, "roofline", lambda: (1e9, 1e12))
    monkeypatch.setattr(kernels, "time_cases", lambda *_: iter([row]))
    code, out, _ = run(capsys, "bench", "kernels", "--backend", "sim", "--no-peers")
    lines = out.splitlines()
    header, figures = (next(line.split() for line in lines if line.startswith(start)) for start in ("case", "flash/one"))
    shown = dict(zip(header[1:], figures[1:], strict=True))
    assert code == 0 and (shown["time_us"], shown["alone_us"], shown["roofline_percent"], shown["xla_us"]) == ("9.2", "12.5", "78.0", "-")
    assert json.loads(lines[-1])["cases"] == [row]
    with pytest.raises(SystemExit):
        main(["bench", "kernels", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "time_us: from one call to the next in a chain" in text and "alone_us: from one call to the next where no kernel starts early" in text


def test_selftest_on_the_interpreter(capsys, tmp_path):
    """Small cases of the real shapes through the command; the last line is its JSON."""
    from ffi_kernels import library

    if (missing := library.why_not("sim")) is not None:
        pytest.skip(missing)
    command = ["selftest", "--backend", "sim", "--model", "flash", "--only", "rms_norm 1 rows|route_tokens hash R1$", "--out", str(tmp_path / "rows")]
    code, out, _ = run(capsys, *command)
    figures = json.loads(out.strip().splitlines()[-1])
    assert (code, figures["failed"], len(figures["cases"])) == (0, 0, 2)
    assert [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()] == figures["cases"]
    code, out, _ = run(capsys, *command, "--seconds", "0")
    assert code == 0 and "stopped here: 0 s are over" in out and "1 of 1 cases agree" in out
