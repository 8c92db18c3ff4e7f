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

    checks = choose(only, quick)
    run = _Runs(name, flavor, custom_import, Path(hf).resolve() if hf else None, checks)

    @pytest.mark.parametrize("check", [pytest.param(check, id=check.name) for check in checks])
    def test_conformance(check: Check, tmp_path_factory: pytest.TempPathFactory) -> None:
        outcome = run.outcome(check, lambda: tmp_path_factory.mktemp("verify"))
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


class _Runs:
    """Runs each check once, after those that it needs, for one subject."""

    def __init__(
        self, name: str, flavor: str, custom_import: str, hf: Path | None, checks: list[Check]
    ) -> None:
        self._name, self._flavor = name, flavor
        self._custom_import, self._hf = custom_import, hf
        self._checks = {check.name: check for check in checks}
        self._subject: Subject | None = None
        self._outcomes: dict[str, Outcome] = {}

    def outcome(self, check: Check, make_folder: Callable[[], Path]) -> Outcome:
        """The outcome of a check; checks that it needs run before, if they have not."""
        from torchtitan.authoring.verify.run import run_check, skipped_for

        if check.name not in self._outcomes:
            subject = self._make_subject(make_folder)
            needs = [self.outcome(self._checks[needed], make_folder) for needed in check.needs]
            skipped = skipped_for(check, needs)
            self._outcomes[check.name] = skipped or run_check(check, subject)
        return self._outcomes[check.name]

    def _make_subject(self, make_folder: Callable[[], Path]) -> Subject:
        from torchtitan.authoring.verify.subject import Subject, default_flavor, require_model
        from torchtitan.models.plugins import load_plugins

        if self._subject is None:
            load_plugins(self._custom_import)
            require_model(self._name)
            flavor = self._flavor or default_flavor(self._name)
            self._subject = Subject(
                self._name, flavor, make_folder(), self._custom_import, self._hf
            )
        return self._subject
