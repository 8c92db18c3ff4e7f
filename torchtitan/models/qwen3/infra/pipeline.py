"""Cut Qwen3 into pipeline stages, like every model with these module names."""

from torchtitan.distributed.pipeline_parallel import build_pipeline as pipeline_qwen3

__all__ = ["pipeline_qwen3"]
