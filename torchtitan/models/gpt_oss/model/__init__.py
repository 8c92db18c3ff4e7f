from .args import GptOssModelArgs
from .model import GptOssModel
from .state_dict_adapter import GptOssStateDictAdapter

__all__ = ["GptOssModel", "GptOssModelArgs", "GptOssStateDictAdapter"]
