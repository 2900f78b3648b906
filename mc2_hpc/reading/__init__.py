"""Readers for untrusted files: nothing in a file is used before its kind, size and types are checked.

    from mc2_hpc.reading.json_file import read_json
    card = read_json(path, Card)  # Card: a msgspec.Struct beside the code that owns the format

Every reader opens only regular files, limits how much it reads into memory, and raises a one-line
:class:`~mc2_hpc.errors.UserError` that names the file, the place in it, and what was expected there.

=============  ================================================================================
files          regular files: opened without blocking, up to a size limit, as bytes or text
json_file      JSON to a typed value: one schema per kind of file
yaml_file      YAML to a tree that keeps the original text and line numbers
settings       that tree, with ``key.sub=value`` overrides, to a dataclass
arrays         NPY and NPZ: element type, dimensions and length
parquet_file   Parquet: each expected column once, of the expected type
tensors        headers of safetensors files: names, element types, shapes, offsets
torch_file     files of torch.save: tensors alone, without running code
=============  ================================================================================
"""
