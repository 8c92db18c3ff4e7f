"""The models. Each folder is self-contained; this table makes them known to the trainer."""

from pathlib import Path

from torchtitan.models.import_errors import import_each
from torchtitan.protocols.train_spec import MODEL_REGISTRY

import_each(__name__, Path(__file__).parent)

from .deepseek_v3 import get_train_spec as get_deepseek_v3_train_spec
from .flux import get_train_spec as get_flux_train_spec
from .gemma3 import get_train_spec as get_gemma3_train_spec
from .gpt_oss import get_train_spec as get_gpt_oss_train_spec
from .llama3 import get_train_spec as get_llama3_train_spec
from .llama4 import get_train_spec as get_llama4_train_spec
from .qwen3 import get_train_spec as get_qwen3_train_spec
from .transformers import get_train_spec as get_transformers_train_spec

MODEL_REGISTRY["deepseek_v3"] = get_deepseek_v3_train_spec
MODEL_REGISTRY["flux"] = get_flux_train_spec
MODEL_REGISTRY["gemma3"] = get_gemma3_train_spec
MODEL_REGISTRY["gpt_oss"] = get_gpt_oss_train_spec
MODEL_REGISTRY["llama3"] = get_llama3_train_spec
MODEL_REGISTRY["llama4"] = get_llama4_train_spec
MODEL_REGISTRY["qwen3"] = get_qwen3_train_spec
MODEL_REGISTRY["transformers"] = get_transformers_train_spec

__all__ = ["MODEL_REGISTRY"]
