"""Models: caption encoder, vision towers, adapter, and the CLIP model made of them."""

from llm2clip.models.adapter import TextAdapter
from llm2clip.models.caption_encoder import CaptionEncoder
from llm2clip.models.groups import group_of, no_decay, parameter_groups
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.llm_files import convert_gguf
from llm2clip.models.model_card import ModelCard
from llm2clip.models.published import CheckpointOptions
from llm2clip.models.tokens import CaptionBatch, Tokens
from llm2clip.models.vision import VisionTower, build_vision_tower

__all__ = [
    "LLM2CLIP",
    "CaptionBatch",
    "CaptionEncoder",
    "CheckpointOptions",
    "ModelCard",
    "TextAdapter",
    "Tokens",
    "VisionTower",
    "build_vision_tower",
    "convert_gguf",
    "group_of",
    "no_decay",
    "parameter_groups",
]
