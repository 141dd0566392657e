"""A command that needs a package which is not installed says how to install it, before it works."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from kimi_deploy.errors import BackendError
from kimi_deploy.optional_packages import INSTALL, require_packages

ROOT = Path(__file__).parents[2]
DEMO = str(ROOT / "models" / "demo")

# as if the package were not installed: neither found nor imported
WITHOUT = """
import sys
from importlib.abc import MetaPathFinder

class Missing(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name.split(".")[0] in MISSING else found(name, package)
from kimi_deploy.cli.main import main
main()
"""

COMMANDS = {
    "torch": [["export", DEMO, "-o", "OUT"], ["validate", DEMO, "EXPORT"]],
    "matplotlib": [["plan", "tiny", "--chart", "OUT"], ["bench", DEMO, "EXPORT", "--plot", "OUT"]],
}


@pytest.mark.parametrize(("package", "arguments"), [(p, a) for p, calls in COMMANDS.items() for a in calls])
def test_a_missing_package_is_named_with_its_pip_line(package: str, arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()
    places = {"OUT": str(tmp_path / "out"), "EXPORT": str(tmp_path / "export")}
    words = [places.get(a, a) for a in arguments]
    code = f"MISSING = {{{package!r}}}\n{WITHOUT}"
    done = subprocess.run(
        [sys.executable, "-c", code, *words, "--json"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads(done.stdout)["fix"] == INSTALL[package]
    assert [p.name for p in tmp_path.iterdir()] == ["export"]


def test_all_missing_packages_are_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kimi_deploy.optional_packages.find_spec", lambda name: None)
    with pytest.raises(BackendError, match="torch and llama_cpp, which are not installed") as error:
        require_packages("torch", "llama_cpp")
    assert INSTALL["torch"] in error.value.fix
    assert INSTALL["llama_cpp"] in error.value.fix


def test_pip_lines_name_what_the_project_declares() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for line in INSTALL.values():
        words = line.replace("'", "").split()
        assert all(word[2:-1] in extras for word in words if word.startswith(".["))
    assert INSTALL["transformers"].split()[-1] in extras["dev"]
