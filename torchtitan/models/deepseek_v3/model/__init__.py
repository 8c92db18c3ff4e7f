from .args import DeepSeekV3ModelArgs
from .model import DeepSeekV3Model
from .state_dict_adapter import DeepSeekV3StateDictAdapter

__all__ = ["DeepSeekV3Model", "DeepSeekV3ModelArgs", "DeepSeekV3StateDictAdapter"]
