from .args import Llama3ModelArgs
from .model import Llama3Model
from .state_dict_adapter import Llama3StateDictAdapter

__all__ = ["Llama3Model", "Llama3ModelArgs", "Llama3StateDictAdapter"]
