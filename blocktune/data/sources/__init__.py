"""Sources of examples: files of public sets, the Hugging Face Hub, generated ones."""
