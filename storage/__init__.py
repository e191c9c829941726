"""Files, on a disk or on the Hub: addresses, the Hub's client, range reads, atomic writes, digests, stores."""
