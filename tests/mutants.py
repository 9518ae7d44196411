"""Mutants: one wrong character or line in a copy of the library, each with the one test that must catch it.

`python -m tests.mutants` is the server that runs them for tests/test_mutants.py: it imports what is slow to import
once, and forks for each run, so that a run costs about as long as its test. It imports nothing of tiltlib itself.
"""

import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 120  # seconds: a mutant may loop for ever


class Mutant(NamedTuple):
    """`old`, which occurs exactly once in tiltlib/`file`, is replaced by `new`; `test` must then fail."""

    name: str
    file: str
    old: str
    new: str
    test: str


MUTANTS = [
    Mutant(
        "entropy in bits",
        "law.py",
        "return float(entr(check_law(p)).sum())",
        "return float(entr(check_law(p)).sum() / math.log(2))",
        "test_law.py::test_entropy_counts_nats_and_ignores_zeros",
    ),
    Mutant(
        "divergence of normalised laws only",
        "law.py",
        "terms[far] = p[far] * x[far] - p[far] + q[far]",
        "terms[far] = p[far] * x[far]",
        "test_law.py::test_kl_is_generalised",
    ),
    Mutant(
        "exponent of RLIF",
        "law.py",
        "power(ref, strength / (strength - 1))",
        "power(ref, strength / (strength + 1))",
        "test_law.py::test_rlif_optimum_beats_every_law",
    ),
    Mutant(
        "no refusal of the collapse",
        "law.py",
        "if strength <= 1:",
        "if strength == 1:",
        "test_law.py::test_rlif_optimum_refuses_the_collapse",
    ),
    Mutant(
        "normaliser loses a rare best outcome",
        "law.py",
        "np.log1p(mean) if mean > -0.5 else logsumexp(x, b=p)",
        "np.log1p(mean)",
        "test_law.py::test_log_partition_at_large_beta_and_at_small",
    ),
    Mutant(
        "resampling without chance",
        "chance.py",
        "(teeth + offset) / count",
        "(teeth + 0.5) / count",
        "test_chance.py::test_systematic_is_unbiased_exactly",
    ),
    Mutant(
        "one uniform for all rows",
        "chance.py",
        "offset = chance.uniforms((weights.shape[0], 1)",
        "offset = chance.uniforms((1, 1)",
        "test_chance.py::test_rows_of_ancestors_use_their_own_uniform",
    ),
    Mutant(
        "the last uniform falls off the end",
        "chance.py",
        "points.clamp(max=BELOW_ONE)",
        "points",
        "test_chance.py::test_zero_weight_is_never_drawn",
    ),
    Mutant(
        "one candidate too many",
        "bestofn.py",
        "integrand = block.dt * _power(block.log_phi, n - 1)",
        "integrand = block.dt * _power(block.log_phi, n)",
        "test_bestofn.py::test_soft_law_is_the_enumerated_law",
    ),
    Mutant(
        "a coarser quadrature",
        "bestofn.py",
        "STEP = 3 / 16",
        "STEP = 7 / 16",
        "test_bestofn.py::test_the_quadrature_rule_is_as_good_as_it_says",
    ),
    Mutant(
        "the gap between windows forgets N",
        "bestofn.py",
        "> GAP + math.log(n)) + 1",
        "> GAP) + 1",
        "test_bestofn.py::test_the_gap_grows_with_the_number_of_candidates",
    ),
    Mutant(
        "ties by outcome",
        "bestofn.py",
        "wins[group] * p[support] / mass[group]",
        "wins[group] / np.bincount(group)[group]",
        "test_bestofn.py::test_hard_law_breaks_ties_by_candidate_not_by_outcome",
    ),
    Mutant(
        "expansion without its mean",
        "bestofn.py",
        "np.where(p > 0, chi2 - excess, 0.0)",
        "np.where(p > 0, -excess, 0.0)",
        "test_bestofn.py::test_expansion_coefficients",
    ),
    Mutant(
        "halves counted twice",
        "bestofn.py",
        "- halves / 2",
        "- halves",
        "test_bestofn.py::test_antithetic_difference_by_enumeration",
    ),
    Mutant(
        "NaN passes",
        "claims.py",
        "if np.isnan(measured).any() or np.isnan(expected).any():",
        "if False:",
        "test_claims.py::test_a_malformed_claim_is_refused_and_not_recorded",
    ),
    Mutant(
        "bounds the wrong way round",
        "claims.py",
        '"at_least": -gap}',
        '"at_least": gap}',
        "test_claims.py::test_a_claim_holds_up_to_its_tolerance_on_the_side_that_it_names",
    ),
    Mutant(
        "weak Monte Carlo controls",
        "claims.py",
        "power = 2.0 if",
        "power = 1.0 if",
        "test_claims.py::test_a_monte_carlo_control_must_deviate_by_more_than_twice_the_tolerance",
    ),
    Mutant(
        "controls do not count",
        "claims.py",
        'if not c["control"]["rejected"]',
        "if False",
        "test_claims.py::test_one_failure_among_many_keeps_the_ledger_open",
    ),
    Mutant(
        "code does not count for memo",
        "run.py",
        "json.dumps([key, code, source]",
        "json.dumps([key, source]",
        "test_runner.py::test_another_key_another_code_another_function_compute_again",
    ),
    Mutant(
        "unknown parameters are ignored",
        "runner.py",
        "        if name not in by_name:\n",
        "        if name not in by_name:\n            continue\n",
        "test_runner.py::test_what_does_not_fit_is_refused_before_work_starts",
    ),
    Mutant(
        "false is true",
        "runner.py",
        'value = {"true": True, "false": False}.get(text.lower())',
        "value = bool(text)",
        "test_runner.py::test_texts_become_typed_values",
    ),
    Mutant(
        "docstrings make stale",
        "runner.py",
        'fields["body"] = body[1:]',
        "pass",
        "test_runner.py::test_what_cannot_change_an_output_keeps_the_stamp",
    ),
    Mutant(
        "only direct imports count",
        "runner.py",
        "        todo |= _imports(",
        "        _imports(",
        "test_runner.py::test_a_changed_number_in_anything_imported_changes_the_stamp",
    ),
    Mutant(
        "result files do not count",
        "runner.py",
        'reads = [f"book/results/{path.stem}/**/metrics.json", ',
        "reads = [",
        "test_runner.py::test_result_files_and_declared_data_count",
    ),
    Mutant(
        "no closing line needed",
        "runner.py",
        "    if text.strip() != claims.closing_line(",
        "    if text is claims.closing_line(",
        "test_runner.py::test_a_failed_claim_and_a_missing_end_are_no_success",
    ),
    Mutant(
        "the rule of the effective sample size for a standard error",
        "tune/weighted.py",
        "np.sqrt(np.square(values) @ np.square(f - mean))",
        "np.sqrt(values @ np.square(f - mean) / len(f))",
        "test_weighted.py::test_standard_error_on_an_exact_pool",
    ),
    Mutant(
        "the reciprocal tilt turned round",
        "tune/denoising.py",
        "gap = r[alive].max() - r[alive]",
        "gap = r[alive] - r[alive].min()",
        "test_denoising.py::test_the_reciprocal_tilt_of_two_outcomes_by_hand",
    ),
    Mutant(
        "noise added to x_0 unscaled, as another path has it",
        "tune/denoising.py",
        "x = alpha * x0 + sigma * noise",
        "x = x0 + sigma * noise",
        "test_denoising.py::test_conditions_go_with_their_samples",
    ),
    Mutant(
        "the divergence rewarded",
        "tune/training.py",
        "/ beta - log_ratio.detach()",
        "/ beta + log_ratio.detach()",
        "test_training.py::test_reinforce_is_unbiased_by_enumeration",
    ),
    Mutant(
        "a resumed run draws its own numbers",
        "tune/training.py",
        '    generator.set_state(tensors["generator"])\n',
        "",
        "test_training.py::test_a_resumed_run_ends_where_an_unbroken_one_does",
    ),
    Mutant(
        "the flow SDE takes the whole squared diffusion",
        "paths.py",
        "pull = on.d_sigma[1:] / sigma + (level / sigma) ** 2 / 2",
        "pull = on.d_sigma[1:] / sigma + (level / sigma) ** 2",
        "test_paths.py::test_the_flow_sde_keeps_the_marginals_to_first_order",
    ),
    Mutant(
        "a Gaussian tilt forgets half its squared length",
        "paths.py",
        "- scale**2 / 2 * square(g[..., 0])[:, None]",
        "- scale**2 * square(g[..., 0])[:, None]",
        "test_paths.py::test_a_gaussian_tilt_is_exact",
    ),
    Mutant(
        "a categorical tilt weighs by q / p",
        "paths.py",
        "return x, _tokens(self.log_p, x) - _tokens(self.log_q, x)",
        "return x, _tokens(self.log_q, x) - _tokens(self.log_p, x)",
        "test_paths.py::test_a_categorical_tilt_is_exact",
    ),
    Mutant(
        "guidance away from the condition",
        "worlds/guided.py",
        "torch.lerp(plain, self.world.predict(x, i, condition), self.scale)",
        "torch.lerp(self.world.predict(x, i, condition), plain, self.scale)",
        "test_worlds_guided.py::test_the_score_is_the_geometric_mixture_of_the_two_laws",
    ),
    Mutant(
        "Doob's kernels with the value one step late",
        "worlds/chain.py",
        "zip(self.kernels, values[:-1], strict=True)",
        "zip(self.kernels, values[1:], strict=True)",
        "test_worlds_chain.py::test_doob_needs_the_tilted_start",
    ),
    Mutant(
        "regression of exp(r / beta) loses its logarithm's scale",
        "values.py",
        "met = top + beta * (none.index_add",
        "met = top + (none.index_add",
        "test_values.py::test_regressing_the_reward_is_biased_and_regressing_its_exponential_is_consistent",
    ),
    Mutant(
        "what a step saved does not roll over",
        "steer/rollover.py",
        "share + ahead * (quota - used)",
        "share + ahead * 0",
        "test_rollover.py::test_the_ledger_can_be_audited",
    ),
    Mutant(
        "a forced move lowers the best-ever record",
        "steer/rollover.py",
        'ahead if record == "best_ever" else move',
        "move",
        "test_rollover.py::test_the_ledger_can_be_audited",
    ),
    Mutant(
        "a particle of a converted world is not scaled",
        "worlds/converted.py",
        "return x * paths.at(self.scale, i, x)",
        "return x",
        "test_worlds_converted.py::test_it_is_the_world_that_the_grid_would_have",
    ),
    Mutant(
        "the mean weight is dropped at a resampling",
        "steer/rows.py",
        "torch.where(need[:, None], mean, flat[:, :k])",
        "torch.where(need[:, None], mean * 0, flat[:, :k])",
        "test_steer.py::test_proper_rows_estimate_z_and_moments_without_bias",
    ),
    Mutant(
        "the twist of the parent stays in the weight",
        "steer/loop.py",
        "log_w = (log_w - psi).unsqueeze(-1) + twist",
        "log_w = log_w.unsqueeze(-1) + twist",
        "test_steer.py::test_proper_rows_estimate_z_and_moments_without_bias",
    ),
    Mutant(
        "the proposal's density is forgotten",
        "steer/loop.py",
        "log_w += log_ratio.double().view(shape)",
        "log_w += 0 * log_ratio.double().view(shape)",
        "test_steer.py::test_proper_rows_estimate_z_and_moments_without_bias",
    ),
    Mutant(
        "the gradient is left behind at a resampling",
        "steer/loop.py",
        "return x.index_select(0, flat), look.take(flat), wide(running)",
        "return x.index_select(0, flat), look.take(flat)._replace(grad=look.grad), wide(running)",
        "test_steer.py::test_a_particle_takes_everything_along_when_it_is_resampled",
    ),
    Mutant(
        "the last potential is the running one",
        "steer/loop.py",
        "    if i == 0:  # whatever",
        "    if i == 0 and running is None:  # whatever",
        "test_steer.py::test_the_last_potential_is_always_the_reward",
    ),
    Mutant(
        "children that are dropped are asked for too",
        "steer/look.py",
        'self.early = value is not None and getattr(value, "needs_prediction", True)',
        "self.early = value is not None",
        "test_look.py::test_a_value_that_reads_no_prediction_costs_none_on_dropped_children",
    ),
    Mutant(
        "what residual resampling leaves over is drawn by the whole weights",
        "resampling.py",
        "drawn = inverse_cdf(rest, ",
        "drawn = inverse_cdf(weights, ",
        "test_resampling.py::test_it_is_unbiased_exactly",
    ),
    Mutant(
        "siblings by the square of their weight",
        "steer/rows.py",
        "_best(log_w) if greedy else chance.categoricals(log_w)",
        "_best(log_w) if greedy else chance.categoricals(2 * log_w)",
        "test_steer.py::test_svdd_is_a_product_of_laws_of_best_of_m",
    ),
    Mutant(
        "adaptive tempering in the wrong direction",
        "steer/rows.py",
        "torch.where(fine, middle, low), torch.where(fine, high, middle)",
        "torch.where(fine, low, middle), torch.where(fine, middle, high)",
        "test_steer.py::test_adaptive_tempering_moves_as_far_as_the_effective_sample_size_allows",
    ),
    Mutant(
        "the kept path may be overwritten",
        "steer/search.py",
        "index[need, 1:] = chance.categoricals(flat[need].unsqueeze(1).expand(-1, k - 1, -1))",
        "index[need] = chance.categoricals(flat[need].unsqueeze(1).expand(-1, k, -1))",
        "test_search.py::test_steering_back_with_the_current_path_among_the_particles_is_exact[from scratch]",
    ),
    Mutant(
        "the current sample competes twice",
        "steer/search.py",
        "chance.categoricals(torch.cat([r[:, None], fresh], 1) / beta) - 1",
        "(chance.categoricals(torch.cat([r[:, None], r[:, None], fresh], 1) / beta) - 2).clamp(min=-1)",
        "test_search.py::test_from_scratch_it_is_iterated_best_of_n",
    ),
    Mutant(
        "the soft backup forgets how likely a child is",
        "steer/search.py",
        "worth = self.beta * (log_p + value / self.beta).logsumexp(1)",
        "worth = self.beta * (value / self.beta).logsumexp(1)",
        "test_search.py::test_a_complete_tree_with_the_soft_backup_is_exact_whatever_the_value",
    ),
]


