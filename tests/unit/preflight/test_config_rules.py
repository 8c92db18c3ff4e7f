import os
import sys
from pathlib import Path

import pytest

from torchtitan.config import JobConfig, load_config
from torchtitan.config.batch import batch_sizes, batches_to_skip
from torchtitan.config.data import DataSource
from torchtitan.config.optimizer import ParamRule
from torchtitan.errors import ConfigError
from torchtitan.preflight.portable import without_machine
from torchtitan.preflight.validate import validate


@pytest.fixture
def config(tmp_path):
    config = JobConfig()
    config.job.dump_folder = str(tmp_path / "outputs" / "run")
    return config


def error_of(config, world_size=1):
    with pytest.raises(ConfigError) as caught:
        validate(config, world_size)
    return str(caught.value)


def test_the_defaults_fit_any_world(config):
    for world_size in (1, 2, 6, 512):
        validate(config, world_size)
    assert not Path(config.job.dump_folder).exists()


@pytest.mark.parametrize(
    ("global_batch_size", "dp", "expected"),
    [(-1, 1, (8, 1)), (-1, 4, (32, 1)), (32, 4, (32, 1)), (32, 1, (32, 4))],
)
def test_batch_of_a_step(config, global_batch_size, dp, expected):
    config.training.global_batch_size = global_batch_size
    sizes = batch_sizes(config, dp)
    assert (sizes.largest, sizes.most_passes) == expected


@pytest.mark.parametrize(
    ("global_batch_size", "nearest", "other_ranks"),
    [
        (20, "16 or 24", ". Numbers of data ranks on which 20 works: 1, 5"),
        (4, "8", ". Numbers of data ranks on which 4 works: 1"),
        (9, "8 or 16", ""),
        # Tokens, by mistake: to try all numbers of ranks would take minutes.
        (
            4 * (10**10 + 1),
            "40000000000 or 40000000008",
            ". Numbers of data ranks on which 40000000004 works: 1, 101, 3541, 27961, 357641, "
            "2824061, 99009901, 10000000001",
        ),
    ],
)
def test_batch_that_does_not_divide(config, global_batch_size, nearest, other_ranks):
    config.training.global_batch_size = global_batch_size
    config.training.local_batch_size = 4
    message = (
        f"training.global_batch_size = {global_batch_size}: must be a multiple of "
        f"training.local_batch_size (4) x data ranks (2) = 8. Nearest: {nearest}{other_ranks}"
    )
    assert error_of(config, world_size=2) == message


def test_batches_that_grow(config):
    config.training.local_batch_size, config.training.global_batch_size = 2, 48
    config.training.batch_size_ramp = ["12:2", "32:5"]
    validate(config, 2)
    sizes = batch_sizes(config, 2)
    assert [sizes.at(step) for step in range(1, 8)] == [12, 12, 32, 32, 32, 48, 48]
    assert [sizes.through(step) for step in range(8)] == [0, 12, 24, 56, 88, 120, 168, 216]
    assert [sizes.passes(step) for step in (1, 3, 6)] == [3, 8, 12]
    assert (sizes.unit, sizes.units(3), sizes.largest) == (4, 14, 48)
    assert str(sizes) == "12 (to step 2), 32 (to step 5), 48"
    assert sizes.most_passes == 12


@pytest.mark.parametrize(
    ("ramp", "problem"),
    [
        (["8"], "'8' is no batch size with its last step, such as '512:2000'"),
        (["8:2", "0:3"], "'0:3' is no batch size with its last step, such as '512:2000'"),
        (["8:2", "16:2"], "'16:2' must have a larger size and step than '8:2'"),
        (["16:2", "8:3"], "'8:3' must have a larger size and step than '16:2'"),
        (["32:2"], "32 must be less than training.global_batch_size (32), the size after the ramp"),
        (
            ["8:2", "12:3"],
            "12 must be a multiple of training.local_batch_size (4) x data ranks (2) = 8. "
            "Nearest: 8 or 16. Numbers of data ranks on which 12 works: 1, 3",
        ),
    ],
)
def test_a_ramp_that_is_none(config, ramp, problem):
    config.training.local_batch_size, config.training.global_batch_size = 4, 32
    config.training.batch_size_ramp = ramp
    assert error_of(config, world_size=2) == f"training.batch_size_ramp: {problem}"


