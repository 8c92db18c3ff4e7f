"""`JobConfig`: the whole configuration, one dataclass per TOML section."""

from __future__ import annotations

from dataclasses import dataclass, field

from .activation_checkpoint import ActivationCheckpoint
from .checkpoint import Checkpoint
from .comm import Comm
from .compile import Compile
from .data import Data
from .debug import Debug
from .fault_tolerance import FaultTolerance
from .job import Job
from .loss import Loss
from .lr_scheduler import LRScheduler
from .metrics import Metrics
from .model import Model
from .optimizer import Optimizer
from .parallelism import Parallelism
from .profiling import Profiling
from .quantize import Quantize
from .training import Training
from .validation import Validation


@dataclass
class JobConfig:
    job: Job = field(default_factory=Job)
    model: Model = field(default_factory=Model)
    optimizer: Optimizer = field(default_factory=Optimizer)
    lr_scheduler: LRScheduler = field(default_factory=LRScheduler)
    training: Training = field(default_factory=Training)
    data: Data = field(default_factory=Data)
    loss: Loss = field(default_factory=Loss)
    parallelism: Parallelism = field(default_factory=Parallelism)
    activation_checkpoint: ActivationCheckpoint = field(default_factory=ActivationCheckpoint)
    compile: Compile = field(default_factory=Compile)
    quantize: Quantize = field(default_factory=Quantize)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    metrics: Metrics = field(default_factory=Metrics)
    profiling: Profiling = field(default_factory=Profiling)
    validation: Validation = field(default_factory=Validation)
    comm: Comm = field(default_factory=Comm)
    fault_tolerance: FaultTolerance = field(default_factory=FaultTolerance)
    debug: Debug = field(default_factory=Debug)
