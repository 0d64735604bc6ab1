"""The user's objects by name: found, cached, and refused in one line."""

import sys
from pathlib import Path

import pytest

from autoslim.errors import ConfigError
from autoslim.importing import load_object


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def refusal(spec: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_object(spec)
    text = str(caught.value)
    assert "\n" not in text
    assert repr(spec) in text
    return text


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    """Work in an empty directory; forget what a test imported, and demand that `sys.path` is left alone."""
    monkeypatch.chdir(tmp_path)
    modules, path = set(sys.modules), list(sys.path)
    yield
    assert sys.path == path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def test_object_of_an_installed_module() -> None:
    from numpy import ndarray

    assert load_object("numpy:ndarray") is ndarray


def test_module_in_the_current_directory(tmp_path):
    write(tmp_path / "my_package" / "nets.py", "def net(): return 7")
    assert load_object("my_package.nets:net")() == 7


def test_file_given_relative_or_absolute_is_the_same_module(tmp_path):
    path = write(tmp_path / "nets" / "small.py", "class Net: pass")
    assert load_object("nets/small.py:Net") is load_object(f"{path}:Net")


def test_files_of_the_same_name_are_different_modules(tmp_path):
    write(tmp_path / "a" / "net.py", "name = 'a'")
    write(tmp_path / "b" / "net.py", "name = 'b'")
    assert [load_object("a/net.py:name"), load_object("b/net.py:name")] == ["a", "b"]


def test_file_may_import_its_neighbours_and_the_current_directory(tmp_path):
    write(tmp_path / "nets" / "beside_it.py", "width = 3")
    write(tmp_path / "in_cwd.py", "depth = 4")
    write(tmp_path / "nets" / "net.py", "from beside_it import width\nfrom in_cwd import depth\narea = width * depth")
    assert load_object("nets/net.py:area") == 12


@pytest.mark.parametrize("spec", ["net", "net.py", ":net", "net.py:", ""])
def test_not_both_parts(spec):
    assert "package.module:name or path/to/file.py:name" in refusal(spec)


def test_unknown_names_suggest_the_nearest(tmp_path):
    write(tmp_path / "my_network.py", "def small_net(): pass")
    assert "did you mean 'my_network.py'?" in refusal("my_netwrk.py:small_net")
    assert "did you mean 'my_network'?" in refusal("my_netwrk:small_net")
    assert "did you mean 'small_net'?" in refusal("my_network.py:smal_net")
    assert "known: small_net" in refusal("my_network:xyz")
    assert "no module 'numpy.linlag'; did you mean 'linalg'?" in refusal("numpy.linlag:norm")
    assert "no Python file" in refusal("no/such/folder/net.py:net")
    assert "no Python file" in refusal("./my_network:small_net")


@pytest.mark.parametrize("spec", ["broken.py:net", "broken:net"])
@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("x = 1\nraise ValueError('first\\nsecond')", "ValueError: first second"),
        ("x = 1\ny = = 2", "SyntaxError: invalid syntax"),
        ("x = 1\nimport no_such_module_anywhere", "ModuleNotFoundError: No module named 'no_such_module_anywhere'"),
        ("import json\njson.loads('{')", "JSONDecodeError: "),
        ("import sys\nsys.exit(3)", "SystemExit: 3"),
    ],
)
def test_exception_of_the_users_module_is_reported_with_its_line(tmp_path, spec, code, reason):
    path = write(tmp_path / "broken.py", code)
    text = refusal(spec)
    assert f"{spec!r} cannot be imported: {reason}" in text
    assert f"({path}, line 2)" in text


def test_file_mended_after_a_failure_is_loaded_anew(tmp_path):
    path = write(tmp_path / "net.py", "raise ValueError")
    assert "ValueError (" in refusal("net.py:net")
    path.write_text("net = 'this one works'")
    assert load_object("net.py:net") == "this one works"
