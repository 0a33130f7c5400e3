"""Answer prompts: records and pictures in, completions out, in the same order."""
