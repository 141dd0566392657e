"""The reference follows a candidate's expert choices on near ties, and nowhere else."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kimi_deploy.runtime.ort_runner import OrtRunner
from kimi_deploy.runtime.torch_runner import TorchRunner
from kimi_deploy.text.tokenizer import load_tokenizer
from kimi_deploy.validate.compare import compare
from kimi_deploy.validate.observation import Observation, observe, run_in_pieces
from kimi_deploy.validate.prompts import shipped_prompts
from kimi_deploy.validate.reference import Reference
from kimi_deploy.validate.routing import near_ties
from kimi_deploy.validate.run import Settings, validate_export
from kimi_deploy.validate.tolerances import tolerance
from tests.configs import config
from tests.graph.conftest import no_progress

BOUND = tolerance("graph_float16")


def test_only_exchanges_within_the_gap_are_near_ties() -> None:
    scores = np.array([0.9, 0.500, 0.499, 0.1])
    plain = config(num_experts=4, num_experts_per_token=2)
    assert near_ties(scores, plain, 0.01) == {frozenset({0, 2}): pytest.approx(0.001)}
    assert near_ties(scores, plain, 0.0005) == {}
    assert set(near_ties(scores, plain, 0.5)) == {frozenset({0, 2}), frozenset({0, 3}), frozenset({1, 2})}


def test_a_group_is_exchanged_as_a_whole() -> None:
    # groups {0, 1} and {2, 3}: sums 1.000 and 0.999
    scores = np.array([0.6, 0.4, 0.599, 0.4])
    grouped = config(num_experts=4, num_experts_per_token=1, num_expert_group=2, topk_group=1)
    assert near_ties(scores, grouped, 0.01) == {frozenset({2}): pytest.approx(0.0005)}
    assert near_ties(scores, grouped, 1e-4) == {}


@pytest.fixture(scope="module")
def reference(tiny: Path) -> Reference:
    return Reference(TorchRunner(tiny), BOUND)


@pytest.fixture(scope="module")
def prompt(reference: Reference) -> np.ndarray:
    vocab = reference.runner.contract.vocab_size
    return next(p.ids for p in shipped_prompts(None, vocab, 96, 8) if p.name == "corpus 4")


def forced(reference: Reference, ids: np.ndarray, at: int, gap: float) -> tuple[Observation, int, frozenset[int]]:
    """What the source model shows when it takes its nearest other choice at token `at`, of those beyond `gap`."""
    state = reference.runner.new_state(1, len(ids))
    rows = [reference.runner.forward(ids[None, :at], state, logits_indices="all")[0]]
    before = state.snapshot()
    reference.runner.forward(ids[None, at : at + 1], state)
    taken = next(a for a in reference._routers.alternatives(0, 1.0) if a.gap > gap)
    state.restore(before)
    with reference._routers.forced({taken.layer: taken.experts}):
        rows.append(reference.runner.forward(ids[None, at : at + 1], state, logits_indices="all")[0])
    rows.append(reference.runner.forward(ids[None, at + 1 :], state, logits_indices="all")[0])
    return observe(np.concatenate(rows), state), taken.layer, taken.experts


def test_a_near_tie_is_followed_and_all_later_tokens_agree(reference: Reference, prompt: np.ndarray) -> None:
    wide = Reference(reference.runner, replace(BOUND, router_gap=1.0))
    seen, layer, experts = forced(wide, prompt, 20, 0.0)
    assert compare(seen.logits, wide.run(prompt).logits).peak > BOUND.peak
    followed = wide.follow(prompt, seen)
    assert followed.unexplained is None
    assert followed.choices == {20: {layer: experts}}
    assert compare(seen.logits, followed.observation.logits).peak < 1e-4
    for name, value in followed.observation.states.items():
        assert compare(seen.states[name], value).peak < 1e-4


def test_a_choice_that_is_no_near_tie_is_not_followed(reference: Reference, prompt: np.ndarray) -> None:
    seen, _, _ = forced(reference, prompt, 20, 0.05)
    followed = reference.follow(prompt, seen)
    assert followed.unexplained == 20
    assert not compare(seen.logits, followed.observation.logits).within(BOUND)


def test_forcing_a_choice_leaves_the_model_as_it_was(reference: Reference, prompt: np.ndarray) -> None:
    before = run_in_pieces(reference.runner, prompt)
    forced(reference, prompt, 20, 0.0)
    np.testing.assert_array_equal(run_in_pieces(reference.runner, prompt).logits, before.logits)


def test_what_is_not_finite_is_never_explained(reference: Reference, prompt: np.ndarray) -> None:
    seen = reference.run(prompt)
    logits = seen.logits.copy()
    logits[30, 3] = np.nan
    assert reference.follow(prompt, replace(seen, logits=logits)).unexplained == 30


def test_a_float32_export_is_never_followed(tiny: Path) -> None:
    assert tolerance("graph_float32").router_gap == 0.0
    exact = Reference(TorchRunner(tiny), tolerance("graph_float32"))
    ids = np.arange(40, dtype=np.int64)
    seen = replace(exact.run(ids), logits=exact.run(ids).logits + 1)
    assert exact.follow(ids, seen).choices == {}
    assert exact.follow(ids, seen).observation is exact.run(ids)


def test_a_float16_export_passes_where_its_router_chose_other_experts(tiny: Path, tiny_float16: Path) -> None:
    report = validate_export(tiny, tiny_float16, Settings(greedy_tokens=32, threads=1), no_progress)
    assert report.passed, report.first_failure
    # the point of it: without the choices the same prompts are far beyond the bound
    assert sum(r.choices for r in report.rows if r.check == "prefill") > 0
    plain = Reference(TorchRunner(tiny), BOUND)
    candidate = OrtRunner(tiny_float16, threads=1)
    prompts = shipped_prompts(load_tokenizer(tiny), candidate.contract.vocab_size, 96, 200)
    apart = [compare(run_in_pieces(candidate, p.ids).logits, plain.run(p.ids).logits).peak for p in prompts]
    assert max(apart) > 10 * BOUND.peak
    noise = [r for r in report.rows if r.check == "reference-dtype"]
    assert noise
    assert not any(r.judged for r in noise)


def test_noise_far_above_pytorchs_own_fails_although_it_is_within_the_bound(
    tiny: Path, tiny_float16: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kimi_deploy.validate.run.tolerance", lambda name: replace(tolerance(name), noise=0.1))
    settings = Settings(max_tokens=16, long_tokens=16, greedy_tokens=4, threads=1)
    report = validate_export(tiny, tiny_float16, settings, no_progress)
    assert report.first_failure is not None
    assert "times PyTorch's own noise, 0.1 allowed" in report.first_failure.note
