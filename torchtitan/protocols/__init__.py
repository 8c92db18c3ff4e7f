"""The contracts a model author writes against; no machinery."""

from .model import BaseModelArgs, ModelProtocol
from .state_dict_adapter import BaseStateDictAdapter
from .train_spec import TrainSpec, register_train_spec

__all__ = [
    "BaseModelArgs",
    "BaseStateDictAdapter",
    "ModelProtocol",
    "TrainSpec",
    "register_train_spec",
]
