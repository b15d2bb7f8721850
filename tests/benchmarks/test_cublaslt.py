"""What can be said of the bindings without a GPU."""

import ctypes

import pytest

from benchmarks import cublaslt


def test_a_heuristic_result_has_the_headers_size() -> None:
    """Eight words of the algorithm, then size_t, two of 4 bytes and four reserved ones."""
    assert ctypes.sizeof(cublaslt.Algorithm) == 64 + 8 + 4 + 4 + 16
    assert cublaslt.Algorithm.workspace.offset == 64


def test_the_library_is_the_one_that_pytorch_has_loaded(monkeypatch, tmp_path) -> None:
    maps = tmp_path / "maps"
    line = "7f00-7f01 r-xp 00000000 08:01 42   {}\n"
    maps.write_text(line.format("/usr/lib/libc.so.6"))
    monkeypatch.setattr(cublaslt, "Path", lambda _: maps)
    with pytest.raises(LookupError, match="multiply something on the GPU first"):
        cublaslt.loaded_library()
    maps.write_text(line.format("/usr/lib/libc.so.6") + line.format("/opt/a b/libcublasLt.so.13"))
    monkeypatch.setattr(ctypes, "CDLL", lambda path: path)
    assert cublaslt.loaded_library() == "/opt/a b/libcublasLt.so.13"
