"""Time to first token of vLLM: cold, with kvlayer, with its own prefix cache. See ``__main__``."""
