"""Answer prompts: requests in, pieces of answers out (``base``), here or elsewhere."""
