"""The plugins this package puts into TensorRT's process-wide registry: C++ ones from the library, or Python ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

from kimi_deploy.engine.backend import Backend
from kimi_deploy.engine.plugin import creator_class
from kimi_deploy.engine.plugin_library import PluginLibrary
from kimi_deploy.errors import EngineError
from kimi_deploy.ops.plugins import PLUGINS

PluginKind = Literal["native", "python"]
PLUGIN_KINDS: tuple[PluginKind, ...] = get_args(PluginKind)

# a creator may be registered once per process, and TensorRT does not keep Python objects alive
_creators: dict[str, dict[str, Any]] = {}
_kinds: dict[str, PluginKind] = {}


def register_plugins(backend: Backend, kind: PluginKind = "python", *, library: Path | None = None) -> None:
    """Register every plugin with the backend, once: a process has either kind for its whole life.

    native: the C++ plugins of `library`, by default the one that `make plugins` built; they log their refusals. python:
    classes made from the same specs, which keep theirs in `registered_plugins`. Raises EngineError when the other kind,
    or another library's plugin of that name, is registered, and as `PluginLibrary.open` does.
    """
    if _kinds.get(backend.name, kind) != kind:
        raise EngineError(
            f"the {_kinds[backend.name]} plugins are registered in this process already",
            seen=f"asked for: {kind}",
            fix="use one kind per process",
        )
    if kind == "native":
        # a library that this process has already is the one
        if library is not None or backend.name not in _kinds:
            PluginLibrary.open(library).register()
    else:
        _register_classes(backend)
    _kinds[backend.name] = kind


def registered_kind(backend: Backend) -> PluginKind | None:
    """The kind of plugins that this process has registered with the backend, if any."""
    return _kinds.get(backend.name)


def _register_classes(backend: Backend) -> None:
    creators = _creators.setdefault(backend.name, {})
    for name, plugin in PLUGINS.items():
        if name in creators:
            continue
        creator = creator_class(backend, plugin)()
        if not backend.registry.register_creator(creator, plugin.namespace):
            raise EngineError(
                f"a plugin {plugin.label} version {plugin.version} is registered already",
                seen="a creator that this package did not register",
                fix="do not load another library with that plugin into this process",
            )
        creators[name] = creator


def registered_plugins(backend: Backend) -> dict[str, Any]:
    """The Python creators this package registered with the backend, by op."""
    return _creators.get(backend.name, {})