def test_a_ramp_needs_the_size_after_it(config):
    config.training.batch_size_ramp = ["8:2"]
    assert "needs training.global_batch_size, the size after the ramp" in error_of(config)


def test_messages_give_the_line_of_the_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("[training]\nlocal_batch_size = 2\n\nglobal_batch_size = 3\n")
    config = load_config(["--job.config_file", str(path)])
    start = f"{path}:4: [training] global_batch_size = 3: must be a multiple of"
    assert error_of(config).startswith(start)
    path.write_text("\n[parallelism]\ntensor_parallel_degree = 3\n")
    config = load_config(["--job.config_file", str(path)])
    message = error_of(config, world_size=4)
    assert message.startswith(f"{path}:3: [parallelism] tensor_parallel_degree = 3: ")
    assert "does not divide the world size 4" in message
    assert "Start a multiple of 3; or the product must be one of [1, 2, 4]" in message
    assert "Start a multiple of 3 (`torchrun --nproc-per-node 3 " in error_of(config)


@pytest.mark.parametrize(("section", "key"), [("job", "dump_folder"), ("checkpoint", "folder")])
def test_a_variable_in_a_folder(config, section, key):
    setattr(getattr(config, section), key, "$HOME/runs")
    assert error_of(config) == (
        f'{section}.{key} = "$HOME/runs": only `~` is expanded, not variables: write the path '
        "out (or ./$HOME/runs for a folder of that name)"
    )


def test_degrees_that_do_not_fit_the_world(config):
    config.parallelism.data_parallel_shard_degree = 4
    message = error_of(config, world_size=2)
    assert message.startswith("parallelism.data_parallel_shard_degree = 4: ")
    assert "Start 4 processes" in message


def test_sequence_that_tensor_parallel_ranks_cannot_share(config):
    config.parallelism.tensor_parallel_degree = 8
    config.training.seq_len = 100
    assert error_of(config, world_size=8) == (
        "training.seq_len = 100: must be a multiple of 8, since "
        "parallelism.tensor_parallel_degree (8) shards the sequence too, unless "
        "parallelism.disable_sequence_parallel is set. Nearest: 96 or 104"
    )
    config.training.seq_len = 104
    config.validation.enable = True
    validate(config, world_size=8)  # unset: that of training
    config.validation.enable = False
    config.validation.seq_len = 100
    validate(config, world_size=8)
    config.validation.enable = True
    assert error_of(config, world_size=8).startswith("validation.seq_len = 100: ")


def test_tensor_parallel_without_sequence_parallel_takes_any_sequence(config):
    config.parallelism.tensor_parallel_degree = 8
    config.parallelism.disable_sequence_parallel = True
    config.training.seq_len = 100
    validate(config, world_size=8)


def test_sequence_that_context_parallel_ranks_cannot_share(config):
    config.parallelism.context_parallel_degree = 3
    config.training.seq_len = 100
    assert error_of(config, world_size=3) == (
        "training.seq_len = 100: must be a multiple of 6, since "
        "parallelism.context_parallel_degree (3) cuts it into 6 chunks. Nearest: 96 or 102"
    )
    config.training.seq_len = 102
    validate(config, world_size=3)
    config.parallelism.tensor_parallel_degree = 4
    assert error_of(config, world_size=12) == (
        "training.seq_len = 102: must be a multiple of 12, since "
        "parallelism.context_parallel_degree (3) cuts it into 6 chunks and "
        "parallelism.tensor_parallel_degree (4) shards the sequence too, unless "
        "parallelism.disable_sequence_parallel is set. Nearest: 96 or 108"
    )
    config.parallelism.context_parallel_degree = 2
    config.training.seq_len = 12
    assert "must be a multiple of 8" in error_of(config, world_size=8)  # tp shards each half


def test_what_a_ring_cannot_do(config, monkeypatch):
    config.parallelism.context_parallel_degree = 2
    config.parallelism.context_parallel_method = "ring"
    config.training.mixed_precision_param = "float32"
    validate(config, world_size=2)
    monkeypatch.setattr("torchtitan.runtime.device.device_type", lambda: "cuda")
    assert "does not support float32. Use 'allgather'" in error_of(config, world_size=2)
    config.training.mixed_precision_param = "bfloat16"
    validate(config, world_size=2)
    config.model.attention = "flex"
    assert error_of(config, world_size=2) == (
        'parallelism.context_parallel_method = "ring": ring attention does not support flex '
        "attention (model.attention). Use 'allgather' or 'ulysses'"
    )
    config.training.document_mask = True
    assert "does not support training.document_mask" in error_of(config, world_size=2)
    config.parallelism.context_parallel_method = "ulysses"
    validate(config, world_size=2)


