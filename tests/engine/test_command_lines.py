"""The printed command lines of other tools: Polygraphy's is run for real, trtexec's is read as trtexec reads it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner

from kimi_deploy.cli.main import cli
from kimi_deploy.engine import command_lines
from kimi_deploy.engine.engine_from_onnx import graph_for
from kimi_deploy.engine.network import Graph
from kimi_deploy.engine.recipe import EngineRecipe
from kimi_deploy.errors import BackendError, EngineError, KimiDeployError, ManifestError, UsageError
from kimi_deploy.manifest import sha256
from tests.capabilities import needs_tensorrt_rtx
from tests.engine.conftest import RECIPE
from tests.engine.polygraphy_config import SHAPES

SIZES = (
    "--prefill=sequence=1:8:32,batch=1:1:2,capacity=1:64:64,num_logits=1:1:4",
    "--decode=batch=1:1:2,capacity=1:64:64",
)

RTX = ("--backend", "tensorrt-rtx", "--capability", "8.9")


def printed(export: Path, output: Path, graph: Path, *options: str) -> list[list[str]]:
    arguments = ["build-engine", str(export), "-o", str(output), "--save-onnx", str(graph), "--plugin", "none"]
    done = CliRunner().invoke(cli, [*arguments, *SIZES, *options])
    assert done.exit_code == 0, done.output
    return [shlex.split(line) for line in done.stdout.splitlines()]


def run_as_printed(commands: list[list[str]]) -> subprocess.CompletedProcess[str]:
    """All of them in one shell that finds the polygraphy of this environment."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    script = "\n".join(shlex.join(words) for words in commands)
    return subprocess.run(
        ["sh", "-s"], input=script, capture_output=True, text=True, check=False, env=os.environ | {"PATH": path}
    )


@needs_tensorrt_rtx
def test_the_polygraphy_command_builds_the_same_engine(export: Path, plain_engine: Path, tmp_path: Path) -> None:
    """Bit for bit no two builds are equal; the size and the whole text of the plan's tensor names are."""
    output = tmp_path / "engine"
    commands = printed(export, output, tmp_path / "graph", *RTX, "--print-polygraphy")
    assert [words[0] for words in commands] == ["set", "mkdir", "env"]
    assert not output.exists(), "printing builds nothing"
    done = run_as_printed(commands)
    assert done.returncode == 0, done.stdout + done.stderr
    seen, expected = ((folder / "engine.plan").read_bytes() for folder in (output, plain_engine))
    assert len(seen) == len(expected)
    assert seen.count(b"past_key_values") == expected.count(b"past_key_values") > 0


@needs_tensorrt_rtx
@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_the_polygraphy_command_makes_the_config_of_a_build(backend: str) -> None:
    """Flag by flag, as Polygraphy's own parser reads the command: also what its config leaves on, such as TF32."""
    command = [sys.executable, "-m", "tests.engine.polygraphy_config", backend]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    compared = json.loads(done.stdout)
    assert {recipe["tf32"] for recipe, *_ in compared} == {True, False}
    for recipe, theirs, ours, profiles in compared:
        assert theirs == ours, recipe
        assert ("TF32" in theirs["flags"]) == recipe["tf32"]
        assert profiles == [{n: [list(s) for s in shapes] for n, shapes in p.items()} for p in SHAPES.values()]


