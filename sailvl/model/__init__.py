"""The model: configuration, vision encoder, projector, language model glue, processor, checkpoints.

Read in this order: configuration, vit, projector, attention, moe, modeling, processing, checkpoint.
Importing this package loads torch and transformers, and makes the Auto classes know the architecture.
"""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from .configuration import SailViTConfig, SailVLConfig
from .modeling import SailVLForConditionalGeneration, SailVLModel, SailVLMoeForConditionalGeneration
from .processing import SailVLImageProcessor, SailVLProcessor
from .tiles import SailViTImageProcessor
from .vit import SailViT

AutoConfig.register("sailvit", SailViTConfig, exist_ok=True)
AutoConfig.register("sailvl", SailVLConfig, exist_ok=True)

AutoModel.register(SailViTConfig, SailViT, exist_ok=True)
AutoModel.register(SailVLConfig, SailVLModel, exist_ok=True)
AutoModelForImageTextToText.register(SailVLConfig, SailVLForConditionalGeneration, exist_ok=True)
AutoModelForMultimodalLM.register(SailVLConfig, SailVLForConditionalGeneration, exist_ok=True)
AutoImageProcessor.register(SailVLConfig, image_processor_classes={"pil": SailVLImageProcessor}, exist_ok=True)
AutoImageProcessor.register(SailViTConfig, image_processor_classes={"pil": SailViTImageProcessor}, exist_ok=True)
AutoProcessor.register(SailVLConfig, SailVLProcessor, exist_ok=True)

__all__ = [
    "SailVLConfig",
    "SailVLForConditionalGeneration",
    "SailVLImageProcessor",
    "SailVLModel",
    "SailVLMoeForConditionalGeneration",
    "SailVLProcessor",
    "SailViT",
    "SailViTConfig",
    "SailViTImageProcessor",
]
