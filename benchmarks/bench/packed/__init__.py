"""GGUF files here and in llama.cpp."""
