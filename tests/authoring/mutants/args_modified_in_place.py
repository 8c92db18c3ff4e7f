"""update_from_config assigns to the flavor, which all jobs of a process share."""

from __future__ import annotations

from mutants import base

from torchtitan.protocols import TrainSpec, register_train_spec

CAUGHT_BY = ("contract.args",)
SAYS = r"changes the flavor in place: rope_theta = 10000\.0 became"


class Args(base.Args):
    def update_from_config(self, job_config):
        self.rope_theta = 10000.0 * max(1, job_config.training.seq_len // 2048)
        return self


FLAVOR = Args()


def get_train_spec(flavor: str) -> TrainSpec:
    return base.get_train_spec(flavor, model_args=FLAVOR)


register_train_spec("args_modified_in_place", get_train_spec)
