"""Run networks on streams of frames from recordings and cameras."""
