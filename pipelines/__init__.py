"""Jobs, transfers to and from the Hub, the model card, the report, and the whole command line."""
