#!/usr/bin/env python3
"""Measure `kimi-deploy export` of a checkpoint against `cp` of its files, and prove that a killed export goes on.

    kimi-deploy synth --preset kimi-linear-48b --layers 4 -o slice
    python scripts/measure_export.py slice --work DIR                        # throughput, 2 rounds
    python scripts/measure_export.py slice --work DIR --kill-at 0.1,0.5,0.9  # kill -9, again, same bytes?

DIR is on the disk that is measured and is left empty. Throughput: a round is `cp` and then `export`, each with the
checkpoint's pages dropped from the page cache before, each timed until its last byte is on the disk (fsync), the result
removed before the next. Killing: one export is left alone; another gets SIGKILL when it has written each of those
shares of its bytes, and is then run to its end; the sha256 of all files are compared. The exit code is 1 when they
differ, or when an export takes more than twice as long as `cp`. Options of `export` may follow after `--`, as
`-- --quantize int4,rtn`; without, it exports bfloat16.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from kimi_deploy import page_cache
from kimi_deploy.manifest import Manifest
from kimi_deploy.output_folder import partial_folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR")
    parser.add_argument("--rounds", type=int, default=2, metavar="N")
    parser.add_argument("--kill-at", metavar="SHARES", help="comma-separated, each in (0, 1)")
    # argparse would take options behind a positional argument for its own
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    arguments = parser.parse_args(sys.argv[1:split])
    options = sys.argv[split + 1 :] or ["--dtype", "bfloat16"]
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.kill_at:
        shares = [float(s) for s in arguments.kill_at.split(",")]
        return measure_resume(arguments.model, arguments.work, shares, options)
    return measure_throughput(arguments.model, arguments.work, arguments.rounds, options)


def measure_throughput(model: Path, work: Path, rounds: int, options: list[str]) -> int:
    """Print a JSON line per run; returns 1 when the slowest ratio is below a half."""
    nbytes = sum(p.stat().st_size for p in model.glob("*.safetensors"))
    worst = 1.0
    for _ in range(rounds):
        drop_from_cache(model)
        start = time.monotonic()
        subprocess.run(["cp", "-r", "--reflink=never", str(model), str(work / "copy")], check=True)
        sync(work / "copy")
        copied = time.monotonic() - start
        shutil.rmtree(work / "copy")
        drop_from_cache(model)
        done = export(model, work / "export", options)
        written = sum(p.stat().st_size for p in (work / "export").iterdir())
        shutil.rmtree(work / "export")
        ratio = copied / done["seconds"]
        # what a larger checkpoint takes in proportion
        streaming = copied / (done["seconds"] - done["phases"]["before the first byte"])
        worst = min(worst, ratio)
        report = {"read_bytes": nbytes, "written_bytes": written, "cp_seconds": round(copied, 1), **done}
        print(json.dumps(report | {"ratio": round(ratio, 3), "ratio_after_tracing": round(streaming, 3)}), flush=True)
    return int(worst < 0.5)


def export(model: Path, output: Path, options: list[str]) -> dict[str, Any]:
    """Run export to its end and sync; wall seconds in all and by phase, its cores' seconds and peak resident memory."""
    start = time.monotonic()
    process = subprocess.Popen(command(model, output, options), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    marks: list[tuple[str, float]] = []
    for line in process.stderr:
        sys.stderr.buffer.write(line)
        text = line.decode()
        # what a step is at is not a step
        if text.endswith(" ...\n") and " so far" not in text:
            marks.append((text[:-5], time.monotonic()))
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"the export failed with status {status}")
    ended = time.monotonic()
    sync(output)
    synced = time.monotonic()
    phases = {"before the first byte": marks[1][1] - start}
    for (name, at), (_, until) in zip(marks[1:], [*marks[2:], ("", ended)], strict=True):
        phases[name] = until - at
    phases["sync"] = synced - ended
    return {
        "seconds": round(synced - start, 1),
        "phases": {name: round(seconds, 1) for name, seconds in phases.items()},
        "core_seconds": {"user": round(usage.ru_utime, 1), "system": round(usage.ru_stime, 1)},
        "peak_resident_bytes": usage.ru_maxrss * 1024,
    }


def measure_resume(model: Path, work: Path, shares: list[float], options: list[str]) -> int:
    """Print a JSON line per kill and a verdict; returns 1 when a file differs from the undisturbed export's."""
    export(model, work / "whole", options)
    expected = Manifest.read(work / "whole").files
    shutil.rmtree(work / "whole")
    total = sum(entry["bytes"] for entry in expected.values())
    output = work / "killed"
    for share in shares:
        process = subprocess.Popen(command(model, output, options))
        while (written := allocated(partial_folder(output))) < share * total:
            if process.poll() is not None:
                raise SystemExit(f"the export ended before {share:.0%} of its bytes were written")
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        journal = len((partial_folder(output) / "journal").read_text().splitlines()) - 1
        print(json.dumps({"killed_at_bytes": written, "of": total, "finished_pieces": journal}), flush=True)
    done = export(model, output, options)
    manifest = Manifest.read(output)
    manifest.verify(output)
    same = manifest.files == expected
    print(json.dumps({"seconds_of_the_last_run": done["seconds"], "files": len(expected), "byte_identical": same}))
    shutil.rmtree(output)
    return int(not same)


def command(model: Path, output: Path, options: list[str]) -> list[str]:
    """The command line of an export."""
    return [sys.executable, "-m", "kimi_deploy", "export", str(model), "-o", str(output), *options]


def allocated(folder: Path) -> int:
    """Bytes on the disk of all files below `folder`; files that are still to be filled are sparse."""
    return sum(p.stat().st_blocks * 512 for p in folder.rglob("*") if p.is_file()) if folder.is_dir() else 0


def sync(folder: Path) -> None:
    """Wait until every file's bytes are on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def drop_from_cache(folder: Path) -> None:
    """Make the next read of every file come from the disk, where the system takes such advice."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                page_cache.done_with(file.fileno(), 0, 0)


if __name__ == "__main__":
    sys.exit(main())
