"""The Python mirrors of the C structs have the compiler's layout, and the headers need no more than C99."""

import ctypes

from kimi_deploy.kernels.abi import (
    ABI_VERSION,
    CausalConvArguments,
    KdaArguments,
    LinearAttentionArguments,
    MoeArguments,
)

from .build import build, run

STRUCTS = {
    "KimiKdaArguments": KdaArguments,
    "KimiLinearAttentionArguments": LinearAttentionArguments,
    "KimiCausalConvArguments": CausalConvArguments,
    "KimiMoeArguments": MoeArguments,
}


def test_the_structs_have_the_layout_that_c_sees():
    folder = build("kernels-emulated", "-DKIMI_CUDA=OFF", "-DKIMI_EMULATED_TESTS=ON", targets=("kimi_abi",))
    layout = dict(line.split() for line in run(str(folder / "kimi_abi")).splitlines())
    assert int(layout.pop("version")) == ABI_VERSION
    expected = {}
    for name, mirror in STRUCTS.items():
        expected[f"{name}.sizeof"] = str(ctypes.sizeof(mirror))
        expected |= {f"{name}.{field}": str(getattr(mirror, field).offset) for field, _ in mirror._fields_}
    assert layout == expected
