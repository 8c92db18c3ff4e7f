"""The interfaces that a model author implements, without machinery."""

from .model import BaseModelArgs, ModelProtocol, layers_of
from .model_converter import ModelConverter, register_model_converter
from .state_dict_adapter import BaseStateDictAdapter
from .train_spec import TrainSpec, register_train_spec

__all__ = [
    "BaseModelArgs",
    "BaseStateDictAdapter",
    "ModelConverter",
    "ModelProtocol",
    "TrainSpec",
    "layers_of",
    "register_model_converter",
    "register_train_spec",
]
