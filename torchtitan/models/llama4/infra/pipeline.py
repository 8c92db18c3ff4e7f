"""Cut Llama 4 into pipeline stages, like every model with these module names."""

from torchtitan.distributed.pipeline_parallel import build_pipeline as pipeline_llama4

__all__ = ["pipeline_llama4"]
