"""Two sets of pictures of the same prompts, compared by their scores: what `diffalign compare` does."""
