"""Export in pieces: each byte read once, in disk order, memory bounded; cut short anywhere, the same bytes at last."""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import save_file

from kimi_deploy import page_cache
from kimi_deploy.checkpoint import Checkpoint, TensorInfo, cast, reader, released_tensors
from kimi_deploy.checkpoint.parameter_part import Span
from kimi_deploy.checkpoint.presets import preset_config
from kimi_deploy.checkpoint.safetensors_file import layout_header
from kimi_deploy.config import KimiLinearConfig
from kimi_deploy.contract import Dtype, GraphContract
from kimi_deploy.errors import CheckpointError, DiskSpaceError, ExportError, ManifestError, TokenizerError, UsageError
from kimi_deploy.manifest import Manifest
from kimi_deploy.onnx import export as export_module
from kimi_deploy.onnx import weight_files, weights
from kimi_deploy.onnx.export import export_model
from kimi_deploy.onnx.journal import Journal
from kimi_deploy.onnx.weights import Initializer, Piece, Region, WeightPlan, plan_weights
from kimi_deploy.output_folder import partial_folder
from kimi_deploy.quantization.scheme import parse_scheme
from kimi_deploy.runtime.ort_runner import OrtRunner
from tests.configs import config
from tests.graph.conftest import no_progress
from tests.models import write_model

Export = Callable[..., Manifest]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("streamed") / "model", config("KKM"))


Graphs = dict[tuple[KimiLinearConfig, Dtype, bool], ir.Model]


@pytest.fixture(scope="module")
def graphs() -> Graphs:
    """Traced graphs, so that a test of what follows need not trace again."""
    return {}


