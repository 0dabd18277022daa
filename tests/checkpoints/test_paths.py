"""Where a conversion reads and writes: links, odd directories, what is no regular file, what the system refuses, leftovers."""

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="synthetic publications are written by torch")

from published import Maker, config_of, write  # noqa: E402

import checkpoints  # noqa: E402
from checkpoints import conversion, journal  # noqa: E402
from dsv4_jax.cli import main  # noqa: E402

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _no_compile_cache(monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write(tmp_path_factory.mktemp("paths") / "source", Maker(config_of("official"), "official").make())


def files_of(directory):
    return {f.relative_to(directory).as_posix(): f.read_bytes() for f in directory.rglob("*") if f.is_file()}


def refused(capsys, *argv):
    assert main([str(a) for a in argv]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err[-2] in ".?", err
    return err


# --- what is read -----------------------------------------------------------------------------------------------


def test_the_cache_of_hugging_face(source, tmp_path):
    """A snapshot is a directory of links to files that are named by their hashes and lie elsewhere."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(source.iterdir())):
        shutil.copyfile(file, blobs / f"{number:064x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:064x}")
    before = files_of(tmp_path / "blobs")
    checkpoints.convert(snapshot, tmp_path / "linked")
    checkpoints.convert(source, tmp_path / "plain")
    assert files_of(tmp_path / "linked") == files_of(tmp_path / "plain") and files_of(tmp_path / "blobs") == before
    assert checkpoints.inspect(snapshot).nbytes == checkpoints.inspect(source).nbytes


def test_a_source_is_only_read(source, tmp_path):
    """It may be read-only, hold other files, and even the destination."""
    directory = shutil.copytree(source, tmp_path / "source")
    for name in ("._model-00001-of-00003.safetensors", ".model.safetensors", "README.md", "pytorch_model.bin"):
        (directory / name).write_bytes(b"no checkpoint")
    os.mkfifo(directory / "pipe")
    (directory / "inference").mkdir()
    state = {p.name: (p.stat().st_mode, p.stat().st_mtime_ns) for p in directory.iterdir()}
    done = checkpoints.convert(f"{directory}/", directory / "converted" / "here")
    assert {p.name: (p.stat().st_mode, p.stat().st_mtime_ns) for p in directory.iterdir() if p.name != "converted"} == state
    assert files_of(done.destination) == files_of(checkpoints.convert(directory, tmp_path / "again").destination)
    (directory / "model.safetensors.index.json").unlink()  # without an index every visible .safetensors file counts
    checkpoints.convert(directory, tmp_path / "without index")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors.index.json", "model-00002-of-00003.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "device", "directory", "loop"])
def test_only_regular_files_are_opened(kind, name, source, tmp_path):
    """A pipe would wait for a writer that never comes, and /dev/zero never ends."""
    directory = shutil.copytree(source, tmp_path / "source")
    (directory / name).unlink()
    if kind == "pipe":
        os.mkfifo(directory / name)
    elif kind == "directory":
        (directory / name).mkdir()
    else:
        (directory / name).symlink_to("/dev/zero" if kind == "device" else name)
    if (kind, name) == ("loop", "tokenizer.json"):
        assert any("no tokenizer.json" in notice for notice in checkpoints.convert(directory, tmp_path / "out").notices)
        return
    with pytest.raises(ValueError, match="it is no regular file|Is a directory|Too many levels of symbolic links") as error:
        checkpoints.convert(directory, tmp_path / "out")
    assert name in str(error.value)


@pytest.fixture
def nobody(tmp_path):
    """A context manager in which this process has the rights of nobody, who may look into tmp_path but not write there."""
    if os.geteuid() != 0:
        pytest.skip("only root can give up its rights for a while, and this process is not root")
    for directory in (tmp_path, *tmp_path.parents):
        if directory.stat().st_uid == 0 and directory != Path("/"):
            directory.chmod(directory.stat().st_mode | 0o055)

    @contextlib.contextmanager
    def without_rights():
        group = os.getegid()
        os.setegid(65534)
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)
            os.setegid(group)

    return without_rights


def test_what_may_not_be_read_or_written(nobody, source, tmp_path):
    opened, closed = shutil.copytree(source, tmp_path / "opened"), shutil.copytree(source, tmp_path / "closed")
    for file in opened.iterdir():
        file.chmod(0o644)
    closed.chmod(0)
    checkpoints.inspect(checkpoints.convert(opened, tmp_path / "before").destination)  # what it imports, nobody may not read
    for sentence, call in {
        f"the conversion to {tmp_path}/out stopped: Permission denied": lambda: checkpoints.convert(opened, tmp_path / "out"),
        "config.json is not readable JSON .Permission denied.": lambda: checkpoints.convert(closed, tmp_path / "out"),
        "closed cannot be listed .Permission denied.": lambda: checkpoints.inspect(closed),
    }.items():
        with nobody(), pytest.raises(ValueError, match=sentence):
            call()


# --- where it writes --------------------------------------------------------------------------------------------


def test_destinations_that_cannot_be(source, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to("nowhere")
    for destination, sentence in (
        ("file", "exists already"), ("", "exists already"), ("dangling", "exists already"), (source, "exists already"),
        ("file/below", "Not a directory"), ("x" * 260, "File name too long"), ("/proc/x", "the conversion to /proc/x stopped"),
    ):  # fmt: skip
        assert sentence in refused(capsys, "convert", source, destination)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dangling", "file"]
    assert main(["convert", str(source), "relative/and/deep"]) == 0
    assert (tmp_path / "relative/and/deep/dsv4.json").is_file()


def test_a_file_that_may_not_grow(source, tmp_path):
    """As a full disk, but for one process: the sentence says so, and with more room the conversion goes on."""
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)); from dsv4_jax.cli import main; import sys; sys.exit(main())"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", limited, "convert", str(source), str(tmp_path / "out")], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert run.returncode == 2 and os.strerror(errno.EFBIG) in run.stderr and "the same command resumes it" in run.stderr, run.stderr
    assert not (tmp_path / "out").exists()
    assert files_of(checkpoints.convert(source, tmp_path / "out").destination) == files_of(checkpoints.convert(source, tmp_path / "new").destination)


def test_what_a_kill_after_the_end_leaves_is_removed(source, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(journal.shutil, "rmtree", lambda *_, **__: None)
        checkpoints.convert(source, tmp_path / "out")
    assert (tmp_path / ".out.partial").is_dir()
    with pytest.raises(ValueError, match="exists already"):
        checkpoints.convert(source, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_destination_appears_meanwhile(source, tmp_path, monkeypatch):
    describe = conversion._describe

    def appears(*args):
        describe(*args)
        (tmp_path / "out").mkdir()

    monkeypatch.setattr(conversion, "_describe", appears)
    with pytest.raises(ValueError, match="out exists already"):
        checkpoints.convert(source, tmp_path / "out")
    monkeypatch.undo()
    (tmp_path / "out").rmdir()
    assert checkpoints.convert(source, tmp_path / "out").resumed > 100


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_stop_it_and_the_same_command_resumes(number, source, tmp_path):
    expected = files_of(checkpoints.convert(source, tmp_path / "whole").destination)
    slow = (
        "import signal, sys, time; from checkpoints import transcode; from dsv4_jax.cli import main; run = transcode.run\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # where the tests run in the background it is ignored\n"
        "def slower(*a, **k): time.sleep(0.05); return run(*a, **k)\n"
        "transcode.run = slower; sys.exit(main())"
    )
    command = [sys.executable, "-c", slow, "convert", str(source), str(tmp_path / "out"), "--workers", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": ""}
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
    lines, limit = tmp_path / ".out.partial" / "journal", time.monotonic() + 120
    while time.monotonic() < limit and not (lines.exists() and lines.read_bytes().count(b"\n") > 10):
        time.sleep(0.02)
    running.send_signal(number)
    err = running.communicate(timeout=60)[1]
    assert running.returncode == 130 and "interrupted; the same command resumes it" in err and err.count("\n") == 1, err
    assert not (tmp_path / "out").exists()
    done = checkpoints.convert(source, tmp_path / "out")
    assert done.resumed > 5 and files_of(done.destination) == expected
