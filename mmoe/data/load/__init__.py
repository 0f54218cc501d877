"""Decode planned documents and collate them into batches, in worker processes; decides nothing about their order."""
