"""What a visitor is told when something goes wrong."""

from __future__ import annotations

import html
import logging
import re

import gradio as gr

from ...errors import LayerPruneError

logger = logging.getLogger(__name__)


def told_of(error: Exception) -> str:
    """One line: what we say, or Gradio does (of a used-up share of a GPU, say); of anything else no details."""
    if isinstance(error, LayerPruneError):
        return str(error)
    if isinstance(error, gr.Error):
        return html.unescape(re.sub(r"<[^>]*>", "", str(error.message)))
    logger.error("answering a visitor", exc_info=error)
    return "something went wrong on the server, and its log says what. Try once more, or something else."


def sentence_of(error: Exception) -> str:
    """The same, as it stands on the page."""
    text = told_of(error)
    return text[:1].upper() + text[1:]
