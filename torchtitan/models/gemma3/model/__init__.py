from .args import Gemma3ModelArgs
from .model import Gemma3Model
from .state_dict_adapter import Gemma3StateDictAdapter

__all__ = ["Gemma3Model", "Gemma3ModelArgs", "Gemma3StateDictAdapter"]
