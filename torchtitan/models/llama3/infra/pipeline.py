"""Cut Llama 3 into pipeline stages, like every model with these module names."""

from torchtitan.distributed.pipeline_parallel import build_pipeline as pipeline_llama

__all__ = ["pipeline_llama"]
