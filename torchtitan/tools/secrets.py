"""Tokens and keys of the environment and of URLs, which no log and no message may show."""

from __future__ import annotations

import os
import re

NAMES = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "WANDB_API_KEY",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
)
_OF_URLS = re.compile(
    r"(://[^\s/@:]*:)[^\s/@]+(?=@)"
    r"|([?&;](?:x-(?:amz|goog)-)?(?:signature|sig|security-token)=)[^\s&\"'<]+",
    re.IGNORECASE,
)
"""The password of `s3://USER:PASSWORD@HOST`, and what signs a URL."""


def hide_secrets(text: str) -> str:
    """`text` with `***` in place of the secrets in it.

    Libraries quote them now and then: a token with a line break at its end is an illegal header,
    which the error shows.
    """
    for name in NAMES:
        value = os.environ.get(name, "").strip()
        if len(value) >= 4:
            text = text.replace(value, "***")
    return _OF_URLS.sub(lambda found: f"{found[1] or found[2]}***", text)
