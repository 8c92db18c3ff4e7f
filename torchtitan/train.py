"""The trainer: the set-up, then the step loop, to be read from top to bottom.

TOML + command line -> JobConfig -> ParallelDims -> mesh -> TrainSpec -> model on meta
-> loss, data -> (pipeline stages) -> parallelize -> weights -> optimizer, schedule
-> steps -> metrics, validation, checkpoint

A step is `Trainer.train_step`: it sums the gradients of its micro-batches (`_accumulate_gradients`;
of one: `forward_backward`), and updates the weights (`_train_on`). `_after_step` logs and saves.

The other members serve long runs and certain models; skip them at first:
* bad steps: `guard` (loss or gradients out of bounds), `replay` (a device that computes wrongly);
* ranks: `agreement` and `block_calls` (do they do the same?), `stragglers`, `watch` (hangs);
* replica groups, which may fail or train apart: `replicas`, `semi_sync`;
* models: `expert_balance`, `stage_copies` (weights that several pipeline stages have).

Run by `torchtitan train`, `python -m torchtitan.train` or `torchrun ... -m torchtitan.train`.
"""

from __future__ import annotations

import faulthandler
import gc
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from torchtitan.cli import end_at_once, exit_on_user_error, leave
from torchtitan.components.batch_agreement import BatchAgreement, digest_of_names
from torchtitan.components.block_norms import BlockNorms
from torchtitan.components.checkpoint import CheckpointManager, RunState, TrainState
from torchtitan.components.checkpoint.model_identity import warn_of_initial_weights
from torchtitan.components.checkpoint.owner import claim_dump_folder
from torchtitan.components.checkpoint.resume import check_resume
from torchtitan.components.data_loader import Batch, check_dataloader, loader_outages, next_batch
from torchtitan.components.fault_tolerance import Replicas, with_own_folder
from torchtitan.components.guard import Guard, refuse_nonfinite_step, refuse_nonfinite_weights
from torchtitan.components.loss import attach_loss, check_loss, count_of
from torchtitan.components.lr_scheduler import lr_schedulers_of
from torchtitan.components.metrics import (
    build_metrics_processor,
    check_metrics_processor,
    joined_metrics,
)
from torchtitan.components.model_inputs import ModelInputs
from torchtitan.components.moe_balance import ExpertBalance, force_balance, leave_out_unreached
from torchtitan.components.optimizer import container_of, freeze
from torchtitan.components.out_of_memory import add_memory_advice
from torchtitan.components.quantization.float8_gather import use_float8_gathers
from torchtitan.components.rank_metrics import highest_of_ranks, loader_metrics, loss_metrics
from torchtitan.components.replay import Replay
from torchtitan.components.run_folder import make_dump_folder, write_description
from torchtitan.components.semi_sync import SemiSync
from torchtitan.components.step_stats import StepStats
from torchtitan.components.stragglers import Stragglers
from torchtitan.components.tokenizer import path_of
from torchtitan.components.unsaved_state import check_optimizer_state, warn_of_unequal_buffers
from torchtitan.components.validate import build_validator, check_validator, evaluating
from torchtitan.components.weight_flops import flops_of_weights
from torchtitan.config import JobConfig, load_config
from torchtitan.config.batch import batch_sizes
from torchtitan.config.load import checked, print_config
from torchtitan.distributed.block_calls import BlockCalls
from torchtitan.distributed.compile import compiled_pass
from torchtitan.distributed.determinism import (
    keep_random_states,
    seed_step,
    use_deterministic_kernels,
)
from torchtitan.distributed.fsdp import (
    fsdp_modules,
    mixed_precision,
    set_last_micro_batch,
    shared_casts,
    use_summed_gradients,
)
from torchtitan.distributed.grad_norm import clip_grad_norm
from torchtitan.distributed.init import initialize_weights
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.distributed.pipeline_parallel import pipeline_of
from torchtitan.distributed.stage_copies import StageCopies
from torchtitan.distributed.unequal_gradients import warn_of_unequal_gradients
from torchtitan.distributed.unused_options import check_applied, warn_of_unread
from torchtitan.errors import TitanError, TrainingError
from torchtitan.preflight.model_fit import check_model, fitting_model, log_model
from torchtitan.preflight.same_on_ranks import refuse_other_data, refuse_other_options
from torchtitan.protocols.model_converter import build_model_converters
from torchtitan.runtime.collective_calls import on_rank_zero
from torchtitan.runtime.device import device
from torchtitan.runtime.error_report import show_tracebacks_once
from torchtitan.runtime.hang_watch import HangWatch
from torchtitan.runtime.host_sum import sum_over_ranks
from torchtitan.runtime.process_group import exit_may_hang, init_distributed
from torchtitan.runtime.stop_request import PREEMPTED, StopRequest
from torchtitan.runtime.world import refuse_separate_tasks, world_size
from torchtitan.tools.garbage_collection import GarbageCollection
from torchtitan.tools.logging import init_logger, logger, rank0
from torchtitan.tools.profiling import Profiler
from torchtitan.tools.secrets import hide_secrets
from torchtitan.tools.text import first_line

