"""Cut Gemma 3 into pipeline stages, like every model with these module names."""

from torchtitan.distributed.pipeline_parallel import build_pipeline as pipeline_gemma3

__all__ = ["pipeline_gemma3"]
