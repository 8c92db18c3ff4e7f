from .args import FluxModelArgs
from .model import FluxModel
from .state_dict_adapter import FluxStateDictAdapter

__all__ = ["FluxModel", "FluxModelArgs", "FluxStateDictAdapter"]