def test_what_async_tensor_parallel_needs(config, monkeypatch):
    config.parallelism.enable_async_tensor_parallel = True
    start = "parallelism.enable_async_tensor_parallel = true: "
    assert error_of(config, 2) == start + "needs parallelism.tensor_parallel_degree of 2 or more"
    config.parallelism.tensor_parallel_degree = 2
    assert error_of(config, 2).startswith(start + "needs the compiler: set compile.enable")
    config.compile.enable = True
    monkeypatch.setattr("torchtitan.runtime.device.device_type", lambda: "cpu")
    assert error_of(config, 2).startswith(start + "needs CUDA")
    monkeypatch.setattr("torchtitan.runtime.device.device_type", lambda: "cuda")
    validate(config, 2)
    config.model.converters = ["quantize.linear.float8"]
    assert "has no effect together with 'quantize.linear.float8'" in error_of(config, 2)
    config.model.converters = []
    config.parallelism.disable_sequence_parallel = True
    assert error_of(config, 2).startswith(start + "needs sequence parallel")


def test_offload_needs_sharding(config):
    config.training.enable_cpu_offload = True
    validate(config, world_size=2)
    assert error_of(config).startswith("training.enable_cpu_offload = true: needs sharded")
    config.parallelism.data_parallel_replicate_degree = 2
    assert "data_parallel_shard_degree is 1 with 2 processes" in error_of(config, world_size=2)


def test_unknown_dataset(config):
    config.training.dataset = "stdlb"
    message = error_of(config)
    start = "training.dataset = \"stdlb\": no such dataset. Did you mean 'stdlib'? Allowed: "
    assert message.startswith(start)
    config.training.dataset = "stdlib"
    config.validation.dataset = "c5"
    validate(config, 1)
    config.validation.enable = True
    assert error_of(config).startswith('validation.dataset = "c5": no such dataset.')


@pytest.mark.parametrize("name", ["text", "jsonl", "parquet"])
def test_own_files_need_a_path(config, name):
    config.training.dataset = name
    assert error_of(config) == (
        f'training.dataset = "{name}": needs training.dataset_path: a file, a glob or a folder'
    )
    config.training.dataset_path = "data/*"
    validate(config, 1)


def test_unknown_optimizer(config):
    config.optimizer.name = "AdmW"
    message = error_of(config)
    assert message.startswith(
        "optimizer.name = \"AdmW\": no such optimizer. Did you mean 'AdamW'? Allowed: Adam, AdamW, "
    )


@pytest.mark.parametrize(
    ("name", "key"),
    [("Adam", "beta2"), ("AdamW", "beta1"), ("Muon", "beta2"), ("Muon", "momentum")],
)
def test_state_in_bfloat16_must_change_by_more_than_it_rounds(config, name, key):
    config.optimizer.name, config.optimizer.state_dtype = name, "bfloat16"
    validate(config, 1)
    setattr(config.optimizer, key, 0.99)
    validate(config, 1)
    setattr(config.optimizer, key, 0.999)
    assert error_of(config) == (
        f"optimizer.{key} = 0.999: must be at most 0.99 with optimizer.state_dtype = 'bfloat16', "
        "which rounds smaller changes of the state to nothing. Or use optimizer.state_dtype = "
        "'float32'"
    )
    config.optimizer.state_dtype = "float32"
    validate(config, 1)


def test_the_momentum_of_sgd_has_one_precision(config):
    config.optimizer.name, config.optimizer.state_dtype = "SGD", "bfloat16"
    assert error_of(config) == (
        "optimizer.state_dtype = \"bfloat16\": SGD has 'float32' only. AdamW, Adam and Muon have "
        "both"
    )


def test_parameter_rules_need_a_valid_pattern(config):
    config.optimizer.rules = [ParamRule(r"layers\.0\..*"), ParamRule("(")]
    assert error_of(config).startswith(
        'optimizer.rules.1.pattern = "(": not a regular expression: missing )'
    )
    config.optimizer.rules = [ParamRule()]
    assert error_of(config) == "optimizer.rules.0: needs a pattern"


