"""What `/metrics` says: the list of metrics, what an ingress counts, how ingresses share their counts."""
