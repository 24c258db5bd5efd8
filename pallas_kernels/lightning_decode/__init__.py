"""Lightning attention of one token and of serving prefill. The engine does not call these kernels
yet.
"""
