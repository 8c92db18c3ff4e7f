from .args import TransformersArgs, config_of, smaller
from .model import TransformersModel
from .state_dict_adapter import TransformersStateDictAdapter

__all__ = [
    "TransformersArgs",
    "TransformersModel",
    "TransformersStateDictAdapter",
    "config_of",
    "smaller",
]
