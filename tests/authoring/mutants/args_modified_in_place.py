"""update_from_config assigns to the flavor, which all jobs of a process share."""

from __future__ import annotations

from mutants import base

CAUGHT_BY = ("contract.args",)
SAYS = r"changes the flavor in place: rope_theta = 10000\.0 became"


class Args(base.Args):
    def update_from_config(self, job_config):
        self.rope_theta = 10000.0 * max(1, job_config.training.seq_len // 2048)
        return self


FLAVOR = Args()

base.register(__name__, model_args=FLAVOR)
