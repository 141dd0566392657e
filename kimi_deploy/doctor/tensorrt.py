"""The two TensorRTs, and the libraries of kernels and plugins that this project builds."""

from __future__ import annotations

from collections.abc import Callable

from kimi_deploy.cuda_driver import gpu_devices
from kimi_deploy.doctor.check import Check
from kimi_deploy.errors import KimiDeployError, install_line


def flavours() -> list[Check]:
    """Each TensorRT, loaded: a package whose libraries do not load is a problem, one that is not there may be fine."""
    from kimi_deploy.engine.backend import MODULES, installed, load

    found = []
    for name in MODULES:
        if not installed(name):
            other = any(installed(n) for n in MODULES)
            # one of the two is enough to build engines
            fix = install_line(name) + (", if you want this one too" if other else "")
            found.append(Check(name, "ok" if other else "warning", "not installed", fix))
            continue
        try:
            backend = load(name)
        except KimiDeployError as error:
            found.append(Check(name, "problem", error.seen or error.what, error.fix))
            continue
        offered = backend.offered_capabilities
        foreign = [d for d in gpu_devices() if offered and d.capability not in offered]
        fix = (
            f"it runs nothing on {foreign[0].name} ({foreign[0].capability}): use the full TensorRT" if foreign else ""
        )
        runs = f", builds for {', '.join(offered)}" if offered else ""
        found.append(Check(name, "warning" if foreign else "ok", backend.version + runs, fix))
    return found


def libraries() -> list[Check]:
    """The C libraries that `make cpu-kernels`, `make kernels` and `make plugins` build; all can be done without."""
    from kimi_deploy.engine.plugin_library import default_path as plugin_path
    from kimi_deploy.kernels.library import KernelLibrary
    from kimi_deploy.kernels.library import default_path as kernel_path

    found = [_cpu_kernels()]
    if not kernel_path("cuda").is_file():
        fix = "make kernels; without them a GPU runs the op's PyTorch reference or Triton kernels"
        found.append(Check("kernels", "warning", "not built", fix))
    else:
        found.append(_opened("kernels", lambda: str(KernelLibrary.open().path)))
    if not plugin_path().is_file():
        fix = "make plugins, for trtexec, Polygraphy and --plugin native; Python plugins need no compiler"
        found.append(Check("plugin library", "warning", "not built", fix))
    else:
        found.append(_opened("plugin library", _plugin_abis))
    return found


def _cpu_kernels() -> Check:
    from kimi_deploy.runtime.ort_kernels import MAKE, OrtKernels, default_path

    if not default_path().is_file():
        fix = f"{MAKE}, for faster steps of ONNX Runtime on the CPU; without it function bodies run"
        return Check("CPU kernels", "warning", "not built", fix)

    def describe() -> str:
        library = OrtKernels.open()
        return f"{library.path} ({library.instruction_set}): " + ", ".join(library.abis)

    return _opened("CPU kernels", describe)


def _plugin_abis() -> str:
    from kimi_deploy.engine.plugin_library import PluginLibrary

    library = PluginLibrary.open()
    return f"{library.path}: " + ", ".join(f"{op} {abi}".strip() for op, abi in library.abis.items())


def _opened(name: str, describe: Callable[[], str]) -> Check:
    """ok with what `describe` says of a library, or the error that opening it raised."""
    try:
        return Check(name, "ok", describe())
    except KimiDeployError as error:
        return Check(name, "problem", f"{error.what}; {error.seen}", error.fix)
