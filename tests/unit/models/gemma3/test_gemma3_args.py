import dataclasses

from model_cases.gemma3 import HF_CONFIG

from torchtitan.models.gemma3 import MODEL_CONFIGS, Gemma3ModelArgs


def test_five_layers_have_a_window_and_the_sixth_has_none():
    args = MODEL_CONFIGS["1B"]
    full = [layer for layer in range(args.n_layers) if not args.has_window(layer)]
    assert full == [5, 11, 17, 23]


def test_linear_scaling_is_of_layers_without_a_window():
    scaling = {"factor": 8.0, "rope_type": "linear"}
    args = Gemma3ModelArgs.from_hf_config(HF_CONFIG | {"rope_scaling": scaling})
    assert args == dataclasses.replace(MODEL_CONFIGS["1B"], rope_factor=8.0)
