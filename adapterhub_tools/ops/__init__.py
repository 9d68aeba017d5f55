"""One file for each verb: merge, inspect, validate, init, hash."""
