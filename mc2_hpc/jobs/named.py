"""Objects passed between processes as a name and plain arguments, never as a pickle.

A task on another machine reads JSON: which function or class to import, the class's arguments, and one value per shard.
Types come from the annotations of the imported code, so the JSON does not contain any.
"""

import dataclasses
import inspect
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

import msgspec

from mc2_hpc.errors import UserError
from mc2_hpc.storage import atomic_path


@dataclass(frozen=True)
class Named:
    """A module-level function, or an instance of a module-level class, by name."""

    name: str
    """Dotted: ``package.module.Name``."""
    arguments: dict[str, Any] | None = None
    """Keyword arguments of the class, as plain JSON values; None for a function."""

    @classmethod
    def of(cls, value: Callable[..., Any]) -> "Named":
        """The name of a function, or of an instance of a dataclass whose fields are plain."""
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            named = cls(_dotted(type(value)), to_plain(value))
        else:
            named = cls(_dotted(value))
        assert named.load() == value, f"{value} does not survive being written as JSON"
        return named

    def load(self) -> Any:
        """The function, or a new instance.

        Raises:
            UserError: there is no such module or name, or the arguments do not fit the class.
        """
        target = import_object(self.name)
        if self.arguments is None:
            return target
        if dataclasses.is_dataclass(target):
            return from_plain(self.arguments, target, self.name)
        types = constructor_types(target)
        return target(**{key: from_plain(v, types.get(key, Any), self.name) for key, v in self.arguments.items()})


def _dotted(target: Any) -> str:
    assert "<" not in target.__qualname__ and target.__module__ != "__main__", f"{target} cannot be imported by name"
    return f"{target.__module__}.{target.__qualname__}"


def import_object(name: str) -> Any:
    """The object that a dotted name refers to.

    Raises:
        UserError: the module is not found or fails to load, or has no such name.
    """
    module_name, _, attribute = name.rpartition(".")
    if not module_name or not all(part.isidentifier() for part in name.split(".")):
        raise UserError(f"{name}: write it as package.module.Name")
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        where = "" if missing == module_name else f" (no module {missing!r})"
        raise UserError(
            f"{name}: no module {module_name!r} can be imported{where}; install it, or put its folder on PYTHONPATH"
        ) from None
    except Exception as error:  # whatever the code of the module does
        raise UserError(f"{name}: module {module_name} fails to load: {describe(error)}") from error
    if not hasattr(module, attribute):
        raise UserError(f"{name}: module {module_name} has no {attribute!r}")
    return getattr(module, attribute)


def describe(error: BaseException) -> str:
    """An error of foreign code in one line: its type, its message, and where it was raised."""
    message = " ".join(str(error).split())
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = f" ({Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno})" if trace is not None else ""
    return f"{type(error).__name__}{': ' if message else ''}{message}{place}"


def constructor_types(kind: type) -> dict[str, Any]:
    """The annotated types of a class's constructor parameters, by name; ``Any`` without an annotation."""
    try:
        parameters = inspect.signature(kind, eval_str=True).parameters
    except NameError:  # annotations that only a type checker can resolve
        return dict.fromkeys(inspect.signature(kind).parameters, Any)
    empty = inspect.Parameter.empty
    return {key: Any if one.annotation is empty else one.annotation for key, one in parameters.items()}


def constructor_options(kind: type, words: Sequence[str], where: str, *, form: str) -> dict[str, Any]:
    """Plain arguments for a constructor from ``key=value`` words, of the types that it declares.

    Args:
        where: the flag and the class, for errors.
        form: how the flag is written.

    Raises:
        UserError: a word of another form, an unknown option, or a value of the wrong type.
    """
    types = constructor_types(kind)
    arguments = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"{where} {word}: write it as {form}")
        if key not in types:
            raise UserError(f"{where} {word}: no option {key!r}; it has {', '.join(types) or 'none'}")
        arguments[key] = to_plain(from_plain(value, types[key], f"{where} {word}", strict=False))
    return arguments


def type_of_input(work: Callable[..., Any]) -> Any:
    """The annotated type of ``work``'s parameter after the shard's name; ``Any`` without an annotation."""
    function = work if inspect.isroutine(work) else type(work).__call__
    try:
        parameters = list(inspect.signature(work).parameters)
    except ValueError:  # a builtin without a signature
        return Any
    return get_type_hints(function).get(parameters[1], Any) if len(parameters) > 1 else Any


def to_plain(value: Any) -> Any:
    """``value`` (dataclasses, paths, tuples, numbers, ...) as plain JSON values."""
    return msgspec.to_builtins(value, enc_hook=_encode)


def from_plain(plain: Any, kind: Any, where: str, *, strict: bool = True) -> Any:
    """The inverse of :func:`to_plain`: an instance of ``kind``.

    Args:
        where: the origin of ``plain``, for the error.
        strict: if false, strings such as "3" and "true" become numbers and booleans.

    Raises:
        UserError: ``plain`` has another shape or type.
    """
    try:
        return msgspec.convert(plain, kind, dec_hook=_decode, strict=strict)
    except msgspec.ValidationError as error:
        raise UserError(f"{where}: {error}") from None


def write_plain(path: Path, value: Any) -> None:
    """Write ``value`` as JSON, atomically."""
    with atomic_path(path) as temporary:  # json escapes, unlike msgspec's encoder: file names may not be UTF-8
        temporary.write_text(json.dumps(to_plain(value)), encoding="ascii")


def read_plain(path: Path, kind: Any) -> Any:
    """Read an instance of ``kind`` that :func:`write_plain` wrote.

    Raises:
        UserError: the file is missing, or is not JSON of this type.
    """
    try:
        plain = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); run the same command again") from None
    return from_plain(plain, kind, str(path))


def search_path() -> list[str]:
    """This process's module search path, for use in another process; see :func:`extend_search_path`."""
    return [os.path.abspath(entry) for entry in sys.path if not entry or os.path.exists(entry)]


def extend_search_path(folders: list[str]) -> None:
    """Search ``folders`` for modules too, after everything else."""
    sys.path += [folder for folder in folders if folder not in sys.path]


def _encode(value: Any) -> str:
    if isinstance(value, Path):
        return str(value)
    raise NotImplementedError(f"{type(value).__name__} {value!r} cannot be written as JSON")


def _decode(kind: Any, value: Any) -> Any:
    if isinstance(kind, type) and issubclass(kind, Path) and isinstance(value, str):
        return Path(value)
    raise NotImplementedError(f"{kind} cannot be read from JSON")
