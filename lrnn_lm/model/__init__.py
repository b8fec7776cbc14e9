"""The Hugging Face model: configuration, modelling, loss, accounting."""

from .config import LRNNConfig
from .modeling import LRNNForCausalLM, LRNNModel, LRNNPreTrainedModel

__all__ = ["LRNNConfig", "LRNNForCausalLM", "LRNNModel", "LRNNPreTrainedModel"]
