from .args import Llama4ModelArgs
from .model import Llama4Model
from .state_dict_adapter import Llama4StateDictAdapter

__all__ = ["Llama4Model", "Llama4ModelArgs", "Llama4StateDictAdapter"]
