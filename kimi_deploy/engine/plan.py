"""One plan: a model parsed, checked and built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from kimi_deploy.engine.backend import Backend
from kimi_deploy.engine.config import TimingCache, builder_config
from kimi_deploy.engine.network import parse, raise_refusals
from kimi_deploy.engine.polygraphy_loaders import polygraphy_of
from kimi_deploy.engine.progress import Progress, deferred_interrupt, make_monitor
from kimi_deploy.engine.recipe import EngineRecipe, Shapes
from kimi_deploy.errors import EngineError


def build_plan(
    backend: Backend,
    model: tuple[bytes, Path],
    check: Callable[[Any], dict[str, int]],
    recipe: EngineRecipe,
    profiles: Mapping[str, Shapes],
    capabilities: tuple[str, ...],
    timing_cache: TimingCache,
    progress: Progress,
) -> tuple[Any, dict[str, int], dict[str, Any]]:
    """The serialised plan, its plugin layers by name, and what the manifest says of the timing cache.

    `model` is the serialised graph and the file whose folder holds its external weights; `check` gives the plugin
    layers of the parsed network, or raises EngineError for a network that is not what it should be. Raises what a
    plugin refused, and EngineError with TensorRT's messages when the graph cannot be parsed or built.
    """
    trt = backend.module
    backend.logger.errors.clear()
    builder = trt.Builder(backend.logger)
    if not builder:
        raise EngineError(f"{backend.name} cannot start a build", seen="; ".join(backend.logger.errors[-4:]))
    with progress("parsing the graph", None, "steps"):
        # the parser owns the weights until the build is done
        network, parser = parse(backend, builder, *model)
    layers = check(network)
    plan = None
    with deferred_interrupt() as interrupt, polygraphy_of(backend) as polygraphy:
        monitor = make_monitor(trt, progress, interrupt)
        config = builder_config(backend, builder, network, recipe, profiles, capabilities, monitor)
        timing_cache.load(backend, config)
        with suppress(polygraphy.error):
            plan = polygraphy.engine_bytes((builder, network, parser), config=config)
    del parser
    raise_refusals(backend)
    if plan is None:
        raise EngineError(
            f"{backend.name} {backend.version} could not build the engine",
            seen="; ".join(backend.logger.errors[-6:])[:3000] or "no message",
            fix="try --plugin none, smaller profiles, or another compute capability, and report this configuration",
        )
    return plan, layers, timing_cache.save(config)
