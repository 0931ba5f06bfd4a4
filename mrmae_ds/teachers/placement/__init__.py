"""Placement of frozen teachers: resident, offloaded per step, streamed block-wise, sharded."""
