"""The CUDA kernels' C ABI (`plugins/kernels/kimi_*.h`) from Python, on CUDA tensors or, emulated, on host arrays.

`library.KernelLibrary.open()` loads the library, `kda.KdaKernels` runs our op on whole arrays,
`standard.StandardKernels` the standard's; `abi` mirrors the headers.
"""
