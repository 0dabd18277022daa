"""Killed with SIGKILL at random moments, a conversion resumes and ends in the same bytes; it appears whole or not at all."""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="synthetic publications are written by torch")

from published import Maker, config_of, write  # noqa: E402

import checkpoints  # noqa: E402
from checkpoints import conversion, transcode  # noqa: E402
from checkpoints.journal import Journal  # noqa: E402

ROOT = Path(__file__).parents[2]
KILLS = 50


def digest(directory: Path) -> dict[str, str]:
    files = (f for f in sorted(directory.rglob("*")) if f.is_file())
    return {f.relative_to(directory).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write(tmp_path_factory.mktemp("resume") / "source", Maker(config_of("official"), "official").make())


@pytest.mark.parametrize("recipe", ["official", "nvfp4"])
def test_killed_at_25_random_moments_each(recipe, source, tmp_path):
    expected = digest(checkpoints.convert(source, tmp_path / "whole", recipe).destination)
    command = [sys.executable, str(Path(__file__).with_name("killed.py")), str(source), str(tmp_path / "out"), recipe, "7", str(KILLS // 2)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert not any("error" in line for line in lines), (lines, run.stderr[-2000:])
    killed = [line for line in lines if line["killed"]]
    part_way = [line for line in killed if line.get("lines", 0) > 1]
    print(f"{recipe}: {len(killed)} killed, {len(part_way)} part way, resumed after {sorted(line['resumed'] for line in part_way)} steps")
    assert len(killed) == KILLS // 2 and len(part_way) >= 8, "many were killed at work, at different moments"
    assert len({line["resumed"] for line in part_way}) >= 5
    assert all(line["resumed"] in (line["lines"], line["lines"] - 1) for line in part_way), "whole lines of the journal count, cut ones do not"
    for number in range(len(lines)):
        assert digest(tmp_path / f"out-{number}") == expected, number
    assert not list(tmp_path.glob(".*")), "working directories are gone"


def crash_after(monkeypatch, count):
    """The conversion fails at its n-th task, as if the disk were full."""
    run, left = transcode.run, [count]

    def counted(*args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        return run(*args, **kwargs)

    monkeypatch.setattr(transcode, "run", counted)


def test_errors_keep_what_is_done_and_other_plans_start_anew(source, tmp_path, monkeypatch):
    expected = digest(checkpoints.convert(source, tmp_path / "whole").destination)
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    with monkeypatch.context() as patch:
        crash_after(patch, 60)
        with pytest.raises(ValueError, match="the conversion to .*out stopped: No space left.*the same command resumes it"):
            checkpoints.convert(source, out)
    assert partial.is_dir() and not out.exists()
    done = checkpoints.convert(source, out)
    assert 60 <= done.resumed <= 66 and digest(out) == expected and not partial.exists()  # tasks, hashes, directories
    for change in ("recipe", "source", "silent source"):
        other = tmp_path / change
        with monkeypatch.context() as patch:
            crash_after(patch, 60)
            with pytest.raises(ValueError, match="stopped"):
                checkpoints.convert(source, other)
        shard = next(source.glob("*.safetensors"))
        if change == "source":
            os.utime(shard, ns=(1, 1))
        elif change == "silent source":  # written again, and its time of modification set back
            before = shard.stat()
            shard.write_bytes(shard.read_bytes())
            os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
        done = checkpoints.convert(source, other, "nvfp4" if change == "recipe" else "official")
        assert done.resumed == 0 and any("unfinished conversion of something else" in n for n in done.notices)
        assert change == "recipe" or digest(other) == expected


def stopped_after(monkeypatch, source, out, count):
    with monkeypatch.context() as patch:
        crash_after(patch, count)
        with pytest.raises(ValueError, match="stopped"):
            checkpoints.convert(source, out, workers=1)


def test_after_another_boot_only_what_was_brought_to_the_disk_counts(source, tmp_path, monkeypatch):
    expected = digest(checkpoints.convert(source, tmp_path / "whole").destination)
    out, lines = tmp_path / "out", tmp_path / ".out.partial" / "journal"
    monkeypatch.setattr("checkpoints.journal.SYNC_SECONDS", 1e9)
    stopped_after(monkeypatch, source, out, 40)
    with checkpoints.open_source(source) as opened:  # 40 tasks, hashes and directories: brought to the disk
        plan = conversion.plan_conversion(opened)
        with Journal(out, conversion._fingerprint(opened, plan, conversion._tokenizer(opened), False)) as held:
            held.sync()
            on_disk = len(held.done)
    stopped_after(monkeypatch, source, out, 30)  # and 30 more, of which a power cut leaves the lines but no data
    arrays = [f for f in (tmp_path / ".out.partial" / "checkpoint" / "weights").glob("*/*") if not f.name.startswith(".")]
    newest = sorted(arrays, key=lambda f: f.stat().st_mtime_ns)[-20:]
    for file in newest:
        file.write_bytes(bytes(file.stat().st_size))
    recorded = sum(not line.startswith((b'["boot"', b'["on disk"')) for line in lines.read_bytes().splitlines())
    with lines.open("ab") as file:
        file.write(b"\0" * 100)  # and a line of zeros, as file systems do
    monkeypatch.setattr("checkpoints.journal._boot", lambda: "another")
    done = checkpoints.convert(source, out)
    assert on_disk >= 40 and done.resumed == on_disk and digest(out) == expected
    lost = recorded - on_disk  # the tasks, and hashes of files that were read to their end
    assert lost >= 30 and any(f"the machine was started again, so the last {lost} steps" in notice for notice in done.notices)


def test_a_second_cut_before_anything_new_was_brought_to_the_disk(source, tmp_path, monkeypatch):
    """Nor do lines count twice, nor does a machine that does not tell its boots trust what it cannot know."""
    out = tmp_path / "out"
    stopped_after(monkeypatch, source, out, 25)
    for boot in ("second", "third", None, None):
        monkeypatch.setattr("checkpoints.journal._boot", lambda: boot)
        with checkpoints.open_source(source) as opened:
            plan = conversion.plan_conversion(opened)
            with Journal(out, conversion._fingerprint(opened, plan, conversion._tokenizer(opened), False)) as held:
                if boot == "second":
                    assert not held.done and held.distrusted > 25
                    held.record("0", [0, None])
                    held.sync()
                    held.record("1", [0, None])
                else:
                    assert list(held.done) == ["0"] and held.distrusted == (boot == "third")


def test_everything_is_brought_to_the_disk_now_and_then(source, tmp_path, monkeypatch):
    syncs = []
    monkeypatch.setattr("checkpoints.journal.os.sync", lambda: syncs.append(1))
    monkeypatch.setattr("checkpoints.journal.SYNC_SECONDS", 0.01)
    run = transcode.run
    monkeypatch.setattr(transcode, "run", lambda *args, **kwargs: (time.sleep(0.005), run(*args, **kwargs))[1])
    checkpoints.convert(source, tmp_path / "out", workers=1)
    assert len(syncs) > 3


def test_two_processes_do_not_write_into_each_other(source, tmp_path):
    with checkpoints.open_source(source) as opened:
        plan = conversion.plan_conversion(opened)
        with Journal(tmp_path / "out", conversion._fingerprint(opened, plan, None, False)):
            with pytest.raises(ValueError, match="another process is converting to .*out; wait for it"):
                checkpoints.convert(source, tmp_path / "out")
    assert checkpoints.convert(source, tmp_path / "out").destination.is_dir()
    with pytest.raises(ValueError, match="out exists already; a checkpoint is never overwritten"):
        checkpoints.convert(source, tmp_path / "out")


def test_a_source_that_changes_meanwhile_is_noticed(source, tmp_path, monkeypatch):
    run = transcode.run

    def touching(*args, **kwargs):
        os.utime(next(source.glob("*.safetensors")), ns=(5, 5))
        return run(*args, **kwargs)

    monkeypatch.setattr(transcode, "run", touching)
    with pytest.raises(ValueError, match="changed while it was being converted"):
        checkpoints.convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_room_is_told_before_anything_is_written(source, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(ValueError, match="0.0 GB free, but 0.0 GB more are needed; free some"):
        checkpoints.convert(source, tmp_path / "out")
