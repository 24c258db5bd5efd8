"""Lightning attention of one token a sequence, and of serving prefill.

The engine does not call these kernels yet: its lightning attention is XLA code in
`m1_jax/serving/lightning.py`. `api` says how to call them; tests, `bench` and `schedule` of
`pallas_kernels.lightning_attention` do. docs/kernels.md, "What calls what", says what a connection
takes.
"""