def test_a_run_may_be_shorter_than_its_warm_up(config):
    config.training.steps = config.lr_scheduler.warmup_steps // 2
    validate(config, 1)


def test_a_run_may_not_go_on_at_a_learning_rate_of_0(config):
    config.training.steps, config.lr_scheduler.total_steps = 100, 99
    assert error_of(config) == (
        "lr_scheduler.total_steps = 99: the learning rate is 0 from this step on, but "
        "training.steps = 100. Set it to 100 or more, or set lr_scheduler.min_lr_factor"
    )
    for section, key, value in (
        (config.lr_scheduler, "min_lr_factor", 0.1),
        (config.lr_scheduler, "decay_ratio", 0.0),
        (config.training, "steps", 99),
    ):
        before = getattr(section, key)
        setattr(section, key, value)
        validate(config, 1)
        setattr(section, key, before)


def test_selective_checkpointing_option(config):
    for option in ("op", "1", "12"):
        config.activation_checkpoint.selective_ac_option = option
        validate(config, 1)
    for option in ("ops", "0", "-1", "1.5", "", "²"):
        config.activation_checkpoint.selective_ac_option = option
        message = error_of(config)
        assert message.endswith(": must be 'op', or a positive integer N for every N-th block")


def test_memory_budget_needs_the_compiler(config):
    config.activation_checkpoint.mode = "memory_budget"
    assert error_of(config) == (
        'activation_checkpoint.mode = "memory_budget": needs the compiler: set compile.enable, '
        "with 'model' in compile.components"
    )
    config.compile.enable = True
    validate(config, 1)
    config.compile.components = ["loss"]
    assert error_of(config).startswith("activation_checkpoint.mode")


def test_unknown_compiler_backend(config):
    config.compile.backend = "inducter"
    validate(config, 1)
    config.compile.enable = True
    message = error_of(config)
    assert message.startswith('compile.backend = "inducter": no such backend. Did you mean')
    assert "inductor" in message
    config.compile.backend = "aot_eager"
    validate(config, 1)


def test_resuming_without_checkpoints(config):
    config.checkpoint.load_step = 100
    assert error_of(config) == (
        "checkpoint.load_step = 100: has no effect, since checkpoint.enable is false"
    )
    config.checkpoint.enable = True
    validate(config, 1)


def test_missing_initial_checkpoint(config, tmp_path):
    config.checkpoint.initial_load_path = str(tmp_path / "step-5")
    assert error_of(config).endswith('step-5": no such folder')
    (tmp_path / "step-5").mkdir()
    validate(config, 1)


def test_no_more_steps_are_traced_than_there_are_between_traces(config):
    config.profiling.profile_freq = config.profiling.profiler_active = 3
    validate(config, 1)
    config.profiling.profiler_active = 4
    assert error_of(config) == (
        "profiling.profiler_active = 4: must be at most profiling.profile_freq (3)"
    )


def test_a_run_branches_from_a_whole_checkpoint(config, tmp_path):
    config.checkpoint.initial_load_model_only = False
    assert error_of(config) == (
        "checkpoint.initial_load_model_only = false: there is no checkpoint to branch from: set "
        "checkpoint.initial_load_path"
    )
    config.checkpoint.initial_load_path = str(tmp_path)
    validate(config, 1)
    config.checkpoint.initial_load_exclude = "^output"
    assert 'initial_load_exclude = "^output": has no effect, since' in error_of(config)
    config.checkpoint.initial_load_exclude = ""
    (tmp_path / "model.safetensors").touch()
    assert error_of(config) == (
        "checkpoint.initial_load_model_only = false: a Hugging Face folder holds only weights. Set "
        "true, or branch from a step-N"
    )
    config.checkpoint.initial_load_model_only = True
    validate(config, 1)


