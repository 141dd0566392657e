"""Python packages, PyTorch's GPU support and ONNX Runtime's providers."""

from __future__ import annotations

from kimi_deploy.cuda_driver import gpu_devices
from kimi_deploy.doctor.check import Check, Status, installed_version
from kimi_deploy.errors import install_line


def packages() -> list[Check]:
    wanted = (
        ("onnx", "", "everything needs it"),
        ("onnx-ir", "", "everything needs it"),
        ("polygraphy", "tensorrt-rtx", "build-engine needs it"),
        ("triton", "triton", "GPU kernels of the source model use it"),
    )
    found = []
    for package, extra, use in wanted:
        version = installed_version(package)
        missing: Status = "warning" if extra else "problem"
        install = install_line(extra) if extra else "pip install . in the root of a clone of kimi-deploy"
        fix = "" if version else f"{install} ({use})"
        found.append(Check(package, "ok" if version else missing, version or "not installed", fix))
    return found


def torch() -> list[Check]:
    version = installed_version("torch")
    if version is None:
        fix = f"{install_line('torch')} (export and validate need it; generate with ONNX Runtime does not)"
        return [Check("torch", "warning", "not installed", fix)]
    if not gpu_devices():
        return [Check("torch", "ok", version)]
    from torch import cuda

    if cuda.is_available():
        return [Check("torch", "ok", f"{version}, sees {cuda.device_count()} GPUs")]
    fix = "it computes on the CPU only: install PyTorch for CUDA to use this machine's GPU"
    return [Check("torch", "warning", f"{version}, sees no GPU", fix)]


def onnxruntime() -> list[Check]:
    import onnxruntime

    providers = onnxruntime.get_available_providers()
    seen = f"{onnxruntime.__version__}: {', '.join(providers)}"
    if "CUDAExecutionProvider" in providers or not gpu_devices():
        return [Check("onnxruntime", "ok", seen)]
    fix = "for --provider cuda: pip uninstall onnxruntime; pip install onnxruntime-gpu"
    return [Check("onnxruntime", "warning", seen, fix)]
