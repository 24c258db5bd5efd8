"""The model over ragged batches: tokens of many sequences, with their slots and pages."""
