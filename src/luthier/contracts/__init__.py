"""Ground floor: what the rooms say to each other. Imports nothing of ours; import the file you need.

Letters used as suffixes of names, fixed for the whole project:
B row, T packed token, N scored token, S segment, Q sequence, P pair, G rollout in a group,
D width, V vocabulary, H head, R rank, L layer.
"""
