"""Polygraphy's loaders for one TensorRT: how a config is made and a network built.

Not its loader for networks: it parses a graph that was changed in memory only where the weights are inside it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from kimi_deploy.engine.backend import Backend
from kimi_deploy.engine.recipe import Shapes
from kimi_deploy.errors import BackendError, EngineError, install_line


@dataclass(frozen=True)
class Polygraphy:
    """The loaders: `create_config` is CreateConfig or CreateConfigRTX, `error` what they raise."""

    create_config: Callable[..., Any]
    engine_bytes: Callable[..., Any]
    profile_class: Callable[[], Any]
    error: type[Exception]

    def profile(self, shapes: Shapes) -> Any:
        """A profile from the smallest, likeliest and largest shape of every input."""
        profile = self.profile_class()
        for name, (smallest, likely, largest) in shapes.items():
            profile.add(name, smallest, likely, largest)
        return profile


@contextmanager
def polygraphy_of(backend: Backend) -> Iterator[Polygraphy]:
    """Polygraphy's loaders for `backend`, without what they print.

    Raises BackendError where Polygraphy is not installed, EngineError where this process uses it with the other
    TensorRT: it takes one when it is imported.
    """
    try:
        from polygraphy import config
        from polygraphy.exception import PolygraphyException
        from polygraphy.logger import G_LOGGER
    except ImportError as error:
        raise BackendError(
            "building an engine needs Polygraphy", seen=str(error), fix=install_line(backend.name)
        ) from error
    rtx = backend.name == "tensorrt-rtx"
    if "polygraphy.backend.trt" in sys.modules and rtx != config.USE_TENSORRT_RTX:
        raise EngineError(
            "Polygraphy is in use with the other TensorRT in this process",
            seen=f"polygraphy.config.USE_TENSORRT_RTX = {config.USE_TENSORRT_RTX}",
            fix="build with one TensorRT per process",
        )
    # what the variable POLYGRAPHY_USE_TENSORRT_RTX sets
    config.USE_TENSORRT_RTX = rtx
    # it logs to standard output; errors come as exceptions and in TensorRT's log
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):
        from polygraphy.backend import trt

        create_config = trt.CreateConfig
        if rtx:
            from polygraphy.backend import tensorrt_rtx

            create_config = tensorrt_rtx.CreateConfigRTX
        yield Polygraphy(create_config, trt.engine_bytes_from_network, trt.Profile, PolygraphyException)
