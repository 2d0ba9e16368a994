"""A page in the browser (extra `ui`): adapters beside the base, and adapters taught by marking words in texts."""

from .page import launch, require_gradio

__all__ = ["launch", "require_gradio"]
