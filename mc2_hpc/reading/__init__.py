"""Readers of what comes from outside: nothing in a file is believed before its kind, size and types are checked.

    from mc2_hpc.reading.json_file import read_json
    card = read_json(path, Card)  # Card: a msgspec.Struct beside the code that owns the format

Every reader opens regular files only, bounds what it takes into memory, and raises a one-line
:class:`~mc2_hpc.errors.UserError` that names the file, the place in it, and what was expected there.

=============  ================================================================================
files          regular files: opened without waiting, bounded, as bytes or text
json_file      JSON to a typed value: one schema for each kind of file
yaml_file      YAML to a tree that keeps what was written and where
settings       that tree, with ``key.sub=value`` overrides, to a dataclass
arrays         NPY and NPZ: element type, dimensions and length
parquet_file   Parquet: each expected column once, of the expected type
tensors        headers of safetensors files: names, element types, shapes, offsets
=============  ================================================================================
"""
