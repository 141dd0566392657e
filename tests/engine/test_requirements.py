"""What a build refuses before it starts, and what it says of this machine's GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kimi_deploy.cuda_driver import GpuDevice
from kimi_deploy.engine import requirements
from kimi_deploy.engine.backend import Backend, TensorRT, load
from kimi_deploy.engine.config import TimingCache
from kimi_deploy.engine.recipe import EngineRecipe, capabilities_for
from kimi_deploy.engine.requirements import check_options, check_room, check_target, unusable_here
from kimi_deploy.errors import EngineError, UsageError
from kimi_deploy.manifest import sha256
from kimi_deploy.memory import machine_memory
from tests.capabilities import needs_tensorrt_rtx

ADA, HOPPER = GpuDevice("NVIDIA L4", "8.9"), GpuDevice("NVIDIA H200", "9.0")


@pytest.fixture
def rtx() -> Backend:
    return load("tensorrt-rtx")


def on(monkeypatch: pytest.MonkeyPatch, *devices: GpuDevice) -> None:
    monkeypatch.setattr(requirements, "gpu_devices", lambda: devices)


@pytest.mark.parametrize(
    ("changes", "gpu", "full", "refused"),
    [
        ({}, False, False, False),
        ({"version_compatible": True}, False, False, True),
        ({"version_compatible": True}, True, True, False),
        ({"hardware_compatibility": "ampere+"}, False, False, True),
        ({"hardware_compatibility": "ampere+"}, True, True, False),
        ({"timing_cache": "cache"}, True, False, True),
        ({"timing_cache": "cache"}, True, True, False),
        ({"refit": True}, False, False, True),
        ({"refit": True}, True, False, False),
        ({"strip_weights": True}, False, False, True),
        ({"strip_weights": True}, True, True, False),
    ],
)
def test_options_are_refused_where_they_are_not_possible(
    changes: dict[str, Any], gpu: bool, full: bool, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(monkeypatch, *[ADA] * gpu)
    tensorrt: TensorRT = "tensorrt" if full else "tensorrt-rtx"
    recipe = replace(EngineRecipe(), **changes)
    if refused:
        with pytest.raises(EngineError, match=next(iter(changes))):
            check_options(tensorrt, recipe)
    else:
        check_options(tensorrt, recipe)


@pytest.mark.parametrize("option", ["refit", "strip_weights"])
def test_a_command_for_another_machine_may_ask_for_its_gpu(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch)
    check_options("tensorrt-rtx", EngineRecipe.from_dict({option: True}, "test"), here=False)


@needs_tensorrt_rtx
def test_an_engine_that_this_machine_cannot_run_is_named(rtx: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch)
    assert unusable_here(rtx, ("8.9",)) == ""
    on(monkeypatch, ADA)
    assert unusable_here(rtx, ("8.9", "12.0")) == ""
    assert "--capability 8.9" in unusable_here(rtx, ("12.0",))
    on(monkeypatch, HOPPER)
    text = unusable_here(rtx, ("8.9", "12.0"))
    assert "H200" in text
    assert "--backend tensorrt" in text
    assert unusable_here(replace(rtx, name="tensorrt"), ()) == ""


@needs_tensorrt_rtx
def test_hopper_is_refused_for_tensorrt_rtx_by_name(rtx: Backend) -> None:
    with pytest.raises(UsageError, match=r"(?s)9\.0.*Hopper.*--backend tensorrt"):
        capabilities_for("tensorrt-rtx", ("9.0",), rtx.offered_capabilities)


@pytest.mark.parametrize(("named", "gpu"), [(("8.9", "7.5"), None), ((), "7.5")])
def test_a_gpu_without_bfloat16_or_our_kernels_is_refused(
    named: tuple[str, ...], gpu: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named for TensorRT-RTX, or in the machine where the full TensorRT builds."""
    on(monkeypatch, *[GpuDevice("Tesla T4", gpu)] if gpu else [])
    check_target(named, bfloat16=False, kernels=False)
    with pytest.raises(UsageError, match=r"7\.5 has no bfloat16"):
        check_target(named, bfloat16=True, kernels=False)
    with pytest.raises(UsageError, match=r"(?s)kernels do not run on compute capability 7\.5.*--plugin none"):
        check_target(named, bfloat16=False, kernels=True)
    on(monkeypatch, ADA)
    check_target(tuple(n for n in named if n != "7.5"), bfloat16=True, kernels=True)


