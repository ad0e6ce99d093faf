"""Documents become tokenised shards, shards become packed sequences, sequences become batches."""

from training.data.batches import Batch, BatchStream
from training.data.packing import PackedSequences
from training.data.prepare import prepare_shards
from training.data.shards import ShardReader

__all__ = ["Batch", "BatchStream", "PackedSequences", "ShardReader", "prepare_shards"]
