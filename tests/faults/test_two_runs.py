"""A second run on the folder of one that is at work."""

from __future__ import annotations

from pathlib import Path

from kills import STEPS, Job, newest_step
from launched import wait_until


def test_the_second_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    job = Job(2, "async")
    with job.start(tmp_path, "sleep:0.2 write 0 0") as first:
        wait_until(lambda: newest_step(tmp_path) > 0, 60, lambda: "no checkpoint")
        with job.start(tmp_path) as second:
            refused = second.wait()
        assert refused.exit_codes == [2, 2], refused.err
        assert f"another run saves its checkpoints there (process {first.pids[0]} on" in refused.err
        assert "Traceback" not in refused.err and " loss " not in refused.err
        done = first.wait()
    assert done.exit_codes == [0, 0], done.err
    assert newest_step(tmp_path) == STEPS
    assert "resumed from" in job.finish(tmp_path).err  # an end leaves it to the next
