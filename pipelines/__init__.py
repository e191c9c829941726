"""Batch jobs around the converter. Empty so far: Hub to Hub jobs come here."""
