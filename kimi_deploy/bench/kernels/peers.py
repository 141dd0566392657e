"""Other projects' kernels, each where its package is installed, called as its own documentation says."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from kimi_deploy.bench.kernels.cases import HEAD_DIM, Case
from kimi_deploy.bench.kernels.inputs import LOWER_BOUND, NORM_EPS, Tensors, attributes_of, packed
from kimi_deploy.bench.kernels.providers import Provider, Run
from kimi_deploy.ops.kimi_delta_attention.reference import causal_conv_silu

FLA_COMPILES_PER = ("kind", "gate", "ragged", "heads")


def core_inputs(case: Case, tensors: Tensors, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """q, k, v [batch, steps, heads, dim] after the convolution, rounded to bfloat16 and then in `dtype`."""
    mixed, _ = causal_conv_silu(
        tensors["qkv"].float(), tensors["conv_weight"].float(), tensors["past_conv_state"].float()
    )
    parts = mixed.to(torch.bfloat16).to(dtype).chunk(3, dim=-1)
    return {name: x.unflatten(-1, (case.heads, HEAD_DIM)).contiguous() for name, x in zip("qkv", parts, strict=True)}


def _core_arguments(case: Case, tensors: Tensors) -> tuple[Tensors, torch.Tensor | None]:
    """q, k, v, raw gate and beta logits, packed if ragged, and cu_seqlens."""
    whole = core_inputs(case, tensors)
    rows = {name: x.flatten(-2) for name, x in whole.items()}
    offsets = None
    given = tensors
    if case.ragged:
        joined, offsets = packed(case, {**tensors, "qkv": torch.cat([rows[n] for n in "qkv"], dim=-1)})
        rows = dict(zip("qkv", (x.contiguous() for x in joined["qkv"].chunk(3, dim=-1)), strict=True))
        given = joined
    arguments = {name: x.unflatten(-1, (case.heads, HEAD_DIM)) for name, x in rows.items()}
    arguments["g"] = given["decay"].unflatten(-1, (case.heads, HEAD_DIM))
    arguments["beta"] = given["beta"]
    return arguments, offsets


def _fla_delta_rule(case: Case, tensors: Tensors, offsets: torch.Tensor | None) -> Any:
    """fla's call for this case as a function of q, k, v, g and beta. The bounded gate is its `safe_gate`."""
    from fla.ops.kda import chunk_kda, fused_recurrent_kda

    options: dict[str, Any] = {
        "scale": HEAD_DIM**-0.5,
        "initial_state": tensors["past_recurrent_state"],
        "output_final_state": True,
        "use_qk_l2norm_in_kernel": True,
        "use_gate_in_kernel": True,
        "use_beta_sigmoid_in_kernel": True,
        "A_log": tensors["A_log"],
        "dt_bias": tensors["dt_bias"],
        "lower_bound": LOWER_BOUND if case.gate == "bounded" else None,
    }
    if offsets is not None:
        options["cu_seqlens"] = offsets.long()
        options["cu_seqlens_cpu"] = offsets.long().cpu()
    if case.kind == "prefill":
        options["safe_gate"] = case.gate == "bounded"
    else:
        options.pop("cu_seqlens_cpu", None)
    call = chunk_kda if case.kind == "prefill" else fused_recurrent_kda
    return lambda **x: call(**x, **options)


def _no_idle_rows(case: Case) -> str:
    return "rows without steps" if case.ragged and case.kind == "decode" else ""


def fla_core_provider() -> Provider:
    """fla's delta rule with its gate, norms and beta inside, on q, k and v after the convolution."""
    import fla.ops.kda  # noqa: F401

    def prepare(case: Case, tensors: Tensors) -> Run:
        arguments, offsets = _core_arguments(case, tensors)
        call = _fla_delta_rule(case, tensors, offsets)

        @torch.inference_mode()
        def run() -> tuple[torch.Tensor, torch.Tensor]:
            o, state = call(**arguments)
            return o.flatten(-2), state

        return run

    return Provider("fla core", "core", _no_idle_rows, prepare, peer=True, compiles_per=FLA_COMPILES_PER)


