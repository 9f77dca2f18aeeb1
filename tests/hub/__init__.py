"""A Hugging Face hub on this machine, for the real clients of models and data sets to talk to."""
