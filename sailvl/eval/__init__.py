"""Ask a model the questions of a benchmark, score the answers, and show what came out."""
