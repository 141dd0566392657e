"""The emulator reports what it exists to report: libraries built with one planted fault each must not pass."""

import numpy as np
import pytest

from kimi_deploy.errors import BackendError
from kimi_deploy.kernels.kda import KdaKernels
from kimi_deploy.kernels.library import KernelLibrary

from .build import build
from .cases import check, make_case, oracle
from .device import EmulatedDevice, run_kernel
from .sanitized import run_cases, run_sanitized
from .standard_cases import linear_attention_case, run_linear_attention


@pytest.fixture(scope="module")
def variants():
    return build("kernels-emulated", "-DKIMI_CUDA=OFF", "-DKIMI_EMULATED_TESTS=ON")


@pytest.fixture
def faulty(variants):
    def load(fault):
        library = KernelLibrary.open(variants / f"libkimi_kernels_fault_{fault}.so")
        return EmulatedDevice(KdaKernels(library))

    return load


def test_a_missing_barrier_changes_results_with_the_order_of_threads(faulty):
    device = faulty("missing_barrier")
    arrays, attributes = make_case(steps=4, heads=2)
    results = []
    for seed in (1, 2, 3):
        device.set_seed(seed)
        results.append(run_kernel(device, "prefill", arrays, attributes)["output"].view(np.uint16))
    assert not (results[0] == results[1]).all() or not (results[0] == results[2]).all()


def test_a_value_read_before_it_is_written_is_nan(faulty):
    arrays, attributes = make_case(steps=4)
    results = run_kernel(faulty("missing_barrier"), "decode", arrays, attributes)
    assert np.isnan(results["output"].astype(float)).any()


def test_a_step_read_before_it_is_staged_is_nan(faulty):
    arrays, attributes = linear_attention_case(key_dim=128, value_dim=64)
    results = run_linear_attention(faulty("missing_barrier"), arrays, attributes)
    assert np.isnan(results["output"]).any()


def test_a_barrier_that_one_thread_skips_is_reported_in_linear_attention(faulty):
    arrays, attributes = linear_attention_case()
    with pytest.raises(BackendError, match="wait for others that never come"):
        run_linear_attention(faulty("divergent_barrier"), arrays, attributes)


@pytest.mark.parametrize("mode", ["decode", "prefill"])
def test_a_barrier_that_one_thread_skips_is_reported(faulty, mode):
    arrays, attributes = make_case(steps=4)
    with pytest.raises(BackendError, match=r"wait for others that never come|meet in different operations"):
        run_kernel(faulty("divergent_barrier"), mode, arrays, attributes)


def test_an_overrun_of_shared_memory_is_reported(faulty):
    arrays, attributes = make_case(steps=64)
    with pytest.raises(BackendError, match="past the end of shared memory"):
        run_kernel(faulty("overrun_tile"), "prefill", arrays, attributes)


def test_a_swapped_index_misses_the_oracle(faulty):
    arrays, attributes = make_case(steps=20)
    results = run_kernel(faulty("swapped_index"), "prefill", arrays, attributes)
    with pytest.raises(AssertionError, match="kda_prefill_bfloat16"):
        check(results, oracle(arrays, attributes), "kda_prefill_bfloat16")


def test_sanitizers_find_nothing_and_change_nothing(variants, emulated, tmp_path):
    done = run_sanitized(variants / "libkimi_kernels_sanitized.so", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "runtime error" not in done.stderr
    run_cases(emulated, tmp_path / "plain")
    files = sorted(p.name for p in tmp_path.glob("*.npy"))
    assert files
    for name in files:
        np.testing.assert_array_equal(np.load(tmp_path / name), np.load(tmp_path / "plain" / name))


def test_address_sanitizer_names_an_overrun(variants, tmp_path):
    done = run_sanitized(variants / "libkimi_kernels_sanitized_fault_overrun_tile.so", tmp_path)
    assert done.returncode != 0
    assert "AddressSanitizer: use-after-poison" in done.stderr
