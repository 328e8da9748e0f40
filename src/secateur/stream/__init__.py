"""Language models made sparse block by block, from shards on the disk to shards on the disk."""

from secateur.stream.block import Rule
from secateur.stream.run import Stream, Streamed
from secateur.stream.shards import Shards
from secateur.stream.skeleton import Skeleton

__all__ = ["Rule", "Shards", "Skeleton", "Stream", "Streamed"]
