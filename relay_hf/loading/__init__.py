"""Models and tokenizers by name, a folder or a Hub id; every failure is an error of one sentence."""
