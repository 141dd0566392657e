"""Every custom op of the package, by ONNX name."""

from kimi_deploy.ops.kimi_delta_attention.spec import SPEC as KIMI_DELTA_ATTENTION
from kimi_deploy.ops.latent_attention.spec import SPEC as LATENT_ATTENTION
from kimi_deploy.ops.mixture_of_experts.spec import SPEC as MIXTURE_OF_EXPERTS
from kimi_deploy.ops.quantized_mixture_of_experts.spec import SPEC as QUANTIZED_MIXTURE_OF_EXPERTS
from kimi_deploy.ops.spec import OpSpec

OPS: dict[str, OpSpec] = {
    spec.name: spec
    for spec in (KIMI_DELTA_ATTENTION, LATENT_ATTENTION, MIXTURE_OF_EXPERTS, QUANTIZED_MIXTURE_OF_EXPERTS)
}
