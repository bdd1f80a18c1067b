"""Where `count_f_grams_on_spark` was before; it is in `scone.tokenization.counting.spark`."""

from scone.tokenization.counting.spark import count_f_grams_on_spark

__all__ = ["count_f_grams_on_spark"]
