"""One forward per distinct clip: memory, disk, leases, peers, batches."""
