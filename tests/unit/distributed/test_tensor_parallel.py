from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleInputOutput,
    RowwiseParallel,
    SequenceParallel,
)

from torchtitan.distributed.tensor_parallel import DeferredOutputParallel, _with_whole_sequence

SHARDED = {
    "norm": SequenceParallel(),
    "attention": PrepareModuleInput(
        input_layouts=(Shard(1), None),
        desired_input_layouts=(Replicate(), None),
        input_kwarg_layouts={"x": Shard(1)},
        desired_input_kwarg_layouts={"x": Replicate()},
    ),
    "wq": ColwiseParallel(),
    "wo": RowwiseParallel(output_layouts=Shard(1)),
    "moe": PrepareModuleInputOutput(
        input_layouts=(Shard(1),),
        desired_input_layouts=(Replicate(),),
        output_layouts=(Replicate(),),
        desired_output_layouts=(Shard(1),),
    ),
    "output": ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1)),
    "deferred": DeferredOutputParallel(),
}


def test_a_plan_for_whole_sequences_leaves_all_else():
    whole = _with_whole_sequence(SHARDED)
    assert whole["norm"].sequence_sharding == (Replicate(),)
    assert whole["attention"].input_layouts == (Replicate(), None)
    assert whole["attention"].input_kwarg_layouts == {"x": Replicate()}
    assert vars(whole["wq"]) == vars(SHARDED["wq"])
    assert whole["wo"].input_layouts == (Shard(-1),)
    assert whole["wo"].output_layouts == (Replicate(),)
    assert whole["moe"].prepare_module_input.input_layouts == (Replicate(),)
    assert whole["moe"].prepare_module_output.desired_output_layouts == (Replicate(),)
    assert whole["output"].input_layouts == (Replicate(),)
    assert whole["output"].output_layouts == (Shard(-1),)
    assert whole["deferred"].input_layouts == (Replicate(),)


def test_the_plan_itself_stays_as_it_was():
    _with_whole_sequence(SHARDED)
    assert SHARDED["norm"].sequence_sharding == (Shard(1),)
    assert SHARDED["moe"].prepare_module_input.input_layouts == (Shard(1),)
