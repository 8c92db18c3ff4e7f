"""Pipeline parallelism: the layers are spread evenly over the stages."""

from torchtitan.distributed.pipeline_parallel import build_pipeline as pipeline_transformers

__all__ = ["pipeline_transformers"]