@pytest.mark.parametrize("chosen", ["tensorrt", "tensorrt-rtx"])
def test_the_polygraphy_command_is_of_the_tensorrt_that_a_build_takes(
    export: Path, tmp_path: Path, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kimi_deploy.engine.backend.choose", lambda choice: chosen)
    capability = ("--capability", "8.9") * (chosen == "tensorrt-rtx")
    *_, words = printed(export, tmp_path / "engine", tmp_path / "graph", "--print-polygraphy", *capability)
    assert ("POLYGRAPHY_USE_TENSORRT_RTX=1" in words) == (chosen == "tensorrt-rtx")
    assert ("--compute-capabilities" in words) == (chosen == "tensorrt-rtx")


def test_the_saved_graph_is_whole_and_leaves_the_export_readable(export: Path, tmp_path: Path) -> None:
    printed(export, tmp_path / "engine", tmp_path / "graph", "--print-trtexec")
    assert sorted(p.name for p in (tmp_path / "graph").iterdir()) == ["model.onnx", "weights.bin"]
    # weights with a second name are refused by onnx_ir
    for folder in (export, tmp_path / "graph"):
        for value in ir.load(folder / "model.onnx").graph.initializers.values():
            assert value.const_value is not None
            value.const_value.numpy()
    # also by the opset that the full TensorRT has, which is older than the export's
    onnx.checker.check_model(tmp_path / "graph" / "model.onnx", full_check=True)
    model = onnx.load(tmp_path / "graph" / "model.onnx", load_external_data=False)
    assert {o.version for part in (model, *model.functions) for o in part.opset_import if not o.domain} == {25}
    nodes = model.graph.node
    custom = [n for n in nodes if n.domain == "kimi"]
    assert custom
    assert not any(a.name == "plugin_namespace" for n in custom for a in n.attribute)


@pytest.fixture(scope="module")
def graph(export: Path) -> Graph:
    return graph_for(export, replace(RECIPE, plugin="none"))


def test_trtexec_gets_every_profile_right_behind_its_number(graph: Graph) -> None:
    (words,) = command_lines.trtexec(
        RECIPE, RECIPE.shapes_of_plans(graph.contract), Path("g/model.onnx"), Path("out"), None
    )
    for index, (name, profile) in enumerate(RECIPE.profiles.items()):
        at = words.index(f"--profile={index}")
        shapes = profile.shapes(graph.contract)
        for bound, option in enumerate(("--minShapes", "--optShapes", "--maxShapes")):
            given, _, text = words[at + 1 + bound].partition("=")
            assert given == option, name
            parsed = dict(part.rsplit(":", 1) for part in text.split(","))
            assert {n: tuple(map(int, d.split("x"))) for n, d in parsed.items()} == {
                n: s[bound] for n, s in shapes.items()
            }
    assert words[:3] == ["trtexec", "--onnx=g/model.onnx", "--saveEngine=out/engine.plan"]
    assert "--noTF32" in words


def test_every_option_of_a_recipe_has_its_word(graph: Graph) -> None:
    recipe = EngineRecipe(
        plans="two",
        optimization_level=5,
        workspace_mib=64,
        tactic_shared_memory_kib=48,
        tf32=True,
        in_place_state=True,
        version_compatible=True,
        hardware_compatibility="ampere+",
        refit=True,
        strip_weights=True,
        profiling_verbosity="detailed",
        timing_cache="cache",
    )
    arguments = (recipe, recipe.shapes_of_plans(graph.contract), Path("g.onnx"), Path("out"), Path("lib.so"))
    trtexec = [words for words in command_lines.trtexec(*arguments) if words[0] == "trtexec"]
    assert [w[2] for w in trtexec] == ["--saveEngine=out/engine.plan", "--saveEngine=out/decode.plan"]
    assert {w.count("--profile=0") for w in trtexec} == {1}
    assert set(trtexec[0]) >= {
        "--builderOptimizationLevel=5",
        "--memPoolSize=workspace:64M,tacticSharedMem:48K",
        "--preview=+aliasedPluginIO1003,-runtimeActivationResize",
        "--versionCompatible",
        "--hardwareCompatibilityLevel=ampere+",
        "--refit",
        "--stripWeights",
        "--profilingVerbosity=detailed",
        "--timingCacheFile=cache",
        "--staticPlugins=lib.so",
    }
    assert "--noTF32" not in trtexec[0]
    polygraphy = command_lines.polygraphy(*arguments, "tensorrt", ())
    assert polygraphy[0][:4] == ["python", "-m", "kimi_deploy.engine.polygraphy_tools", "convert"]
    text = " ".join(polygraphy[0])
    for words in (
        "--builder-optimization-level 5",
        "--pool-limit workspace:64M tactic_shared_memory:48K",
        "--preview-features aliased_plugin_io_10_03",
        "--version-compatible",
        "--hardware-compatibility-level ampere_plus",
        "--refittable",
        "--strip-plan",
        "--profiling-verbosity detailed",
        "--save-timing-cache cache",
        "--plugins lib.so",
        "--tf32",
    ):
        assert words in text


def test_a_timing_cache_is_read_and_written_as_by_a_build(graph: Graph, tmp_path: Path) -> None:
    """Written by the first plan where it is not there, and never changed where it is."""
    cache = tmp_path / "cache"
    recipe = EngineRecipe(plans="two", timing_cache=str(cache))
    arguments = (recipe, recipe.shapes_of_plans(graph.contract), Path("g.onnx"), Path("out"), None)
    first, copy, second = command_lines.trtexec(*arguments)
    assert f"--timingCacheFile={cache}" in first
    assert copy == ["cp", str(cache), "out/decode.plan.timing_cache"]
    assert "--timingCacheFile=out/decode.plan.timing_cache" in second
    first, second = command_lines.polygraphy(*arguments, "tensorrt", ())
    assert first[first.index("--save-timing-cache") + 1] == str(cache)
    assert "--load-timing-cache" not in first
    assert second[second.index("--load-timing-cache") + 1] == str(cache)
    assert "--save-timing-cache" not in second
    cache.write_bytes(b"timings")
    assert command_lines.trtexec(*arguments)[0] == ["cp", str(cache), "out/engine.plan.timing_cache"]
    for words in command_lines.polygraphy(*arguments, "tensorrt", ()):
        assert words[words.index("--load-timing-cache") + 1] == str(cache)
        assert "--save-timing-cache" not in words


def test_a_pinned_timing_cache_stops_the_commands_when_it_changes(graph: Graph, tmp_path: Path) -> None:
    cache = tmp_path / "the cache"
    cache.write_bytes(b"timings")
    recipe = EngineRecipe(timing_cache=str(cache), timing_cache_sha256=sha256(cache))
    arguments = (recipe, recipe.shapes_of_plans(graph.contract), Path("g.onnx"), Path("out"), None)
    for commands in (command_lines.trtexec(*arguments), command_lines.polygraphy(*arguments, "tensorrt", ())):
        script = [["set", "-e"], commands[0], ["echo", "goes on"]]
        assert run_as_printed(script).stdout == "goes on\n"
        cache.write_bytes(b"others")
        assert "goes on" not in run_as_printed(script).stdout
        cache.write_bytes(b"timings")
    cache.write_bytes(b"others")
    with pytest.raises(EngineError, match="not the recipe's"):
        command_lines.trtexec(*arguments)


@needs_tensorrt_rtx
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--print-polygraphy", "--timing-cache", "cache"), "timing_cache is not possible"),
        (("--print-polygraphy", "--version-compatible"), "version_compatible is not possible"),
        (("--print-polygraphy", "--capability", "9.0"), "9.0"),
        (("--print-trtexec",), "trtexec is of the full TensorRT"),
        (("--print-trtexec", "--print-polygraphy", "--backend", "tensorrt"), "two tools that write the same plan"),
        (("--print-trtexec", "--backend", "tensorrt", "--capability", "8.9"), "for the GPU of this machine"),
    ],
)
def test_what_a_build_refuses_is_not_printed(export: Path, tmp_path: Path, options: tuple[str, ...], says: str) -> None:
    arguments = ["build-engine", str(export), "-o", str(tmp_path / "engine"), "--save-onnx", str(tmp_path / "graph")]
    done = CliRunner().invoke(cli, [*arguments, "--plugin", "none", "--backend", "tensorrt-rtx", *options])
    assert isinstance(done.exception, KimiDeployError)
    assert says in str(done.exception)
    assert not (tmp_path / "graph").exists()


