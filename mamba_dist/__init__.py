"""Train Mamba language models on DeepSpeed, from raw text to generated text."""
