"""Reading model folders, and the packed encoder with its families.

`folder`, `weights`, `identity` and `hub` import no torch at module level; everything else here may.
"""
