"""`CASES`: what the tests that all models share (tests/unit/models/test_every_model*.py) have to be
told of each."""

from model_cases import deepseek_v3, gemma3, gpt_oss, llama3, llama4, qwen3

CASES = {
    "llama3": llama3.CASE,
    "qwen3": qwen3.CASE,
    "deepseek_v3": deepseek_v3.CASE,
    "gpt_oss": gpt_oss.CASE,
    "llama4": llama4.CASE,
    "gemma3": gemma3.CASE,
}
"""Name of the model -> its case."""
