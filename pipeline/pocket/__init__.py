"""The pocket model: a small Llama trained on a CPU that recalls far text, shipped with the code."""
