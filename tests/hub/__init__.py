"""A Hugging Face Hub on this machine, and the tests that run the real client against it."""
