"""Quantizes a GGUF file by llama.cpp's own quantizer, in a process of its own: what it cannot do, it ends with abort().

Run by path (`python -P quantize_gguf.py`), never imported. Reads one JSON request from stdin: `source`, `output`,
`format` (such as Q4_K_M), `threads` and `buffer_bytes` (the most of a tensor that is in memory at once). Writes a JSON
object to stdout, empty on success.
"""

from __future__ import annotations

import ctypes
import json
import sys

import llama_cpp  # pyright: ignore[reportMissingImports] - optional: the extra `llama`


def main() -> None:
    # Libraries may print: the result has the real stdout to itself.
    stdout, sys.stdout = sys.stdout, sys.stderr
    request = json.load(sys.stdin)
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{request['format']}")
    parameters.nthread = request["threads"]
    if hasattr(parameters, "max_buf_size"):
        parameters.max_buf_size = request["buffer_bytes"]
    source, output = request["source"].encode(), request["output"].encode()
    status = llama_cpp.llama_model_quantize(source, output, ctypes.byref(parameters))  # pyright: ignore[reportArgumentType]
    if status != 0:
        sys.exit(f"llama.cpp's quantizer ends with status {status}")
    stdout.write("{}")
    stdout.flush()  # at exit Python flushes sys.stdout only, which is another stream by now


if __name__ == "__main__":
    main()
