"""Cut DeepSeek-V3 into pipeline stages. The last one also predicts the tokens after the next."""

from functools import partial

from torchtitan.distributed.pipeline_parallel import LAST_MODULES, build_pipeline

pipeline_deepseek_v3 = partial(
    build_pipeline, last_modules=(*LAST_MODULES, "mtp_embeddings", "mtp")
)