@pytest.fixture
def run(model: Path, graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> Export:
    """export_model of `model` with every graph traced once."""
    build = export_module.build_graph

    def remembered(checkpoint: Checkpoint, contract: GraphContract, untransposed: Any) -> ir.Model:
        key = (checkpoint.config, contract.dtype, bool(untransposed))
        if key not in graphs:
            graphs[key] = build(checkpoint, contract, untransposed)
        return graphs[key].clone()

    monkeypatch.setattr(export_module, "build_graph", remembered)

    def export(output: Path, folder: Path = model, dtype: Dtype = "float32", **settings: Any) -> Manifest:
        return export_model(
            folder, output, dtype=dtype, flavour="ort", overwrite=False, progress=no_progress, **settings
        )

    return export


@pytest.fixture
def whole(run: Export, tmp_path: Path) -> Path:
    """An export that nothing interrupted."""
    run(tmp_path / "whole")
    return tmp_path / "whole"


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def killed(work: Callable[[], object], at: str, count: int) -> None:
    """Run `work` in a child process that SIGKILLs itself at the call number `count` of `os.<at>`, half done."""

    def child() -> None:
        real, calls = getattr(os, at), 0

        def deadly(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == count:
                if at == "pwrite":
                    file, data, offset = arguments
                    real(file, data[: len(data) // 2], offset)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments)

        setattr(os, at, deadly)
        work()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("at", "count"), [("pwrite", 1), ("pwrite", 20), ("pwrite", 45), ("preadv", 30), ("replace", 2)]
)
def test_a_killed_export_is_gone_on_with_and_gives_the_same_bytes(
    at: str, count: int, run: Export, whole: Path, tmp_path: Path
) -> None:
    """os.replace number 2 is the very last step: manifest.json has its name, the folder not yet."""
    output = tmp_path / "whole again"
    killed(lambda: run(output), at, count)
    assert not output.exists()
    assert partial_folder(output).is_dir()
    run(output)
    assert content(output) == content(whole)
    assert not partial_folder(output).exists()


def test_a_quantised_export_in_shards_is_gone_on_with_wherever_it_was_killed(run: Export, tmp_path: Path) -> None:
    wide = config("KM", hidden_size=64, moe_intermediate_size=32, intermediate_size=64)
    folder = write_model(tmp_path / "model", wide)
    scheme = parse_scheme("int4,group=32,head,embeddings")
    settings: dict[str, Any] = {"folder": folder, "quantization": scheme, "max_shard_bytes": 20_000}
    run(tmp_path / "whole", **settings)
    assert len(list((tmp_path / "whole").glob("weights-*"))) > 2
    for count in (5, 20, 40):
        killed(lambda: run(tmp_path / "out", **settings), "pwrite", count)
    run(tmp_path / "out", **settings)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    # another scheme of the same sizes is another export
    killed(lambda: run(tmp_path / "rtn", **settings), "pwrite", 30)
    settings["quantization"] = parse_scheme("int4,group=32,head,embeddings,rtn")
    run(tmp_path / "rtn", **settings)
    run(tmp_path / "fresh", **settings)
    assert content(tmp_path / "rtn") == content(tmp_path / "fresh") != content(tmp_path / "whole")


def test_only_what_is_missing_is_written_again(
    run: Export, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    killed(lambda: run(output), "pwrite", 41)
    finished = len((partial_folder(output) / "journal").read_text().splitlines()) - 1
    written = []
    real = weight_files._write

    def counted(piece: Piece, place: Any) -> tuple[str, ...]:
        written.append(piece)
        return real(piece, place)

    monkeypatch.setattr(weight_files, "_write", counted)
    run(output)
    # each thread may have written a piece that the journal does not have yet
    assert finished >= 30
    assert len(written) == len(_plan(output, model, "float32").pieces) - finished


def test_a_finished_piece_that_the_disk_lost_is_written_again(run: Export, whole: Path, tmp_path: Path) -> None:
    """A machine that stops may lose bytes that the journal counts."""
    output = tmp_path / "out"
    killed(lambda: run(output), "pwrite", 30)
    weights = partial_folder(output) / "content" / "weights.bin"
    weights.write_bytes(bytes(weights.stat().st_size))
    run(output)
    assert content(output)["weights.bin"] == content(whole)["weights.bin"]


@pytest.mark.parametrize("cut", [b"", b"\n", b'[3, "', b"\n5\n", b"\0" * 30])
def test_a_journal_that_is_cut_short_is_read_as_far_as_it_goes(
    cut: bytes, run: Export, whole: Path, tmp_path: Path
) -> None:
    """Also when the run that goes on is killed again: its lines are not glued to the one that was cut."""
    output = tmp_path / "out"
    killed(lambda: run(output), "pwrite", 20)
    path = partial_folder(output) / "journal"
    header, *lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes((header + b"".join(lines))[:-20] + cut)
    fingerprint = json.loads(header)["fingerprint"]
    killed(lambda: run(output), "pwrite", 10)
    with Journal(path, fingerprint) as journal:
        assert {json.loads(line)[0] for line in lines[:-1]} < set(journal.finished)
        assert len(journal.finished) >= len(lines) - 1 + 5
    run(output)
    assert content(output) == content(whole)


@pytest.mark.parametrize("settings", [{"max_shard_bytes": 50_000}, {"reference": True}])
def test_an_export_with_other_settings_begins_anew(settings: dict[str, Any], run: Export, tmp_path: Path) -> None:
    killed(lambda: run(tmp_path / "out"), "pwrite", 20)
    run(tmp_path / "out", **settings)
    run(tmp_path / "fresh", **settings)
    assert content(tmp_path / "out") == content(tmp_path / "fresh")


def test_an_export_of_another_checkpoint_begins_anew(run: Export, model: Path, tmp_path: Path) -> None:
    killed(lambda: run(tmp_path / "out"), "pwrite", 20)
    other = write_model(tmp_path / "other", config("KKM"), seed=9)
    run(tmp_path / "out", other)
    run(tmp_path / "fresh", other)
    assert content(tmp_path / "out")["weights.bin"] == content(tmp_path / "fresh")["weights.bin"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError(28, "No space left on device")])
def test_an_interrupt_and_a_full_disk_keep_what_is_written(
    error: Any, run: Export, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(weight_files, "check_weights", _raising(error))
        with pytest.raises(type(error) if isinstance(error, OSError) else error):
            run(tmp_path / "out")
    assert partial_folder(tmp_path / "out").is_dir()
    run(tmp_path / "out")
    assert content(tmp_path / "out") == content(whole)


def test_too_little_space_for_the_rest_keeps_what_is_written(
    run: Export, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that was full is still full when the user tries again too early: hours of work are not for that lost."""
    output = tmp_path / "out"
    killed(lambda: run(output), "pwrite", 30)
    before = content(partial_folder(output) / "content")
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1))
        with pytest.raises(DiskSpaceError):
            run(output)
    assert content(partial_folder(output) / "content") == before
    run(output)
    assert content(output) == content(whole)


def test_what_is_written_already_needs_no_space_again(
    run: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    killed(lambda: run(output), "pwrite", 45)
    weights = partial_folder(output) / "content" / "weights.bin"
    written = weights.stat().st_blocks * 512
    assert written
    usage = shutil.disk_usage(tmp_path)
    rest = weights.stat().st_size - written + (64 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=rest - written // 2))
    with pytest.raises(DiskSpaceError):
        run(output)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=rest + written // 2))
    run(output)
    assert output.is_dir()


def test_too_little_space_for_the_whole_is_found_before_the_first_byte(
    run: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=64 << 20))
    monkeypatch.setattr(export_module, "reserve", _raising(AssertionError("files were made")))
    with pytest.raises(DiskSpaceError, match=r"(?s)0\.07 GB free.*free some space"):
        run(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def _raising(error: Any) -> Callable[..., None]:
    def fail(*arguments: object) -> None:
        raise error

    return fail


def test_a_checkpoint_that_is_refused_half_way_leaves_nothing(run: Export, model: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(model, tmp_path / "broken")
    shard = next(broken.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-4:] = np.float32(np.nan).tobytes()
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match="NaN"):
        run(tmp_path / "out", broken)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken"]


@pytest.mark.parametrize("wrong", ["value", "place"])
def test_a_write_that_goes_wrong_is_found(
    wrong: str, run: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is hashed is what was meant; what is read back is what the file has."""
    real, calls = os.pwrite, 0

    def faulty(file: int, data: Any, offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls == 20:
            if wrong == "place":
                return real(file, data, max(0, offset - 64))
            data = bytes(data[:-1]) + bytes([data[-1] ^ 1])
        return real(file, data, offset)

    monkeypatch.setattr(os, "pwrite", faulty)
    with pytest.raises(ExportError, match="other values than the checkpoint"):
        run(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_two_exports_to_one_folder_do_not_mix(run: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def second(*arguments: object) -> None:
        with monkeypatch.context() as patch:
            patch.undo()
            run(tmp_path / "out")

    monkeypatch.setattr(weight_files, "check_weights", second)
    with pytest.raises(UsageError, match="another process"):
        run(tmp_path / "out")


def test_every_file_is_on_the_disk_before_the_folder_has_its_name(
    run: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    synced: set[int] = set()
    in_time: list[bool] = []
    sync, replace = os.fsync, os.replace

    def synced_too(file: int) -> None:
        sync(file)
        synced.add(os.fstat(file).st_ino)

    def checked(source: Path, target: Path) -> None:
        if target == output:
            in_time.append({p.stat().st_ino for p in (*source.rglob("*"), source)} <= synced)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced_too)
    monkeypatch.setattr(os, "replace", checked)
    run(output)
    assert in_time == [True]
    assert tmp_path.stat().st_ino in synced


def test_reading_ahead_ends_with_the_work_beside_it_and_at_its_limit(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = (model / "model.safetensors").stat().st_size // 2
    monkeypatch.setattr(reader, "_READ_AHEAD_BYTES", limit)
    monkeypatch.setattr(reader, "_READ_AHEAD_STEP", 4096)
    asked: list[tuple[int, int, int]] = []
    enough = threading.Event()

    def advised(file: int, offset: int, nbytes: int, advice: int) -> None:
        asked.append((offset, nbytes, advice))
        if offset + nbytes >= limit:
            enough.set()

    monkeypatch.setattr(os, "posix_fadvise", advised)
    with Checkpoint.open(model).read_ahead():
        assert enough.wait(60)
    assert asked == [(i * 4096, 4096, os.POSIX_FADV_WILLNEED) for i in range(-(-limit // 4096))]
    assert not any(t.name.startswith("read ahead") for t in threading.enumerate())


def test_a_graph_is_built_without_a_weight_to_read(model: Path, tmp_path: Path) -> None:
    """Only the table of tensors is there, no file."""
    known = Checkpoint.open(model)
    nothing = Checkpoint(tmp_path, known.config, known.tensors)
    graph = export_module.build_graph(nothing, GraphContract.of(known.config, "float32"), ())
    assert {r.weight.name for r in known.resolve()} <= set(graph.graph.initializers)
    with pytest.raises(FileNotFoundError):
        nothing.load("model.norm.weight", "float32")


def test_a_system_that_takes_no_advice_gives_the_same_export(
    run: Export, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """macOS has no posix_fadvise and does not count free pages."""
    monkeypatch.setattr(page_cache, "TAKES_ADVICE", False)
    monkeypatch.setattr(reader, "TAKES_ADVICE", False)
    for name in ("posix_fadvise", "POSIX_FADV_WILLNEED", "POSIX_FADV_DONTNEED"):
        monkeypatch.delattr(os, name)
    run(tmp_path / "out")
    assert content(tmp_path / "out") == content(whole)


def test_an_export_reads_every_byte_of_the_checkpoint_once_and_forwards(
    run: Export, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted at the system call that reads parameters; one thread, so that the order is that of the plan."""
    shards = {p.stat().st_ino for p in model.glob("*.safetensors")}
    reads: list[tuple[int, int]] = []
    real = os.preadv

    def counted(file: int, buffers: list[Any], offset: int) -> int:
        count = real(file, buffers, offset)
        if os.fstat(file).st_ino in shards:
            reads.append((offset, count))
        return count

    monkeypatch.setattr(os, "preadv", counted)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    run(tmp_path / "out")
    tensors = Checkpoint.open(model).tensors.values()
    assert sum(count for _, count in reads) == sum(t.nbytes for t in tensors)
    ordered = sorted(reads)
    assert all(offset + count <= later for (offset, count), (later, _) in pairwise(ordered))
    plan = _plan(tmp_path / "out", model, "float32")
    pieces = [(min(s.offset for s in p.spans), sum(s.nbytes for s in p.spans)) for p in plan.pieces]
    begun = [reads.index(next(r for r in reads if r[0] == start)) for start, _ in pieces]
    assert begun == sorted(begun)


def _plan(folder: Path, model: Path, dtype: Dtype) -> WeightPlan:
    return plan_weights(ir.load(folder / "model.onnx"), Checkpoint.open(model), dtype)


def test_every_stored_byte_is_read_once_and_in_disk_order(whole: Path, model: Path) -> None:
    plan = _plan(whole, model, "float32")
    starts = [piece.disk_order for piece in plan.pieces]
    assert starts == sorted(starts)
    spans = sorted((s.tensor.file, s.offset, s.offset + s.nbytes) for p in plan.pieces for s in p.spans)
    for (file, _, end), (next_file, start, _) in pairwise(spans):
        assert next_file != file or start == end
    assert sum(end - start for _, start, end in spans) == sum(t.nbytes for t in Checkpoint.open(model).tensors.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_piece_holds_no_more_memory_than_it_says(
    dtype: Dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks and parts cut small, so that a whole tensor in memory would be seen."""
    monkeypatch.setattr(weights, "PART_BYTES", 1 << 16)
    monkeypatch.setattr(cast, "BLOCK_ELEMENTS", 1 << 12)
    folder = write_model(tmp_path / "wide", config("KM", vocab_size=4096, hidden_size=128, moe_intermediate_size=64))
    graph = export_module.build_graph(
        Checkpoint.open(folder), GraphContract.of(Checkpoint.open(folder).config, dtype), ()
    )
    for piece in plan_weights(graph, Checkpoint.open(folder), dtype).pieces:
        piece.produce()
        tracemalloc.start()
        piece.produce()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak <= piece.working_bytes, piece.regions


def test_pieces_in_flight_share_one_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads wait while too much is in memory; one piece larger than the budget runs alone."""
    monkeypatch.setattr(weight_files, "IN_FLIGHT_BYTES", 100)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    held: set[int] = set()
    most = 0

    def piece(index: int, working: int) -> Piece:
        def produce() -> list[np.ndarray]:
            nonlocal most
            held.add(index)
            most = max(most, sum(sizes[i] for i in held))
            # long enough for others to begin, if they may
            time.sleep(0.002)
            total = np.full(64, index, np.uint8)
            held.discard(index)
            return [total]

        return Piece((span_at(index),), (Region(f"w{index}", 0, 64),), produce, working)

    sizes = [30, 60, 90, 100, 10, 40, 100, 20] * 8
    plan = WeightPlan()
    for index, working in enumerate(sizes):
        plan.add([Initializer(f"w{index}", ir.DataType.UINT8, (64,))], [piece(index, working)])
    layout = weight_files.lay_out(plan)
    weight_files.reserve(layout.sizes, tmp_path)
    with weight_files.Journal(tmp_path / "journal", "x") as journal:
        hashes = weight_files.write_weights(plan, layout, layout, tmp_path, journal, lambda n: None)
    assert most <= 100
    assert hashes == {"weights.bin": hashlib.sha256((tmp_path / "weights.bin").read_bytes()).hexdigest()}
    assert len((tmp_path / "journal").read_text().splitlines()) == 1 + len(sizes)


def span_at(index: int) -> Span:
    return Span(TensorInfo(f"t{index}", "F32", (1,), "file", index, 4), index, 4)


@pytest.mark.parametrize(
    ("regions", "nbytes"),
    [([(0, 4), (4, 8)], 16), ([(0, 8), (4, 12)], 16), ([(0, 8), (8, 12)], 16), ([], 4), ([(4, 4)], 8)],
)
def test_a_plan_with_a_gap_or_an_overlap_is_refused(regions: list[tuple[int, int]], nbytes: int) -> None:
    span = span_at(0)
    pieces = [Piece((span,), (Region("w", *r),), lambda: [], 0) for r in regions]
    with pytest.raises(ExportError, match="gap or overlap"):
        WeightPlan().add([Initializer("w", ir.DataType.UINT8, (nbytes,))], pieces)


def test_shards_hold_the_same_weights_and_run(run: Export, whole: Path, tmp_path: Path) -> None:
    manifest = run(tmp_path / "shards", max_shard_bytes=40_000)
    names = sorted(n for n in manifest.files if n.startswith("weights"))
    count = len(names)
    assert count > 3
    assert names == [f"weights-{n:05d}-of-{count:05d}.bin" for n in range(1, count + 1)]
    assert all(manifest.files[n]["bytes"] <= 40_000 for n in names)
    assert_same_results(tmp_path / "shards", whole)


def test_a_weight_larger_than_a_shard_has_a_file_of_its_own(run: Export, whole: Path, tmp_path: Path) -> None:
    run(tmp_path / "shards", max_shard_bytes=1)
    graph = ir.load(tmp_path / "shards" / "model.onnx")
    external = [
        v.const_value for v in graph.graph.initializers.values() if isinstance(v.const_value, ir.ExternalTensor)
    ]
    assert len({t.location for t in external}) == len(external)
    assert_same_results(tmp_path / "shards", whole)


def assert_same_results(export: Path, other: Path) -> None:
    ids = np.arange(20)[None] % 96
    results = []
    for folder in (export, other):
        runner = OrtRunner(folder, threads=1)
        state = runner.new_state(capacity=20)
        results.append((runner.forward(ids, state, logits_indices="all"), state.tensors()))
    (logits, states), (other_logits, other_states) = results
    assert np.array_equal(logits, other_logits)
    assert all(np.array_equal(states[name], other_states[name]) for name in states)


def test_weights_that_the_checkpoint_has_as_needed_stay_in_its_files(
    run: Export, whole: Path, model: Path, tmp_path: Path
) -> None:
    run(tmp_path / "linked", reference=True)
    shard = model / "model.safetensors"
    assert os.path.samefile(tmp_path / "linked" / shard.name, shard)
    graph = ir.load(tmp_path / "linked" / "model.onnx").graph
    checkpoint = Checkpoint.open(model)
    stays = set()
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and tensor.location == shard.name:
            # onnx_ir itself does not read a file of two names
            seen = np.memmap(shard, np.float32, "r", tensor.offset or 0, tuple(tensor.shape))
            assert np.array_equal(seen, checkpoint.load(name, "float32"))
            stays.add(name)
    every = {r.weight.name for r in checkpoint.resolve()}
    # its rows are interleaved, which no checkpoint of the released form has; everything else lies there in order
    assert every - stays == {f"model.layers.{layer}.mlp.experts.gate_up_proj" for layer in (1, 2)}
    packed = (tmp_path / "linked" / "weights.bin").stat().st_size
    assert packed == sum(checkpoint.load(name, "float32").nbytes for name in every - stays)
    assert_same_results(tmp_path / "linked", whole)


def test_an_export_that_refers_to_a_checkpoint_outlives_its_folder_and_sees_its_files_change(
    run: Export, whole: Path, model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    run(tmp_path / "linked", folder, reference=True)
    folder.rename(tmp_path / "elsewhere")
    assert_same_results(tmp_path / "linked", whole)
    # a file that takes its name, as a download or git does it, is another file
    again = shutil.copy(tmp_path / "elsewhere" / "model.safetensors", tmp_path / "again")
    Path(again).replace(tmp_path / "elsewhere" / "model.safetensors")
    with (tmp_path / "elsewhere" / "model.safetensors").open("r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(bytes(64))
    Manifest.read(tmp_path / "linked").verify(tmp_path / "linked")
    with (tmp_path / "linked" / "model.safetensors").open("r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(bytes(64))
    with pytest.raises(ManifestError, match=r"model\.safetensors"):
        Manifest.read(tmp_path / "linked").verify(tmp_path / "linked")
    shutil.rmtree(tmp_path / "elsewhere")
    (tmp_path / "linked" / "model.safetensors").unlink()
    with pytest.raises(ManifestError, match=r"model\.safetensors"):
        OrtRunner(tmp_path / "linked", threads=1)


def test_nothing_stays_in_a_checkpoint_of_another_dtype(run: Export, model: Path, tmp_path: Path) -> None:
    """Only what is float32 in every model does."""
    run(tmp_path / "linked", dtype="bfloat16", reference=True)
    graph = ir.load(tmp_path / "linked" / "model.onnx").graph
    for name, value in graph.initializers.items():
        if isinstance(value.const_value, ir.ExternalTensor):
            in_place = value.const_value.location == "model.safetensors"
            assert in_place == name.endswith(("A_log", "dt_bias", "e_score_correction_bias"))


def test_parts_that_do_not_lie_back_to_back_are_packed(run: Export, model: Path, tmp_path: Path) -> None:
    """The safetensors library writes in the order of names: k, o, q, v."""
    other = shutil.copytree(model, tmp_path / "other")
    tensors = {name: Checkpoint.open(model).tensor(name) for name in Checkpoint.open(model).tensors}
    save_file(tensors, other / "model.safetensors")
    run(tmp_path / "linked", other, reference=True)
    graph = ir.load(tmp_path / "linked" / "model.onnx").graph
    places = {n: v.const_value.location for n, v in graph.initializers.items() if hasattr(v.const_value, "location")}
    assert places["model.layers.0.self_attn.qkv_proj.weight"] == "weights.bin"
    assert places["model.layers.0.self_attn.o_proj.weight"] == "model.safetensors"


@pytest.mark.parametrize(("by_name", "gigabytes"), [(False, 35.43), (True, 2.86)])
def test_how_much_of_the_released_model_can_stay_in_place_depends_on_the_order(by_name: bool, gigabytes: float) -> None:
    released = preset_config("kimi-linear-48b")
    tensors = [(t.name, t.dtype, t.shape) for t in released_tensors(released, "bfloat16")]
    if by_name:
        tensors.sort()
    tensors.sort(key=lambda t: t[1] != "F32")
    infos = layout_header(tensors, "model.safetensors")[1]
    checkpoint = Checkpoint(Path(), released, {info.name: info for info in infos})
    spans = weights.in_place_spans(checkpoint, "bfloat16")
    assert round(sum(span.nbytes for span in spans.values()) / 1e9, 2) == gigabytes


def test_a_checkpoint_on_another_file_system_cannot_be_referred_to(
    run: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", _raising(OSError(18, "Invalid cross-device link")))
    with pytest.raises(UsageError, match="file system"):
        run(tmp_path / "linked", reference=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", '{"tokenizer_class": "ByteTokenizer", "eos_token": "nowhere"}'),
        ("tokenizer.json", "{}"),
        ("generation_config.json", '{"eos_token_id": -1}'),
    ],
)
def test_text_files_that_generate_could_not_use_are_refused_before_the_graph_is_built(
    name: str, text: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module, "build_graph", _raising(AssertionError("built")))
    broken = shutil.copytree(model, tmp_path / "broken")
    (broken / name).write_text(text)
    with pytest.raises(TokenizerError, match=name.replace(".", r"\.")):
        export_model(broken, tmp_path / "out", dtype="float32", flavour="ort", overwrite=False, progress=no_progress)
    assert [p.name for p in tmp_path.iterdir()] == ["broken"]


def test_an_output_that_exists_is_refused_before_torch_is_loaded(whole: Path, model: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from kimi_deploy.errors import UsageError
from kimi_deploy.onnx.export import export_model
try:
    settings = dict(dtype="float32", flavour="ort", overwrite=False, progress=None)
    export_model(Path({str(model)!r}), Path({str(whole)!r}), **settings)
except UsageError:
    assert "torch" not in sys.modules
    print("refused")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "refused\n", done.stderr
