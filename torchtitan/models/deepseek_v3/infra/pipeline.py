"""Cut DeepSeek-V3 into pipeline stages, like every model with these module names."""

from torchtitan.distributed.pipeline_parallel import build_pipeline as pipeline_deepseek_v3

__all__ = ["pipeline_deepseek_v3"]
