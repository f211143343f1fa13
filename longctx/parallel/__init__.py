"""Sequences over a device mesh: the mesh, the sharding rules, and every op as one span per device."""
