from .args import Qwen3ModelArgs
from .model import Qwen3Model
from .state_dict_adapter import Qwen3StateDictAdapter

__all__ = ["Qwen3Model", "Qwen3ModelArgs", "Qwen3StateDictAdapter"]
