"""Models in the layouts of other programs: Hugging Face, open_clip, ONNX, and LLMs with their adapter merged."""

from llm2clip.export.run import export

__all__ = ["export"]