@pytest.mark.parametrize("name", ["weights.bin", "model.onnx"])
@pytest.mark.parametrize("damage", ["changed", "cut"])
def test_commands_of_a_damaged_export_are_not_printed(export: Path, tmp_path: Path, name: str, damage: str) -> None:
    damaged = Path(shutil.copytree(export, tmp_path / "damaged"))
    data = bytearray((damaged / name).read_bytes())
    data[1000] ^= 1
    (damaged / name).write_bytes(data if damage == "changed" else data[:-1])
    arguments = ["build-engine", str(damaged), "-o", str(tmp_path / "engine"), "--save-onnx", str(tmp_path / "graph")]
    done = CliRunner().invoke(cli, [*arguments, "--plugin", "none", "--print-trtexec"])
    assert isinstance(done.exception, ManifestError)
    assert name in str(done.exception)
    assert done.stdout == ""
    assert not (tmp_path / "graph").exists()


def test_commands_without_a_graph_or_a_plugin_library_are_refused(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["build-engine", str(export), "-o", str(tmp_path / "engine"), "--print-trtexec"]
    assert isinstance(CliRunner().invoke(cli, arguments).exception, UsageError)
    monkeypatch.setattr("kimi_deploy.engine.plugin_library.default_path", lambda: tmp_path / "none.so")
    done = CliRunner().invoke(cli, [*arguments, "--save-onnx", str(tmp_path / "graph")])
    assert isinstance(done.exception, BackendError)
    assert "make plugins" in str(done.exception)
    assert not (tmp_path / "graph").exists()