# After an error, another rank may be gone: a background save would wait for it in vain, and the
# remaining ranks for this one.
_SECONDS_AFTER_A_FAILURE = 3.0


class Trainer:
    """One training run.

    A process can hold only one at a time. The trainer is closed when `train` or `close` returns,
    and when the set-up or either method fails.

    Raises:
        RuntimeError: the process already has a process group, such as another trainer's.
    """

    def __init__(self, job_config: JobConfig) -> None:
        if dist.is_initialized():
            raise RuntimeError(
                "this process already has a process group. Destroy it first: another Trainer's "
                "with its train() or close(), your own with dist.destroy_process_group()"
            )
        self._closed = self.may_hang = False
        self.first_step = True
        """Whether this process has taken no optimizer step yet."""
        self.job_config = with_own_folder(checked(job_config))
        with self._closing_on_failure():
            self._check_job()
            self._join_ranks()
            self._build_on_meta()
            self._allocate()

    def _check_job(self) -> None:
        """Refuse mistakes before memory is allocated and, where possible, before ranks connect."""
        job_config = self.job_config
        self.spec, self.model_args, self.tokenizer = fitting_model(job_config, world_size())
        self.parallel_dims = ParallelDims.from_config(job_config.parallelism, world_size())
        self.model_converters = build_model_converters(job_config, self.parallel_dims)
        build_metrics = self.spec.build_metrics_processor_fn or build_metrics_processor
        metrics = build_metrics(job_config, self.parallel_dims, self.model_args)
        check_metrics_processor(metrics, job_config)
        self.metrics = metrics

    def _join_ranks(self) -> None:
        """Form the process group and the meshes, and divide the batch among the ranks."""
        job_config = self.job_config
        if job_config.debug.deterministic:
            use_deterministic_kernels()
        init_distributed(job_config.comm.timeout_seconds)
        refuse_other_options(job_config)
        check_resume(job_config, self.model_args, dist.group.WORLD, self.tokenizer)
        self.device = device()
        self.replicas = Replicas(job_config)
        dims, world_mesh = self.parallel_dims, self.parallel_dims.world_mesh
        keep_random_states(world_mesh)
        self.dp_rank = world_mesh["dp"].get_local_rank()
        self.data_share = self.replicas.data_share(self.dp_rank, dims.dp)
        self.batch_sizes = batch_sizes(job_config, self.data_share[1])
        self.agreement = BatchAgreement(dims, self.dp_rank, job_config)
        self.random_rank, _ = self.replicas.data_share(dims.random_rank, dims.world_size // dims.tp)
        self.cp_mesh = world_mesh["cp"] if dims.cp_enabled else None
        self.pp_mesh = world_mesh["pp"] if dims.pp_enabled else None

    def _build_on_meta(self) -> None:
        """Build the parallelized model parts, still without memory, and the loss and the data."""
        job_config, dims, spec = self.job_config, self.parallel_dims, self.spec
        model = spec.meta_model(self.model_args)
        flops_of_args = flops_of_weights(model)
        self.model_converters.convert(model)
        freeze(model, job_config)
        if dims.pp_enabled:
            leave_out_unreached(model)
        vocab_size = getattr(self.model_args, "vocab_size", None)
        self.model_inputs = ModelInputs(model, dims, job_config, vocab_size)
        check_model(model, job_config, self.batch_sizes.passes(job_config.training.steps))
        force_balance(model, job_config, dims)
        self.metrics.flops_per_token += flops_of_weights(model) - flops_of_args
        log_model(model, job_config, dims)
        self.block_norms = BlockNorms(job_config, model, dims)
        with warn_of_unread("loss", "build_loss_fn", job_config):
            self.loss_fn = spec.build_loss_fn(job_config)
        check_loss(self.loss_fn, job_config)
        with loader_outages(job_config):
            self.dataloader = spec.build_dataloader_fn(job_config, self.tokenizer, *self.data_share)
        check_dataloader(self.dataloader, job_config)
        refuse_other_data(self.dataloader)
        self.validator: Any = None
        if job_config.validation.enable:
            self.validator = (spec.build_validator_fn or build_validator)(
                job_config, self.tokenizer, self.loss_fn, dims, self.dp_rank, dims.dp
            )
            check_validator(self.validator, self.dataloader, job_config)
        layout = dims.world_mesh, dims, job_config
        self.pipeline = None
        if dims.pp_enabled:
            assert spec.pipeline_fn is not None  # otherwise the config was refused
            built = spec.pipeline_fn(model, *layout, spec.parallelize, self.loss_fn)
            self.pipeline = pipeline_of(built, job_config)
            self.model_parts = self.pipeline.model_parts
        else:
            self.model_parts = [spec.parallelize(model, *layout)]
        check_applied(self.model_parts, job_config)
        on_rank_zero(partial(make_dump_folder, job_config), dist.group.WORLD)
        on_rank_zero(partial(claim_dump_folder, job_config), dist.group.WORLD)

    def _allocate(self) -> None:
        """Allocate the weights, the optimizer and everything else that the steps need."""
        job_config, spec = self.job_config, self.spec
        offload = job_config.training.enable_cpu_offload
        for part in self.model_parts:
            use_summed_gradients(part)
            use_float8_gathers(part)
            params_device = torch.device("cpu") if offload else self.device
            initialize_weights(part, job_config.debug.seed, params_device, self.device)
            part.train()
        self.block_calls = BlockCalls(self.model_parts, self.parallel_dims)
        modules = [fsdp_modules(part) for part in self.model_parts]
        self.fsdp_modules = [module for of_part in modules for module in of_part]
        self.autocast = mixed_precision(all(modules), job_config, self.device)

        self.expert_balance = ExpertBalance(self.model_parts, self.parallel_dims)
        attach_loss(self.loss_fn, self.model_parts)
        builder = f"build_optimizer_fn ({job_config.optimizer.name})"
        with warn_of_unread("optimizer", builder, job_config):
            built = spec.build_optimizer_fn(self.model_parts, job_config, self.parallel_dims)
        self.optimizers = container_of(built, self.model_parts, job_config)
        self.stage_copies = StageCopies(self.model_parts, self.pp_mesh, self.optimizers)
        with warn_of_unread("lr_scheduler", "build_lr_scheduler_fn", job_config):
            schedule = spec.build_lr_scheduler_fn(self.optimizers, job_config)
        self.lr_schedulers = lr_schedulers_of(schedule, job_config)
        self.state = TrainState()
        self.guard = Guard(job_config, self.parallel_dims, self.dp_rank, path_of(self.tokenizer))
        self.replay = Replay(job_config, self.model_parts, self.parallel_dims)
        self.stragglers = Stragglers(job_config, self.model_parts, self.device)
        self.watch = HangWatch(job_config)
        self.semi_sync = SemiSync(job_config, self.model_parts, self.replicas, self.state)
        optional: dict[str, Any] = {"guard": self.guard, "semi_sync": self.semi_sync}
        self.run_state = RunState(
            job_config,
            model_parts=self.model_parts,
            optimizers=self.optimizers,
            lr_schedulers=self.lr_schedulers,
            dataloader=self.dataloader,
            train_state=self.state,
            dp_mesh=self.parallel_dims.world_mesh["dp"],
            optional={name: state for name, state in optional.items() if state.enabled},
        )
        self.checkpointer = CheckpointManager(self.run_state, self.tokenizer)
        self.stats = StepStats()

    def train(self) -> bool:
        """Run the remaining steps; on one of `stop_signals`, stop early with a checkpoint.

        Returns:
            Whether the last step is done.

        Raises:
            RuntimeError: the trainer is closed.
        """
        if self._closed:
            raise RuntimeError("this trainer is closed: a new Trainer(config) resumes or restarts")
        config = self.job_config
        with self._closing_on_failure():
            self._begin()
            collection = GarbageCollection(config.training.gc_freq)
            # Both end before what follows a failure, in which a signal should end the process.
            with closing(StopRequest()) as stop, closing(collection):
                with Profiler(config, dist.get_rank(), self.state.step) as profiler:
                    while self.state.step < config.training.steps:
                        if self.replicas.begin_step(stop):
                            self._save_before_step()
                            break
                        self.state.step += 1
                        with self.stragglers.measure(self.state.step):
                            stopping = self.train_step(stop)
                        self.watch.enter("after the step", self.state.step)
                        if self.replicas.lost_step:
                            self.state.step -= 1
                            continue
                        self._count_tokens()
                        if self.guard.rollback_due and self._roll_back():
                            stopping = False  # only the next step saves which batches were bad
                        else:
                            self._after_step(stopping)
                        with self.metrics.pause():
                            profiler.step(self.state.step)
                        collection.step(self.state.step)
                        if stopping:
                            break
                self.close()
        finished = self.state.step >= config.training.steps
        logger.info(
            "training %s step %d", "finished at" if finished else "stopped after", self.state.step
        )
        return finished

    def _begin(self) -> None:
        """Load the checkpoint or the initial weights that the run starts from."""
        config = self.job_config
        self.watch.start()
        self.resumed = self.checkpointer.load() > 0
        self.stage_copies.spread_weights()
        if not self.resumed:
            warn = partial(warn_of_initial_weights, config, self.tokenizer)
            on_rank_zero(warn, dist.group.WORLD)
        describe = partial(write_description, config, dist.get_world_size())
        on_rank_zero(describe, dist.group.WORLD)
        self.metrics.start(0 if self.checkpointer.branched else self.state.step)
        self.semi_sync.begin()
        self.replicas.start(
            self.state.step, self._state_of_replicas, self.run_state.load_state_dict
        )

    def train_step(self, stop: StopRequest) -> bool:
        """Run one optimizer step. Return whether any rank was asked to stop, equal on all ranks."""
        self._start_step()
        batches = self._next_batches()
        own_tokens, stopping = self._sum_over_ranks(batches, stop)
        if self.guard.begin_step(self.state.step):  # leaves the batches out
            if done := self.replicas.commit():
                self.guard.count_left_out()
        else:
            done = self._train_on(batches, own_tokens)
        if done:
            self.stats.lr = self.lr_schedulers.last_lr
            self.lr_schedulers.step()
        if self.semi_sync.is_due():
            stopping |= self._meet_other_groups(stop)
        return stopping

    def _next_batches(self) -> list[Batch]:
        """Return this rank's micro-batches of the step."""
        step = self.state.step
        self.watch.enter("data", step)
        if step > 1 and (now := self.batch_sizes.at(step)) != self.batch_sizes.at(step - 1):
            rank0.info("step %d: the global batch grows to %d sequences", step, now)
        start = time.perf_counter()
        passes = range(self.batch_sizes.passes(step))
        given = (next_batch(self.dataloader, self.job_config, step) for _ in passes)
        batches = [self.model_inputs.checked(batch) for batch in given]
        self.stats.data_wait += time.perf_counter() - start
        return batches

    def _sum_over_ranks(self, batches: list[Batch], stop: StopRequest) -> tuple[torch.Tensor, bool]:
        """Exchange, in one sum, what the ranks must know of each other in each step.

        Returns:
            own_tokens: trained tokens of this replica group's batch, a number.
            stopping: whether any rank was asked to stop.
        """
        step = self.state.step
        self.watch.enter("token count", step)
        # The loss is divided by the tokens of the whole step, so that each token weighs the same.
        count = count_of(self.loss_fn)
        tokens = sum(int(count(batch["labels"])) for batch in batches)
        # On the host, so that reading the counts does not wait for the device.
        names, calls = digest_of_names(batches), self.block_calls.take_digests()
        contents = self.agreement.weighted_digest(batches)
        counts = torch.tensor([tokens, int(stop.received), contents, *names, *calls])
        sum_over_ranks(counts)
        token_count, stops, content_sum, name_sums, call_sums = counts.split(
            [1, 1, 1, len(names), len(calls)]
        )
        self.agreement.refuse_other_names(name_sums.tolist(), batches)
        self.agreement.refuse_different(int(content_sum), step)
        self.block_calls.refuse_unequal(call_sums.tolist(), step - 1)
        self.agreement.check_first_step(batches, self.dataloader)
        return token_count[0] // self.parallel_dims.non_data_parallel_size, bool(stops)

    def _train_on(self, batches: list[Batch], own_tokens: torch.Tensor) -> bool:
        """Compute the gradients of a step and update the weights, if the guard allows it.

        Args:
            own_tokens: see `_sum_over_ranks`.

        Returns:
            False if the step is lost, because a replica group left.
        """
        config, step = self.job_config, self.state.step
        # At least 1: a step of prompts alone has no labels, and its loss is 0.
        global_tokens = self.replicas.sum(own_tokens).clamp(min=1)

        self.watch.enter("forward_backward", step)
        compute = partial(self._accumulate_gradients, batches, global_tokens)
        loss_sum = self.replay.check(step, compute, self._start_step)
        loss_sum = self.replicas.sum(loss_sum)
        self.replicas.sum_gradients(self._parameters())
        self.expert_balance.add_up(self.replicas.sum)
        if self.first_step:
            warn_of_unequal_gradients(self.model_parts, self.parallel_dims)

        self.watch.enter("optimizer", step)
        self.stage_copies.sum_gradients()
        grad_norm = clip_grad_norm(
            self._parameters(), config.training.max_norm, self.pp_mesh, self.stage_copies.parameters
        )
        if not self.replicas.commit():
            self.expert_balance.discard()
            return False
        self.block_norms.measure(step, self.model_parts, grad_norm)
        if not self.guard.allows(step, loss_sum, grad_norm, batches):
            self.expert_balance.discard()
            return True
        self.optimizers.step()
        self.model_converters.post_optimizer_hook(self.model_parts)
        self.expert_balance.step()
        self.semi_sync.count(own_tokens)
        self.stats.add(step, loss_sum, grad_norm)
        self.stats.without_labels += int(own_tokens == 0)
        if self.first_step:
            if config.checkpoint.enable:
                check_optimizer_state(self.optimizers, self.model_parts)
            warn_of_unequal_buffers(self.model_parts, self.parallel_dims)
        self.first_step = False
        return True

    def _accumulate_gradients(
        self, batches: list[Batch], global_tokens: torch.Tensor
    ) -> torch.Tensor:
        """Leave the gradients of all micro-batches in the parameters. Return the share of loss."""
        loss_sum = torch.zeros((), device=self.device)
        with shared_casts(len(batches), self.job_config, self.device):
            for number, batch in enumerate(batches, start=1):
                set_last_micro_batch(self.fsdp_modules, number == len(batches))
                loss_sum += self.forward_backward(batch, global_tokens)
        for param in self._parameters():
            if param.requires_grad and param.grad is None:  # no token used it; FSDP gives zeros too
                param.grad = torch.zeros_like(param)
        return loss_sum

    def forward_backward(self, batch: Batch, global_tokens: torch.Tensor) -> torch.Tensor:
        """Add the gradients of one micro-batch. Return its share of the step's loss."""
        tokens, labels, inputs = self._to_device(batch)
        with compiled_pass(self.job_config), self.autocast:
            if self.pipeline:
                return self.pipeline.forward_backward(tokens, labels, inputs, global_tokens)
            pred = self.model_parts[0](tokens, **inputs)
            loss = self.loss_fn(pred, labels) / global_tokens
        del pred  # the backward pass needs its memory
        loss.backward()
        return loss.detach()

    def _to_device(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, Batch]:
        return self.model_inputs.on_device(batch, self.device, self.cp_mesh)

    def _after_step(self, stopping: bool) -> None:
        """Log, validate and save whatever is due after this step."""
        config, step = self.job_config, self.state.step
        last = step == config.training.steps
        ending = last or stopping
        logging_due = step == 1 or step % config.metrics.log_freq == 0 or ending
        # Validation may take longer than the time that a stopping run has left.
        validation_due = self.validator is not None and (
            last or (step % config.validation.freq == 0 and not stopping)
        )
        # After a bad step the weights may be bad, so only an ending run saves them.
        may_save = self._can_save and (ending or not self.guard.troubled)
        saving_due = may_save and self.checkpointer.is_due(step, ending)

        # A checkpoint of a model that holds NaN is worse than none, so check before saving. Before
        # validating, too: what the device has still to compute of these steps is not a pause.
        if logging_due or saving_due or validation_due:
            self._refuse_nonfinite_steps()
        if ending or saving_due:  # the sum of the next step would be too late
            self.block_calls.compare(step)
        if logging_due:
            self.stats.warn_of_missing_labels(step)
            self.metrics.log(
                step,
                loss=self.stats.mean_loss,
                max_loss=self.stats.max_loss,
                grad_norm=self.stats.grad_norm,
                lr=highest_of_ranks(self.stats.lr),  # of all stages
                ntokens_since_last=self.stats.tokens,
                tokens_seen=self.state.tokens_seen,
                data_wait_seconds=self.stats.data_wait,
                extra=joined_metrics(
                    self.block_norms.metrics(),
                    self.expert_balance.metrics(),
                    loader_metrics(self.dataloader),
                    loss_metrics(self.loss_fn),
                    self.guard.metrics(),
                    self.replicas.metrics(),
                    self.stragglers.metrics(),
                ),
            )
            self.stats = StepStats()
        with self.metrics.pause():
            if validation_due and not stopping:
                self._validate()
            if saving_due and self.guard.troubled:
                refuse_nonfinite_weights(self._parameters(), step)
            if may_save:
                self.checkpointer.save(step, last=ending)
            if validation_due and stopping:
                self._validate()
        self.metrics.show_checkpoint(self.checkpointer.last_saved)

    def _save_before_step(self) -> None:
        """Save the state of a run that is told to stop while it waits for its next step."""
        self.checkpointer.wait()  # until then, ranks may not know the same newest one
        step, newest = self.state.step, self.checkpointer.newest()
        if self._can_save and not (newest and newest.name == f"step-{step}"):
            self._refuse_nonfinite_steps()
            if self.guard.troubled:
                refuse_nonfinite_weights(self._parameters(), step)
            self.checkpointer.save(step, last=True)

    @property
    def _can_save(self) -> bool:
        """Whether the optimizer has state: to save one that has none, PyTorch makes it step."""
        return self.resumed or not self.first_step

    def _refuse_nonfinite_steps(self) -> None:
        for read_step in self.stats.read(self.parallel_dims):
            refuse_nonfinite_step(*read_step, self.checkpointer.newest)

    def _validate(self) -> None:
        seed_step(self.job_config.debug.seed, 0, self.random_rank)  # the same noise each time
        with evaluating(self.model_parts, self.fsdp_modules):
            loss = self.validator.validate(self.model_parts, self.evaluate)
        tell = getattr(self.validator, "metrics", dict)
        self.metrics.log_validation(self.state.step, loss, extra=tell())

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> torch.Tensor:
        """Return the summed loss of a batch, without gradients; 0 unless on the last stage."""
        self.watch.enter("after the step", self.state.step)
        batch = self.model_inputs.checked_for_validation(batch)
        self.agreement.check_first_validation(batch)
        tokens, labels, inputs = self._to_device(batch)
        with compiled_pass(self.job_config), self.autocast:
            if self.pipeline:
                return self.pipeline.evaluate(tokens, labels, inputs)
            return self.loss_fn(self.model_parts[0](tokens, **inputs), labels)

    def _roll_back(self) -> bool:
        """Return to the newest checkpoint, but continue with the data after this step.

        Returns False if there is no checkpoint yet, in which case the step is only skipped.
        """
        bad_step = self.state.step
        if self.checkpointer.roll_back(exclude=("dataloader", "guard")) is None:
            self.guard.cannot_roll_back(bad_step)
            return False
        self.guard.rolled_back(bad_step, self.state.step)
        self.metrics.start(self.state.step)
        self.stats = StepStats()
        return True

    def _count_tokens(self) -> None:
        sequences = self.batch_sizes.at(self.state.step)
        tokens = self.replicas.present(sequences * self.job_config.training.seq_len)
        if not self.guard.leaves_out:
            self.stats.tokens += tokens
            if not self.guard.troubled:
                self.state.tokens_seen += tokens

    def _state_of_replicas(self) -> dict[str, Any]:
        """Return the state that replica groups share: all but the position in the data."""
        self.checkpointer.wait_for_copy()  # a group takes over the state of another in place
        return self.run_state.state_dict(exclude=("dataloader",))

    def _meet_other_groups(self, stop: StopRequest) -> bool:
        """Return whether any rank was asked to stop while it waited for the groups in vain."""
        self.watch.enter("meeting of replica groups", self.state.step)
        self.optimizers.zero_grad()  # the meeting needs as much memory
        refuse_nonfinite_weights(self._parameters(), self.state.step)  # they would spread
        self.checkpointer.wait_for_copy()
        stopping = self.semi_sync.meet(stop)
        self.stage_copies.spread_weights()
        return stopping

    def _start_step(self) -> None:
        seed_step(self.job_config.debug.seed, self.state.step, self.random_rank)
        self.optimizers.zero_grad()

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [param for part in self.model_parts for param in part.parameters()]

    @contextmanager
    def _closing_on_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            add_memory_advice(error, self.job_config)
            patience = None if isinstance(error, TitanError) else _SECONDS_AFTER_A_FAILURE
            self.close(patience, failed=True)
            raise

    def close(self, save_timeout: float | None = None, failed: bool = False) -> None:
        """Stop the background threads and leave the process group. A second call does nothing.

        `save_timeout` is in seconds; a background save that takes longer is no longer waited for.
        `failed`: other ranks may be gone or never call this, and parts of `self` may not exist.
        """
        if self._closed:
            return
        self._closed = True
        # A rank alone waits for no other, and its process may go on with another trainer.
        self.may_hang = failed and exit_may_hang() and dist.get_world_size() > 1
        made = vars(self)
        with ExitStack() as closing:  # in reverse order, and all even if one fails
            if "metrics" in made:
                closing.callback(self.metrics.close)
            closing.callback(self._leave_group)
            if "checkpointer" in made:
                closing.callback(self._close_checkpointer, save_timeout)
            for name in ("validator", "dataloader", "replicas", "watch"):
                if hasattr(made.get(name), "close"):  # one that was refused may lack it
                    closing.callback(made[name].close)

    def _close_checkpointer(self, save_timeout: float | None) -> None:
        self.may_hang |= not self.checkpointer.close(save_timeout)

    def _leave_group(self) -> None:
        if dist.is_initialized() and not self.may_hang:
            dist.destroy_process_group()


@exit_on_user_error()
def main(argv: list[str] | None = None) -> int:
    """Train as the command line says. Return the exit code."""
    init_logger()
    if sys.__stderr__ and not faulthandler.is_enabled():
        faulthandler.enable(sys.__stderr__)  # prints the Python stack on a crash in native code
    job_config = load_config(sys.argv[1:] if argv is None else argv)
    if job_config.job.print_config:
        print_config(job_config)
    refuse_separate_tasks()
    trainer = None
    try:
        trainer = Trainer(job_config)
        finished = trainer.train()
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, Exception):
            show_tracebacks_once(lambda error: hide_secrets(first_line(error)))
        # Also when the trainer is only half made or has not begun its steps.
        if not (exit_may_hang() or (trainer and trainer.may_hang)):
            raise
        end_at_once(error)
    if finished:
        return 0
    if not (job_config.checkpoint.enable or job_config.fault_tolerance.enable):
        # Not PREEMPTED, with which a scheduler would restart the job, each time from step 0.
        raise TrainingError(
            f"stopped after step {trainer.state.step} of {job_config.training.steps}; nothing was "
            "saved, since checkpoint.enable is false, so a restart begins anew"
        )
    return PREEMPTED


if __name__ == "__main__":
    gc.freeze()  # imported objects stay alive, so no collection needs to look at them
    leave(main)
