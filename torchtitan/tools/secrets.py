"""Tokens and keys of the environment, which no log and no message may show."""

from __future__ import annotations

import os

NAMES = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "WANDB_API_KEY",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
)


def hide_secrets(text: str) -> str:
    """`text` with `***` in place of the secrets in it.

    Libraries quote them now and then: a token with a line break at its end is an illegal header,
    which the error shows.
    """
    for name in NAMES:
        value = os.environ.get(name, "").strip()
        if len(value) >= 4:
            text = text.replace(value, "***")
    return text
