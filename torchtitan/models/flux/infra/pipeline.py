"""Cut FLUX.1 into pipeline stages."""

from functools import partial

from torchtitan.distributed.pipeline_parallel import build_pipeline

pipeline_flux = partial(
    build_pipeline,
    first_modules=("image_in", "text_in", "condition"),
    last_modules=("output",),
)
