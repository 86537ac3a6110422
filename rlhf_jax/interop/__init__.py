"""Formats of other libraries: Hugging Face, safetensors, GGUF, PEFT, templates, tokenizers."""
