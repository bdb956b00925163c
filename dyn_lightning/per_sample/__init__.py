"""The per-sample convolution, ``(sum_k routing_k weight_k) * x``: methods of equal value, and the choice between them.

``functional.dynamic_conv2d`` checks its arguments and calls these.
"""