def prepare(folder: Path, file: str | None = None, old: str = "", new: str = "") -> None:
    """A project at `folder` with a copy of tiltlib, one text of which is replaced, and links to all the rest.

    Raises ValueError unless the text occurs exactly once.
    """
    ignored = {"tiltlib", ".git", ".venv", "_build", "runs", ".pytest_cache", ".ruff_cache", ".hypothesis"}
    for path in ROOT.iterdir():
        if path.name not in ignored:
            (folder / path.name).symlink_to(path)
    shutil.copytree(ROOT / "tiltlib", folder / "tiltlib", ignore=shutil.ignore_patterns("__pycache__"))
    if file is None:
        return
    path = folder / "tiltlib" / file
    text = path.read_text()
    if text.count(old) != 1:
        raise ValueError(f"the text occurs {text.count(old)} times in {file}, not once: {old}")
    path.write_text(text.replace(old, new))


def child(folder: Path, file: str | None, test: str) -> int:
    """Run one test against the library in `folder`; returns pytest's exit code, or 99 if another library was tested."""
    signal.alarm(LIMIT)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    os.environ |= {"PYTHONPATH": str(folder), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    import hypothesis
    import pytest

    generate = (hypothesis.Phase.explicit, hypothesis.Phase.generate)  # a failure need not be made small
    hypothesis.settings.register_profile("mutants", phases=generate, database=None)
    hypothesis.settings.load_profile("mutants")
    import tiltlib  # before pytest puts the checkout first

    code = pytest.main(["-q", "-x", "--no-header", "-p", "no:cacheprovider", str(ROOT / "tests" / test)])
    loaded = sys.modules.get(f"tiltlib.{file.removesuffix('.py').replace('/', '.')}") if file else tiltlib
    return int(code) if loaded and Path(loaded.__file__).is_relative_to(folder) else 99


def serve() -> None:
    """Answer each line {"file", "old", "new", "test"} on stdin by a line {"code", "said"} on stdout."""
    import hypothesis  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import nbformat  # noqa: F401
    import papermill  # noqa: F401
    import pytest  # noqa: F401
    import scipy.stats  # noqa: F401
    import torch  # noqa: F401

    for line in sys.stdin:
        job = json.loads(line)
        with tempfile.TemporaryDirectory() as place:
            folder, said = Path(place).resolve() / "project", Path(place) / "said"
            folder.mkdir()
            try:
                prepare(folder, job["file"], job["old"], job["new"])
            except ValueError as error:
                print(json.dumps({"code": 98, "said": str(error)}), flush=True)
                continue
            pid = os.fork()
            if pid == 0:
                out = os.open(said, os.O_WRONLY | os.O_CREAT)
                os.dup2(out, 1), os.dup2(out, 2)
                code = 97
                try:
                    code = child(folder, job["file"], job["test"])
                finally:
                    sys.stdout.flush()
                    os._exit(code)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            print(json.dumps({"code": code, "said": said.read_text()[-3000:]}), flush=True)


if __name__ == "__main__":
    serve()
