"""The checks of `torchtitan verify` as tests of pytest."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchtitan.authoring.verify.check import Check, Outcome
    from torchtitan.authoring.verify.subject import Subject


def conformance_tests(
    name: str,
    flavor: str = "",
    *,
    custom_import: str = "",
    hf: str | Path | None = None,
    only: Iterable[str] = (),
    quick: bool = False,
) -> Callable[..., None]:
    """A test for pytest that is parametrised by the checks of `torchtitan verify`, one each.

    In a test file of the model's author:

        from torchtitan.authoring import conformance_tests

        test_conformance = conformance_tests("my_model", custom_import="my_package.my_model")

    `pytest -k contract` runs a group of them. Checks that do not apply are skipped, and so are
    those that need another which failed.

    Args:
        name: the model, as in `model.name`.
        flavor: by default `debugmodel`, or the only one.
        custom_import: the module that registers the model, as `job.custom_import`.
        hf: folder of a Hugging Face checkpoint of this flavor, to compare with.
        only: checks or groups of checks; none: all.
        quick: leave out what takes long.

    Raises:
        ConfigError: `only` names what there is not.
    """
    import pytest  # which only authors who test need to have

    from torchtitan.authoring.verify.catalog import choose
    from torchtitan.authoring.verify.run import run_check, skipped_for
    from torchtitan.authoring.verify.subject import subject_of

    checks = {check.name: check for check in choose(only, quick)}
    subjects: list[Subject] = []  # the one of all tests, made when the first of them runs
    outcomes: dict[str, Outcome] = {}

    def run(check: Check, folders: pytest.TempPathFactory) -> Outcome:
        """Run a check once, after those that it needs."""
        if not subjects:
            folder = folders.mktemp("verify")
            subjects.append(subject_of(name, flavor, folder, custom_import, hf))
        if check.name not in outcomes:
            needs = [run(checks[needed], folders) for needed in check.needs]
            outcomes[check.name] = skipped_for(check, needs) or run_check(check, subjects[0])
        return outcomes[check.name]

    @pytest.mark.parametrize("check", [pytest.param(c, id=name) for name, c in checks.items()])
    def test_conformance(check: Check, tmp_path_factory: pytest.TempPathFactory) -> None:
        outcome = run(check, tmp_path_factory)
        if outcome.status == "skip":
            pytest.skip(outcome.message)
        if outcome.status == "fail":
            parts = [
                outcome.message,
                f"must hold: {check.asks}",
                outcome.hint and f"look at: {outcome.hint}",
                outcome.details,
            ]
            pytest.fail("\n".join(part for part in parts if part), pytrace=False)

    return test_conformance
