"""`tiny_llama` on two ranks that fails in its first loss, as after a failed collective."""

from dataclasses import replace

import tiny_llama
import torch
import torch.distributed as dist

from torchtitan.protocols import TrainSpec, register_train_spec

MODEL_CONFIGS = tiny_llama.MODEL_CONFIGS


def fail(*_args):
    """Rank 0 no longer waits for what rank 1 sends, and the last reference to the group is here."""
    group = dist.new_group()
    store = dist.distributed_c10d._get_default_store()
    if dist.get_rank() == 0:
        dist.irecv(torch.zeros(1), src=1, group=group)
        store.wait(["sent"])
    else:
        dist.send(torch.ones(1), dst=0, group=group)
        store.set("sent", "yes")
    dist.destroy_process_group(group)
    raise RuntimeError("a collective failed")


def get_train_spec(flavor: str) -> TrainSpec:
    return replace(tiny_llama.get_train_spec(flavor), build_loss_fn=lambda *args, **kwargs: fail)


register_train_spec("abandoned_llama", get_train_spec)
