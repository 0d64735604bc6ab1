"""Find the user's own Python object by a string: `package.module:name` or `path/to/file.py:name`."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import pkgutil
import sys
import sysconfig
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from autoslim.errors import ConfigError, nearest

_YOURS = "name a function of your own: path/to/file.py:function"
_MAX_LISTED = 12  # a hint that lists more names than this is noise


def load_object(spec: str) -> Any:
    """What `spec`, `package.module:name` or `path/to/file.py:name`, stands for; `ConfigError` if it cannot be had.

    The current directory and that of the file are importable while the module loads, and no longer. Loading a file
    twice gives the same module.
    """
    where, _, name = spec.rpartition(":")
    if not where or not name or "\0" in spec:
        raise ConfigError(f"{spec!r} names no Python object; write package.module:name or path/to/file.py:name")
    is_file = where.endswith(".py") or "/" in where or "\\" in where
    if not is_file and where.partition(".")[0] in sys.stdlib_module_names:
        raise ConfigError(f"{spec!r}: {where} is part of Python and knows no networks or images; {_YOURS}")
    module = _load_file(where, spec) if is_file else _load_module(where, spec)
    try:
        return getattr(module, name)
    except AttributeError:
        public = [known for known in vars(module) if not known.startswith("_")]
        raise ConfigError(f"{spec!r}: {where} has no {name!r}{_hint(name, public)}") from None


def is_installed(made: Any) -> bool:
    """Was a function or class written by neither the user nor us, but came with Python or a package?"""
    if not inspect.isroutine(made) and not inspect.isclass(made):
        return False
    module = getattr(made, "__module__", None) or ""
    file = getattr(sys.modules.get(module), "__file__", None)
    if module.partition(".")[0] in sys.stdlib_module_names or file is None:
        return True
    return Path(file).resolve().is_relative_to(Path(sysconfig.get_path("purelib")).resolve()) or Path(
        file
    ).resolve().is_relative_to(Path(sysconfig.get_path("platlib")).resolve())


def describe(error: BaseException) -> str:
    """An exception of the user's own code in one line: its type, its text, and the file and line it came from."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{type(error).__name__}: {error.msg} ({error.filename}, line {error.lineno})"
    text = f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<frozen")]
    libraries = (str(Path(__file__).parent), *(sysconfig.get_path(key) for key in ("stdlib", "purelib", "platlib")))
    # the deepest line the user wrote says more than the library line it failed in
    frames = [frame for frame in frames if not frame.filename.startswith(libraries)] or frames
    return f"{text} ({frames[-1].filename}, line {frames[-1].lineno})" if frames else text


def _load_file(where: str, spec: str) -> ModuleType:
    path = Path(os.path.expanduser(where)).resolve()
    if path.suffix != ".py" or not path.is_file():
        scripts = {file.name: file for file in path.parent.glob("*.py")} if path.parent.is_dir() else {}
        raise ConfigError(f"{spec!r}: no Python file {where!r} in {Path.cwd()}{_hint(path.name, scripts)}")
    key = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"  # two files may share their stem
    if key in sys.modules:
        return sys.modules[key]
    module_spec = importlib.util.spec_from_file_location(key, path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = sys.modules[key] = importlib.util.module_from_spec(module_spec)
    try:
        with _importable(path.parent, Path.cwd()):
            module_spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[key]
        if isinstance(error, (Exception, SystemExit)):
            raise ConfigError(f"{spec!r} cannot be imported: {describe(error)}") from error
        raise
    return module


def _load_module(name: str, spec: str) -> ModuleType:
    with _importable(Path.cwd()):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            missing = error.name or ""
            if not f"{name}.".startswith(f"{missing}."):  # it was found, but something that it imports was not
                raise ConfigError(f"{spec!r} cannot be imported: {describe(error)}") from error
            parent, _, last = missing.rpartition(".")
            path = getattr(sys.modules[parent], "__path__", []) if parent else None
            known = [module.name for module in pkgutil.iter_modules(path)]
            raise ConfigError(f"{spec!r}: no module {missing!r}{_hint(last, known)}") from None
        except (Exception, SystemExit) as error:
            raise ConfigError(f"{spec!r} cannot be imported: {describe(error)}") from error


@contextmanager
def _importable(*folders: Path) -> Iterator[None]:
    entries = [str(folder) for folder in folders]
    sys.path[:0] = entries
    importlib.invalidate_caches()  # a file written a moment ago must be found
    try:
        yield
    finally:
        for entry in entries:
            with suppress(ValueError):  # the user's code may have cleaned up itself
                sys.path.remove(entry)


def _hint(given: str, known: Iterable[str]) -> str:
    known = list(known)
    hint = nearest(given, known)
    return f"; {hint}" if hint.startswith("did") or 0 < len(known) <= _MAX_LISTED else ""
