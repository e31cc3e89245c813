"""Published methods for comparisons: `dcar evaluate --methods clip,mma,mmrl`."""