def fla_op_provider() -> Provider:
    """The same op as a layer of fla runs it: three convolutions with state, delta rule, gated norm."""
    from fla.modules.causal_conv1d import causal_conv1d, causal_conv1d_update
    from fla.modules.norm.fused_norm_gate import rms_norm_gated

    def prepare(case: Case, tensors: Tensors) -> Run:
        given, offsets = packed(case, tensors) if case.ragged else (tensors, None)
        call = _fla_delta_rule(case, tensors, offsets)
        split = (case.heads, HEAD_DIM)
        inputs = [x.contiguous() for x in given["qkv"].chunk(3, dim=-1)]
        weights = [x.contiguous() for x in given["conv_weight"].chunk(3)]
        # fla keeps as many columns as the filter has, the oldest unused
        caches = [F.pad(x, (1, 0)).contiguous() for x in given["past_conv_state"].chunk(3, dim=1)]
        gate, decay = given["output_gate"].unflatten(-1, split), given["decay"].unflatten(-1, split)
        beta, norm_weight = given["beta"], given["norm_weight"]
        long_offsets = None if offsets is None else offsets.long()

        @torch.inference_mode()
        def run() -> tuple[torch.Tensor, torch.Tensor]:
            mixed = []
            for x, weight, cache in zip(inputs, weights, caches, strict=True):
                if case.kind == "decode":
                    y, _ = causal_conv1d_update(x=x, cache=cache, weight=weight, activation="silu")
                else:
                    y, _ = causal_conv1d(
                        x=x,
                        weight=weight,
                        initial_state=cache,
                        output_final_state=True,
                        activation="silu",
                        cu_seqlens=long_offsets,
                    )
                mixed.append(y.unflatten(-1, split))
            q, k, v = mixed
            o, state = call(q=q, k=k, v=v, g=decay, beta=beta)
            o = rms_norm_gated(o, gate, norm_weight, None, activation="sigmoid", eps=NORM_EPS)
            return o.flatten(-2), state

        return run

    return Provider("fla", "op", _no_idle_rows, prepare, peer=True, compiles_per=FLA_COMPILES_PER)


def flash_kda_provider() -> Provider:
    """FlashKDA's prefill; it keeps states with the value first."""
    import flash_kda

    def refuses(case: Case) -> str:
        if case.kind == "decode":
            return "prefill only"
        return "" if case.gate == "bounded" else "bounded gate only"

    def prepare(case: Case, tensors: Tensors) -> Run:
        x, offsets = _core_arguments(case, tensors)
        initial = tensors["past_recurrent_state"].mT.contiguous()
        final, output = torch.empty_like(initial), torch.empty_like(x["v"])
        options = {} if offsets is None else {"cu_seqlens": offsets.long()}

        @torch.inference_mode()
        def run() -> tuple[torch.Tensor, torch.Tensor]:
            flash_kda.fwd(
                x["q"],
                x["k"],
                x["v"],
                x["g"],
                x["beta"],
                float(attributes_of(case)["scale"]),
                output,
                A_log=tensors["A_log"],
                dt_bias=tensors["dt_bias"].view(case.heads, HEAD_DIM),
                lower_bound=LOWER_BOUND,
                initial_state=initial,
                final_state=final,
                **options,
            )
            return output.flatten(-2), final.mT

        return run

    return Provider("FlashKDA", "core", refuses, prepare, peer=True)


def flashinfer_provider() -> Provider:
    """FlashInfer's recurrent_kda, which writes its state in place, the value first."""
    from flashinfer.kda import recurrent_kda

    def refuses(case: Case) -> str:
        capability = torch.cuda.get_device_capability()
        return "" if capability[0] == 10 else f"made for compute capability 10, this device has {capability[0]}"

    def prepare(case: Case, tensors: Tensors) -> Run:
        x, offsets = _core_arguments(case, tensors)
        state, output = tensors["past_recurrent_state"].mT.contiguous(), torch.empty_like(x["v"])

        @torch.inference_mode()
        def run() -> tuple[torch.Tensor, torch.Tensor]:
            recurrent_kda(
                **x,
                A_log=tensors["A_log"],
                dt_bias=tensors["dt_bias"].view(case.heads, HEAD_DIM),
                scale=float(attributes_of(case)["scale"]),
                initial_state=state,
                output=output,
                output_final_state=False,
                use_qk_l2norm_in_kernel=True,
                use_gate_in_kernel=True,
                lower_bound=LOWER_BOUND if case.gate == "bounded" else None,
                cu_seqlens=offsets,
                beta_is_logit=True,
            )
            return output.flatten(-2), state.mT

        return run

    return Provider("FlashInfer", "core", refuses, prepare, peer=True)
