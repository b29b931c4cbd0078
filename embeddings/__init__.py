"""Sharded embedding tables: their configuration, the plan that places them, and the lookup of a batch's ids."""
