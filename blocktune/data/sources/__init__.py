"""Sources of examples: files, data sets on the Hugging Face Hub, and generators."""