def test_output_folder_that_cannot_be_made(config, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    config.job.dump_folder = str(tmp_path / "file" / "run")
    assert error_of(config).endswith(f"{tmp_path / 'file'} is a file, not a folder")
    config.job.dump_folder = str(tmp_path / "run")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    assert f"{tmp_path} is not writable" in error_of(config)


@pytest.mark.parametrize("name, package", [("wandb", "'torchtitan[wandb]'"), ("tensorboard",) * 2])
def test_a_sink_whose_package_is_not_installed(config, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, name, None)
    setattr(config.metrics, f"enable_{name}", True)
    assert f"{name} is not installed: pip install {package}" in error_of(config)
    validate(without_machine(config, 1), 1)


def test_expert_parallel_needs_experts_that_divide(config):
    config.parallelism.expert_parallel_degree = 2
    assert error_of(config, world_size=2) == (
        "parallelism.expert_parallel_degree = 2: must be 1, because llama3 debugmodel has no "
        "experts"
    )
    config.model.name, config.model.flavor = "qwen3", "debugmodel_moe"
    validate(config, world_size=2)
    config.parallelism.expert_parallel_degree = 3
    assert error_of(config, world_size=3) == (
        "parallelism.expert_parallel_degree = 3: must divide the 8 experts of qwen3 "
        "debugmodel_moe. Degrees that do: 1, 2, 4, 8"
    )


def test_a_degree_that_is_wrong_is_named_where_another_is_larger(config):
    """Not the largest of all, such as that of tensor parallelism here."""
    config.model.name, config.model.flavor = "qwen3", "debugmodel_moe"
    config.parallelism.tensor_parallel_degree = 8
    config.parallelism.expert_parallel_degree = 3
    problem = error_of(config, world_size=8)
    assert problem.startswith("parallelism.expert_parallel_degree = 3: expert_parallel_degree (3)")
    config.parallelism.expert_parallel_degree = 1
    config.parallelism.expert_tensor_parallel_degree = 2
    problem = error_of(config, world_size=8)
    assert problem.startswith("parallelism.expert_tensor_parallel_degree = 2: expert_tensor")
    config.parallelism.expert_parallel_degree = 16  # no factor of the world
    assert error_of(config, world_size=12).startswith("parallelism.tensor_parallel_degree = 8: ")


def test_expert_tensor_parallel_needs_experts(config):
    config.parallelism.tensor_parallel_degree = 2
    config.parallelism.expert_tensor_parallel_degree = 2
    assert "expert_tensor_parallel_degree = 2: must be 1, because llama3" in error_of(
        config, world_size=2
    )
    config.model.name, config.model.flavor = "qwen3", "debugmodel_moe"
    validate(config, world_size=2)


def test_each_rank_of_tensor_parallel_routes_a_part_of_a_whole_sequence(config):
    config.parallelism.tensor_parallel_degree = 2
    config.parallelism.disable_sequence_parallel = True
    config.training.seq_len = 101
    validate(config, world_size=2)
    config.model.name, config.model.flavor = "qwen3", "debugmodel_moe"
    message = error_of(config, world_size=2)
    assert message == (
        "training.seq_len = 101: must be a multiple of 2, since parallelism.tensor_parallel_degree "
        "(2) routes shards of it to the experts. Nearest: 100 or 102"
    )


@pytest.mark.parametrize("degree", ["tensor_parallel_degree", "context_parallel_degree"])
def test_a_memory_budget_needs_blocks_that_do_not_communicate(degree):
    config = JobConfig()
    config.activation_checkpoint.mode = "memory_budget"
    config.compile.enable = True
    setattr(config.parallelism, degree, 2)
    with pytest.raises(ConfigError, match=r"activation_checkpoint.mode.*blocks that communicate"):
        validate(config, world_size=2)


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_what_cuda_graphs_need(config, monkeypatch, mode):
    config.compile.mode = mode
    start = f'compile.mode = "{mode}": '
    assert error_of(config).startswith(start + "set compile.enable")
    config.compile.enable, config.compile.backend = True, "aot_eager"
    assert "compile.backend = 'inductor', the only backend with modes" in error_of(config)
    config.compile.backend = "inductor"
    monkeypatch.setattr("torchtitan.runtime.device.device_type", lambda: "cpu")
    assert error_of(config).startswith(start + "CUDA graphs need a GPU")
    monkeypatch.setattr("torchtitan.runtime.device.device_type", lambda: "cuda")
    validate(config, 1)
    assert "gather them to new addresses each time" in error_of(config, 2)
    config.training.local_batch_size, config.training.global_batch_size = 2, 4
    assert "do not support gradient accumulation" in error_of(config)


def test_tuning_of_kernels_needs_only_the_compiler(config):
    config.compile.mode = "max-autotune-no-cudagraphs"
    assert "set compile.enable" in error_of(config)
    config.compile.enable = True
    validate(config, 2)


def test_urls_of_checkpoints_are_looked_at_before_the_run(config):
    config.checkpoint.enable = True
    config.checkpoint.folder = "memory://bucket/run"
    config.checkpoint.initial_load_path = "memory://bucket/other/step-2"
    validate(config, 1)
    config.checkpoint.folder = "nothing://bucket"
    assert "checkpoint.folder = nothing://bucket: fsspec does not support nothing://" in error_of(
        config
    )
    config.checkpoint.folder = "checkpoint"
    config.checkpoint.initial_load_path = "nothing://bucket"
    assert error_of(config).startswith("checkpoint.initial_load_path = nothing://bucket")


def test_hugging_face_folders_are_local(config):
    config.checkpoint.enable = config.checkpoint.last_save_in_hf = True
    config.checkpoint.folder = "memory://bucket/run"
    message = error_of(config)
    assert message.startswith("checkpoint.last_save_in_hf") and "convert to-hf" in message
    config.checkpoint.last_save_in_hf, config.checkpoint.initial_load_in_hf = False, True
    config.checkpoint.initial_load_path = "memory://bucket/other"
    assert "read from local folders" in error_of(config)


def test_a_rollback_needs_checkpoints(config):
    config.training.on_spike = "rollback"
    message = "training.on_spike = 'rollback': there is no checkpoint to roll back to"
    assert error_of(config).replace('"', "'").startswith(message)
    config.checkpoint.enable = True
    validate(config, 1)


@pytest.mark.parametrize("item", ["0", "9-7", "1-", "-3", "1,2", "two", "", "9" * 5000, "\u0663"])
def test_batches_to_skip_are_numbers_or_ranges(item, config):
    config.training.skip_batches = ["1", "2-2", "3-70", item]
    assert "training.skip_batches" in error_of(config) and "'1001-1250'" in error_of(config)
    del config.training.skip_batches[-1]
    validate(config, 1)
    assert batches_to_skip(config) == [range(1, 2), range(2, 3), range(3, 71)]


def test_a_replay_on_cuda_needs_deterministic_kernels(config, monkeypatch):
    config.training.replay_freq = 10
    validate(config, 1)
    monkeypatch.setattr("torchtitan.runtime.device.device_type", lambda: "cuda")
    assert "training.replay_freq = 10: CUDA kernels" in error_of(config)
    config.debug.deterministic = True
    validate(config, 1)


def test_a_hang_is_found_before_the_timeout(config):
    config.comm.timeout_seconds = 60
    validate(config, 1)
    config.comm.hang_seconds = 60
    assert "comm.hang_seconds = 60: must be less than comm.timeout_seconds (60)" in error_of(config)


def test_checkpoints_to_keep_for_good_must_be_saved(config):
    config.checkpoint.interval, config.checkpoint.keep_every = 500, 5000
    validate(config, 1)
    config.checkpoint.keep_every = 1250
    message = "checkpoint.keep_every = 1250: must be a multiple of checkpoint.interval (500)"
    assert message in error_of(config) and error_of(config).endswith("Nearest: 1000")
    config.checkpoint.keep_every = 100
    assert error_of(config).endswith("Nearest: 500")


def test_steps_to_keep_are_those_after_training(config):
    config.checkpoint.keep_steps = [1, 4]
    validate(config, 1)
    config.checkpoint.keep_steps = [0, 1]
    assert "checkpoint.keep_steps: has 0, but the first step is 1" in error_of(config)


def test_a_rank_to_profile_exists(config):
    config.profiling.ranks = [7, 9]
    validate(config, 8)  # started with 16, perhaps
    config.profiling.ranks = [8]
    message = "profiling.ranks: no rank 8: this job has the ranks 0 to 7"
    assert message in error_of(config, world_size=8)
    config.profiling.ranks = [-1, 2]
    assert "profiling.ranks: no rank -1" in error_of(config, world_size=8)


def test_what_stragglers_cannot_be_measured_with(config):
    config.metrics.straggler_freq = 10
    validate(config, 1)
    config.compile.enable = True
    assert "metrics.straggler_freq = 10: collectives of compiled models" in error_of(config)


def test_what_replica_groups_need(config, monkeypatch):
    group = config.fault_tolerance
    group.semi_sync_method = "diloco"
    assert "fault_tolerance.semi_sync_method = 'diloco': needs" in error_of(config).replace(
        '"', "'"
    )
    group.semi_sync_method, group.enable = "none", True
    find_spec = "torchtitan.preflight.survival_rules.importlib.util.find_spec"
    monkeypatch.setattr(find_spec, lambda name: None)
    assert "fault_tolerance.enable = true: torchft is not installed: pip install" in error_of(
        config
    )
    monkeypatch.setattr(find_spec, lambda name: object())
    monkeypatch.delenv("TORCHFT_LIGHTHOUSE", raising=False)
    assert "TORCHFT_LIGHTHOUSE" in error_of(config)
    monkeypatch.setenv("TORCHFT_LIGHTHOUSE", "localhost:1")
    assert "http://HOST:29510 (it is 'localhost:1')" in error_of(config)
    monkeypatch.setenv("TORCHFT_LIGHTHOUSE", "http://localhost:1")
    monkeypatch.delenv("RANK", raising=False)
    assert "needs torchrun" in error_of(config)
    monkeypatch.setenv("RANK", "0")
    validate(config, 1)
    group.replica_id = 1
    assert "fault_tolerance.replica_id = 1: must be less than" in error_of(config)
    group.replica_id, group.min_replica_size = 0, 2
    assert "fault_tolerance.min_replica_size = 2: must be at most" in error_of(config)
    group.group_size = 2
    config.training.on_nonfinite, config.checkpoint.enable = "rollback", True
    assert "cannot roll back together" in error_of(config)
    config.training.on_nonfinite, config.training.global_batch_size = "error", 8
    assert "data ranks (2)" in error_of(config)
    config.training.global_batch_size = -1
    checkpoint = config.checkpoint
    checkpoint.initial_load_model_only = False
    for name, refused in ("replica-1", True), ("replica-0", False), ("elsewhere", False):
        checkpoint.initial_load_path = f"memory://runs/a/{name}/step-4"
        assert not refused or "position in the data is not that of replica-0" in error_of(config)
        if not refused:
            validate(config, 1)
    checkpoint.initial_load_path = "memory://runs/a/replica-1/step-4"
    checkpoint.exclude_from_loading = ["dataloader"]
    validate(config, 1)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("dataset", "c4"), ("dataset_path", "none.jsonl")),
        *(("split", "test"), ("text_key", "content")),
    ],
)
def test_a_dataset_beside_validation_sources_would_be_ignored(config, key, value):
    config.validation.enable = True
    config.validation.sources = [DataSource(dataset="stdlib"), DataSource("two", "stdlib")]
    validate(config, 1)
    setattr(config.validation, key, value)
    problem = "has no effect, since validation.sources defines the data"
    assert f"validation.{key} = {value!r}: {problem}".replace("'", '"') in error_of(config)


