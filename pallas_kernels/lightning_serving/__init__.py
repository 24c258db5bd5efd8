"""Lightning attention of serving: one TPU kernel for prefill, decoding and verification."""
