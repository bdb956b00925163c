"""How fast is the per-sample convolution? See ``__main__``."""
