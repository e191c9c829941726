"""DFloat11's layout: checkpoints in it as sources of a conversion, and models written in it."""
