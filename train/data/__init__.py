"""Files to batches: records, mixture, packing, prefetch, placement. Imports no model."""