def test_memory_is_predicted_from_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = 16 << 30
    monkeypatch.setattr(requirements, "machine_memory", lambda: memory)
    check_room(tmp_path, 3 << 30, 40, 1)
    with pytest.raises(EngineError, match=r"(?s)not enough memory.*17\.2 GB.*4 times the weights"):
        check_room(tmp_path, 4 << 30, 40, 1)


def test_each_plan_needs_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = requirements.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(requirements.shutil, "disk_usage", lambda path: usage._replace(free=150_000_000))
    check_room(tmp_path, 100_000_000, 0, 1)
    with pytest.raises(EngineError, match="disk"):
        check_room(tmp_path, 100_000_000, 0, 2)


def test_a_containers_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"/proc/meminfo": "SwapTotal: 0 kB", "/sys/fs/cgroup/memory.max": "4096\n"}
    monkeypatch.setattr(Path, "read_text", lambda self: texts[str(self)])
    assert machine_memory() == 4096
    texts["/sys/fs/cgroup/memory.max"] = "max\n"
    without_swap = machine_memory()
    texts["/proc/meminfo"] = "SwapTotal: 8 kB"
    assert machine_memory() == without_swap + 8192


def test_a_timing_cache_is_pinned_by_its_hash(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    assert not TimingCache(EngineRecipe(timing_cache=str(path))).found
    with pytest.raises(EngineError, match="no such file"):
        TimingCache(EngineRecipe(timing_cache=str(path), timing_cache_sha256="0" * 64))
    path.write_bytes(b"timings")
    assert TimingCache(EngineRecipe(timing_cache=str(path), timing_cache_sha256=sha256(path))).found
    with pytest.raises(EngineError, match=sha256(path)):
        TimingCache(EngineRecipe(timing_cache=str(path), timing_cache_sha256="0" * 64))
    with pytest.raises(UsageError, match="without timing_cache"):
        EngineRecipe(timing_cache_sha256="0" * 64).check("test")


def test_a_timing_cache_is_to_be_written_where_it_can_be(tmp_path: Path) -> None:
    TimingCache(EngineRecipe()).check_writable()
    TimingCache(EngineRecipe(timing_cache=str(tmp_path / "cache"))).check_writable()
    for path in (tmp_path / "missing" / "cache", tmp_path):
        with pytest.raises(UsageError, match="timing_cache"):
            TimingCache(EngineRecipe(timing_cache=str(path))).check_writable()


class FakeConfig:
    """The timing cache part of IBuilderConfig, which TensorRT-RTX has only in name."""

    accepts = True

    def create_timing_cache(self, data: bytes) -> bytes:
        self.cache = data
        return data

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        return self.accepts

    def get_timing_cache(self) -> Any:
        return type("Cache", (), {"serialize": lambda self: b"new timings"})()


@needs_tensorrt_rtx
def test_a_timing_cache_is_written_once_and_named_in_the_manifest(rtx: Backend, tmp_path: Path) -> None:
    path = tmp_path / "cache"
    config = FakeConfig()
    cache = TimingCache(EngineRecipe(timing_cache=str(path)))
    cache.load(rtx, config)
    assert config.cache == b""
    assert cache.save(config) == {"timing_cache": {"file": str(path), "sha256": sha256(path)}}
    assert path.read_bytes() == b"new timings"
    path.write_bytes(b"old timings")
    again = TimingCache(EngineRecipe(timing_cache=str(path)))
    again.load(rtx, config)
    assert config.cache == b"old timings"
    again.save(config)
    assert path.read_bytes() == b"old timings"
    config.accepts = False
    with pytest.raises(EngineError, match="refuses the timing cache"):
        again.load(rtx, config)