def test_sources_of_a_validation_can_be_told_apart(config):
    config.validation.enable = True
    config.validation.sources = [DataSource(dataset="stdlib"), DataSource(dataset="stdlib")]
    assert "'stdlib' is also the name of another source" in error_of(config)
    config.validation.sources = [DataSource(dataset="stdlib", weight=0.0)]
    assert "validation.sources" in error_of(config)
    config.validation.sources = [DataSource(dataset="jsonl")]
    assert "needs validation.sources.0.dataset_path" in error_of(config)


@pytest.mark.parametrize(
    ("key", "value"), [("dataset", "c4"), ("dataset_path", "none.jsonl"), ("split", "test")]
)
def test_a_dataset_of_training_beside_sources_would_be_ignored(tmp_path, key, value):
    file = tmp_path / "mix.toml"
    sources = '[[data.sources]]\ndataset = "stdlib"\n'
    file.write_text(f'[training]\ntext_key = "content"\n{sources}')
    argv = ["--job.config_file", str(file), "--job.dump_folder", str(tmp_path / "out")]
    validate(load_config(argv), 1)
    problem = f'{key} = "{value}": has no effect, since data.sources defines the data'
    assert f"training.{problem}" in error_of(load_config([*argv, f"--training.{key}={value}"]))
    file.write_text(f'[training]\n{key} = "{value}"\n{sources}')
    assert f"mix.toml:2: [training] {problem}" in error_of(load_config(argv))
