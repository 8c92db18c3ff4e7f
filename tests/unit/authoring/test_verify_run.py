"""Every end that a check can come to is an outcome of it, and the other checks go on."""

import json
import re
from dataclasses import replace

import checks_that_end as ends
import pytest

from torchtitan.authoring.verify import report
from torchtitan.authoring.verify.run import run_check, run_checks
from torchtitan.authoring.verify.subject import Subject


@pytest.fixture
def subject(tmp_path):
    return Subject("llama3", "debugmodel", tmp_path)


def test_a_check_passes_with_what_it_measured(subject):
    outcome = run_check(ends.check(ends.passes), subject)
    assert (outcome.status, outcome.message) == ("pass", "llama3 is fine")


def test_a_check_fails_with_problem_and_hint(subject):
    outcome = run_check(ends.check(ends.fails), subject)
    assert (outcome.status, outcome.message, outcome.hint, outcome.details) == (
        "fail",
        "3 is not 4",
        "arithmetic.py",
        "",
    )


def test_a_check_does_not_apply(subject):
    outcome = run_check(ends.check(ends.does_not_apply), subject)
    assert (outcome.status, outcome.message) == ("skip", "there are no experts")


def test_an_exception_fails_with_its_place_and_traceback(subject):
    outcome = run_check(ends.check(ends.raises), subject)
    assert outcome.status == "fail"
    assert outcome.message == "rank 0: ValueError: unexpected"
    assert re.search(r"checks_that_end\.py:\d+ in raises", outcome.hint)
    assert 'raise ValueError("unexpected")' in outcome.details


def test_a_killed_check_is_thought_to_have_run_out_of_memory(subject):
    outcome = run_check(ends.check(ends.is_killed), subject)
    assert outcome.status == "fail"
    assert re.search(r"killed by SIGKILL, most likely because memory ran out", outcome.message)


def test_a_crash_fails_with_the_place(subject):
    outcome = run_check(ends.check(ends.crashes), subject)
    assert outcome.message == "rank 0: killed by SIGSEGV"
    assert re.search(r"checks_that_end\.py:\d+ in crashes", outcome.hint)


def test_a_check_that_never_ends_is_stopped(subject):
    outcome = run_check(ends.check(ends.never_ends, timeout=1.0), subject)
    assert outcome.status == "fail"
    assert "not done after 1 s" in outcome.message
    assert re.search(r"checks_that_end\.py:\d+ in never_ends", outcome.message)


def test_checks_run_after_those_that_they_need(subject):
    first = ends.check(ends.leaves)
    second = ends.check(ends.reads, needs=(first.name,))
    outcomes = {o.check.name: o for o in run_checks([first, second], subject)}
    assert outcomes[second.name].status == "pass"
    assert outcomes[second.name].message == "numbers"


def test_as_many_processes_at_a_time_as_cores_it_may_use(subject, monkeypatch):
    """A job often has a share of a large host."""
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {5}, raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    checks = [replace(ends.check(ends.rests), name=f"test.{n}") for n in range(2)]
    times = (map(float, o.message.split()) for o in run_checks(checks, subject))
    (_, end), (begin, _) = sorted(map(tuple, times))
    assert begin >= end


@pytest.mark.parametrize(
    ("needed", "reason"),
    [
        (ends.fails, "needs test.fails, which did not pass"),
        (ends.is_killed, "needs test.is_killed, which did not pass"),
        (ends.does_not_apply, "there are no experts"),
    ],
)
def test_a_check_whose_need_did_not_pass_is_skipped(subject, needed, reason):
    first = ends.check(needed)
    second = ends.check(ends.passes, needs=(first.name,))
    third = ends.check(ends.raises, needs=(second.name,))
    outcomes = {o.check.name: o for o in run_checks([first, second, third], subject)}
    assert (outcomes[second.name].status, outcomes[second.name].message) == ("skip", reason)
    assert outcomes[third.name].status == "skip"


def test_the_others_go_on_and_the_report_has_all(subject):
    functions = (ends.is_killed, ends.raises, ends.passes, ends.does_not_apply)
    checks = [ends.check(function) for function in functions]
    running = report.Running(len(checks))
    outcomes = report.show(run_checks(checks, subject, running.started), checks, running)
    written = json.loads(json.dumps(report.to_json(outcomes, "llama3", "debugmodel")))
    assert (written["model"], written["flavor"], written["passed"]) == (
        "llama3",
        "debugmodel",
        False,
    )
    assert [(c["name"], c["status"]) for c in written["checks"]] == [
        ("test.is_killed", "fail"),
        ("test.raises", "fail"),
        ("test.passes", "pass"),
        ("test.does_not_apply", "skip"),
    ]
    assert "ValueError: unexpected" in written["checks"][1]["details"]
    assert written["checks"][2]["message"] == "llama3 is fine"


def test_a_subject_travels_without_what_cannot_be_pickled(subject):
    import pickle

    subject.spec.model_args.made_here = lambda: None
    try:
        copy = pickle.loads(pickle.dumps(subject))
    finally:
        del subject.spec.model_args.made_here
    assert copy == subject
    assert copy.args == subject.args
