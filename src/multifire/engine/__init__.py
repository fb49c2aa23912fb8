"""Networks on streams of frames: recordings and cameras."""
