"""Meshes, sharding rules, and the one place where shard_map appears."""
