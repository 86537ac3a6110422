"""Other people's formats: Hugging Face, safetensors, GGUF, PEFT, chat templates, tokenizers."""
