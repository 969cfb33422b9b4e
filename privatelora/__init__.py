"""PrivateLoRA: a language model in the cloud, its personal parameters on your device."""

__version__ = "0.1.0"
