"""The only I/O below floor 2: files and folders that appear whole, remote paths, locks, barriers, digests."""
