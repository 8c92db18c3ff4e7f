"""Hides tokens and keys of the environment and of URLs in logs and messages."""

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
    r"|([?&;](?:[\w-]*(?:signature|token|secret|password|(?:api|account|access)[-_]?key)|sig)=)[^\s&;\"'<\\]+",
    re.IGNORECASE,
)
"""The password of `s3://USER:PASSWORD@HOST`, and signatures of URLs. A backslash ends a signature,
since it belongs to what follows, such as a quote in TOML."""


def hide_secrets(text: str) -> str:
    """Return `text` with `***` in place of its secrets.

    Libraries quote secrets at times: a token that ends with a line break is an illegal header, and
    the error shows it.
    """
    for name in NAMES:
        value = os.environ.get(name, "").strip()
        if len(value) >= 4:
            text = text.replace(value, "***")
    return _OF_URLS.sub(lambda found: f"{found[1] or found[2]}***", text)
