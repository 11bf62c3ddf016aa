"""Data: sources -> examples -> layouts -> batches."""
