"""Runs a plan: reads by store, computes by methods, writes by store."""
