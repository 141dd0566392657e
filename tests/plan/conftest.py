"""Plans are held to processes with the library of CPU kernels as well."""

from tests.cpu_kernels.conftest import library_path

__all__ = ["library_path"]
