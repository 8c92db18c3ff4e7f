"""Cut gpt-oss into pipeline stages, like every model with these module names."""

from torchtitan.distributed.pipeline_parallel import build_pipeline as pipeline_gpt_oss

__all__ = ["pipeline_gpt_oss"]
