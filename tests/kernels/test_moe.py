"""The MixtureOfExperts kernels against the op's reference in float64: routing, few tokens, many, and refusals."""

import numpy as np
import pytest

from kimi_deploy.errors import ContractError
from kimi_deploy.kernels.moe import MoeKernels, moe_arguments

from .moe_cases import check_moe, moe_case, run_moe

FEW = 8
DTYPES = ("float32", "float16", "bfloat16")


@pytest.mark.parametrize("steps", [1, 3, FEW, FEW + 1, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_few_and_many_tokens(device, steps, dtype):
    """40 tokens fill no tile; sizes that no tile and no warp divides."""
    arrays, attributes = moe_case(steps=steps, hidden=88, inner=40, dtype=dtype, seed=steps)
    check_moe(run_moe(device, arrays, attributes), arrays, attributes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_with_more_tokens_than_a_tile_and_with_none(device, dtype):
    arrays, attributes = moe_case(batch=3, steps=50, experts=12, top_k=1, dtype=dtype)
    arrays["router_bias"][0] = 1.0  # most tokens
    arrays["router_bias"][[1, 11]] = -2.0  # none
    check_moe(run_moe(device, arrays, attributes), arrays, attributes)


@pytest.mark.parametrize("steps", [2, 12])
@pytest.mark.parametrize("renormalize", [0, 1])
@pytest.mark.parametrize(
    ("experts", "top_k", "groups", "kept"),
    [(16, 4, 4, 2), (16, 1, 8, 1), (16, 8, 4, 3), (8, 8, 1, 1), (64, 8, 8, 4), (6, 3, 6, 3), (70, 32, 1, 1)],
)
def test_routing(device, experts, top_k, groups, kept, renormalize, steps):
    """Groups of one expert, all experts, more experts than a warp has lanes, every lane with a choice."""
    arrays, attributes = moe_case(
        steps=steps,
        experts=experts,
        top_k=top_k,
        groups=groups,
        kept_groups=kept,
        renormalize=renormalize,
        hidden=32,
        inner=8,
        seed=experts + top_k,
    )
    if groups == experts:
        # a group's sum of two is its one expert's score; the reference wants two
        ungrouped = attributes | {"n_group": 1, "topk_group": 1}
        check_moe(run_moe(device, arrays, attributes), arrays, ungrouped)
    else:
        check_moe(run_moe(device, arrays, attributes), arrays, attributes)


@pytest.mark.parametrize("steps", [1, 20])
def test_of_equal_scores_the_lower_index_is_chosen(device, steps):
    """Saturated sigmoids make equal scores; groups and experts alike."""
    arrays, attributes = moe_case(steps=steps, experts=8, top_k=3, groups=4, kept_groups=2)
    arrays["router_weight"][:] = 0
    arrays["router_bias"][:] = 0
    expected = run_moe(device, arrays, attributes)
    arrays["down_weight"][4:] = np.nan  # experts of the groups that lost
    arrays["down_weight"][3] = np.nan
    np.testing.assert_array_equal(run_moe(device, arrays, attributes), expected)


@pytest.mark.parametrize("steps", [1, 20])
@pytest.mark.parametrize("where", ["hidden_states", "router_weight", "down_weight"])
def test_a_nan_shows_and_stays_with_its_token(device, where, steps):
    arrays, attributes = moe_case(steps=steps + 1, dtype="float16")
    expected = run_moe(device, arrays, attributes)
    if where == "hidden_states":
        arrays[where][0, 0, 5] = np.nan
        result = run_moe(device, arrays, attributes)
        assert np.isnan(result[0, 0]).all()
        assert result[0, 1:].tobytes() == expected[0, 1:].tobytes()
    else:
        arrays[where][0 if where == "router_weight" else slice(None)] = np.nan
        assert np.isnan(run_moe(device, arrays, attributes)).all()


@pytest.mark.parametrize("steps", [2, 30])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_order_of_threads_gives_the_same_bits(device, steps, dtype):
    arrays, attributes = moe_case(steps=steps, dtype=dtype, groups=2, kept_groups=1)
    device.set_seed(1)
    first = run_moe(device, arrays, attributes)
    for seed in (2, 3):
        device.set_seed(seed)
        assert run_moe(device, arrays, attributes).tobytes() == first.tobytes()
    device.set_seed(1)


def test_a_token_does_not_depend_on_the_others(device):
    """Bit for bit among many tokens, wherever it lies in its expert's tiles."""
    arrays, attributes = moe_case(steps=90, experts=4, dtype="bfloat16")
    whole = run_moe(device, arrays, attributes)
    part = arrays | {"hidden_states": np.ascontiguousarray(arrays["hidden_states"][:, 40:60])}
    assert run_moe(device, part, attributes).tobytes() == np.ascontiguousarray(whole[:, 40:60]).tobytes()


@pytest.mark.parametrize(("hidden", "inner"), [(64, 32), (8, 256)])
def test_the_workspace_grows_with_the_tokens(emulated, hidden, inner):
    sizes = []
    for steps in (1, 2, FEW, FEW + 1, FEW + 2, 100):
        arrays, attributes = moe_case(steps=steps, hidden=hidden, inner=inner, dtype="float16")
        arrays["output"] = arrays["hidden_states"]
        sizes.append(MoeKernels(emulated.kernels.library).workspace_size(arrays, attributes))
    assert sizes == sorted(sizes)


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({"struct_size": 8}, "abi", "struct_size is 8"),
        ({"data_type": 3}, "dtype", "data_type is 3"),
        ({"tokens": -1}, "shape", "tokens -1"),
        ({"hidden": 12}, "shape", "hidden 12"),
        ({"intermediate": 0}, "shape", "intermediate 0"),
        ({"num_experts": 1025}, "shape", "num_experts is 1025"),
        ({"n_group": 3}, "shape", "n_group is 3"),
        ({"topk_group": 2}, "shape", "topk_group 2"),
        ({"top_k": 9}, "shape", "top_k is 9"),
        ({"n_group": 4, "top_k": 3}, "shape", "2 experts"),
        ({"renormalize": 2}, "argument", "renormalize is 2"),
        ({"routed_scaling_factor": float("nan")}, "argument", "routed_scaling_factor is nan"),
        ({"tokens": 1 << 23, "top_k": 2}, "shape", "fewer tokens"),
        ({"output": None}, "argument", "output is null"),
        ({"workspace_size": 100}, "workspace", "100 bytes"),
        ({"workspace": None}, "workspace", "0 bytes"),
    ],
)
def test_what_the_kernels_cannot_run_is_refused(emulated, fields, status, message):
    arrays, attributes = moe_case()
    arrays["output"] = np.full_like(arrays["hidden_states"], np.nan)
    arguments = moe_arguments(arrays, attributes)
    size = MoeKernels(emulated.kernels.library).workspace_size(arrays, attributes)
    workspace = np.zeros(size + 64, np.uint8)
    start = -workspace.ctypes.data % 64
    arguments.workspace, arguments.workspace_size = workspace.ctypes.data + start, workspace.size - 64
    for name, value in fields.items():
        setattr(arguments, name, value)
    with pytest.raises(ContractError) as error:
        emulated.kernels.library.call("kimi_moe", arguments)
    assert f"({status})" in error.value.what
    assert message in error.value.seen
    assert np.isnan(arrays["output"]).all()


def test_no_tokens_are_no_work(emulated):
    arrays, attributes = moe_case(steps=0)
    arrays["output"] = arrays["hidden_states"].copy()
    kernels = MoeKernels(emulated.kernels.library)
    assert kernels.workspace_size(arrays, attributes) == 0
    kernels.run(arrays, attributes)
