"""Published methods for comparisons, such as `dcar evaluate --methods clip,lora`."""
