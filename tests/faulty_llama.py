"""`tiny_llama` whose rank R, when it comes to a point for the N-th time, does what FAULT says.

FAULT="ACTION POINT N R", for example "kill rename 2 0". Actions: `kill` (SIGKILL to itself) and
`sleep:SECONDS`. N = 0 is every time, R = -1 every rank. The points of a checkpoint's life:

    write       a file is half written
    synced      a file is on the disk
    rename      before a file or folder is renamed: the whole step, what is pruned
    renamed     after that
    delete      before a file of a folder is deleted: an old step, what a crash left
    load        before a tensor that was read is put in its place
"""

import os
import signal
import time
from collections import Counter
from contextlib import suppress

import tiny_llama
from torch.distributed.checkpoint import DefaultLoadPlanner

from torchtitan.protocols import register_train_spec

MODEL_CONFIGS = tiny_llama.MODEL_CONFIGS
_counts = Counter()


def reach(point, half_write=lambda: None):
    action, fault_point, number, rank = os.environ.get("FAULT", "kill nowhere 0 0").split()
    _counts[point] += 1
    here = rank in ("-1", os.environ.get("RANK", "0"))
    if point != fault_point or not here or number not in ("0", str(_counts[point])):
        return
    if action == "kill":
        half_write()
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(float(action.removeprefix("sleep:")))


def _fsync(file):
    descriptor = file if isinstance(file, int) else file.fileno()

    def half_write():
        with suppress(OSError):  # it may be a folder, or open for reading alone
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)

    reach("write", half_write)
    _original["fsync"](file)
    reach("synced")


def _rename(*args, **kwargs):
    reach("rename")
    _original["rename"](*args, **kwargs)
    reach("renamed")


def _replace(*args, **kwargs):
    reach("rename")
    _original["replace"](*args, **kwargs)
    reach("renamed")


def _unlink(path, *, dir_fd=None):
    if ".partial/" in str(path):  # as `folder.rmtree` calls it
        reach("delete")
    _original["unlink"](path, dir_fd=dir_fd)


def _commit_tensor(self, item, tensor):
    reach("load")
    _original_commit(self, item, tensor)


_original = {name: getattr(os, name) for name in ("fsync", "rename", "replace", "unlink")}
_original_commit = DefaultLoadPlanner.commit_tensor
for _name in _original:
    setattr(os, _name, globals()[f"_{_name}"])
DefaultLoadPlanner.commit_tensor = _commit_tensor

register_train_spec("faulty_llama", tiny_llama.get_train_spec)
