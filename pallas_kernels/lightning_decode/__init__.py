"""Lightning attention of one token a sequence, and of serving prefill.

The engine does not call these kernels yet. Its lightning attention is XLA code in
`m1_jax/serving/lightning.py`. `api` is the entry. Today its callers are the tests and the commands
`bench` and `schedule` of `pallas_kernels.lightning_attention`. docs/kernels.md, "What calls what",
says what a connection to the engine takes.
"""
