"""What travels between the checker, which knows the tests, and the program, which must not: plain data and handles.

The program's side answers requests with values; whatever it sends is decoded to exact built-in types, so an object
with a clever `__eq__` never reaches an assertion. Everything that is no plain data stays with the program, and the
checker gets a `Remote` for it, which equals nothing but itself.
"""

from __future__ import annotations

import builtins
import json
import os
import struct
import sys
import types
from collections import deque

TYPE_CHECKING = False
if TYPE_CHECKING:  # so that it costs nothing at run time
    from collections.abc import Callable, Iterator
    from typing import Any

MAX_MESSAGE = 16 << 20  # bytes


class Channel:
    """Messages of JSON over two pipes, each after its length in bytes."""

    def __init__(self, reading: int, writing: int) -> None:
        self._reading, self._writing = reading, writing

    def send(self, message: Any) -> None:
        data = json.dumps(message).encode()
        if len(data) > MAX_MESSAGE:
            raise ValueError(f"a value of more than {MAX_MESSAGE >> 20} MiB")
        data = struct.pack("!I", len(data)) + data
        while data:
            data = data[os.write(self._writing, data) :]

    def receive(self) -> Any:
        """Raises: EOFError, if the other side is gone; ValueError, if it sends what is no message."""
        size = struct.unpack("!I", self._exactly(4))[0]
        if size > MAX_MESSAGE:
            raise ValueError(f"a message of {size} bytes")
        return json.loads(self._exactly(size))

    def _exactly(self, count: int) -> bytes:
        parts = []
        while count:
            part = os.read(self._reading, min(count, 1 << 20))
            if not part:
                raise EOFError("the other side is gone")
            parts.append(part)
            count -= len(part)
        return b"".join(parts)


# ---------------------------------------------------------------------------------------------------------- wire format

_MAX_SHORT_INT = 1 << 62  # beyond, decimal digits would take quadratic time and hit Python's limit of them


def encode(value: Any, keep: Callable[[Any], int | str]) -> Any:
    """A value as JSON: text, numbers and None as they are, all else as [kind, content]; `keep` gives a handle to what
    is no plain data.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        number = int.__index__(value)
        return number if -_MAX_SHORT_INT < number < _MAX_SHORT_INT else ["int", hex(number)]
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, complex):
        return ["complex", value.real, value.imag]
    if isinstance(value, bytes | bytearray):
        return ["bytes" if isinstance(value, bytes) else "bytearray", value.hex()]
    if isinstance(value, dict):
        return ["dict", [[encode(k, keep), encode(v, keep)] for k, v in value.items()]]
    for kind, plain in _COLLECTIONS.items():
        if isinstance(value, plain):
            return [kind, [encode(item, keep) for item in value]]
    if isinstance(value, range):
        return ["range", [encode(part, keep) for part in (value.start, value.stop, value.step)]]
    return ["object", keep(value)]


_COLLECTIONS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "deque": deque}


def decode(data: Any, find: Callable[[int], Any]) -> Any:
    """The value again, of exact built-in types. Raises: ValueError or TypeError for what `encode` does not write."""
    if not isinstance(data, list):
        if isinstance(data, dict):
            raise ValueError("no such kind of value")
        return data
    kind, *content = data
    if kind == "int":
        return int(content[0], 16)
    if kind == "complex":
        return complex(float(content[0]), float(content[1]))
    if kind in ("bytes", "bytearray"):
        return {"bytes": bytes, "bytearray": bytearray}[kind].fromhex(content[0])
    if kind == "dict":
        return {decode(k, find): decode(v, find) for k, v in content[0]}
    if kind == "range":
        return range(*(decode(part, find) for part in content[0]))
    if kind == "object":
        return find(content[0])
    return _COLLECTIONS[kind]([decode(item, find) for item in content[0]])


# -------------------------------------------------------------------------------------------------- the program's side


class Program:
    """Runs source text as a module, and does with its objects what the checker asks for."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._objects: list[Any] = []
        self._module = types.ModuleType("program")
        sys.modules["program"] = self._module  # dataclasses and pickle look their module up

    def serve(self) -> None:
        """Answers requests until the checker is gone."""
        while True:
            try:
                request = self._channel.receive()
            except EOFError:
                return
            try:
                answer = {"value": encode(self._perform(*request), self._keep)}
            except BaseException as error:  # noqa: BLE001 - SystemExit too: the program's end is not ours
                kinds = [kind.__name__ for kind in type(error).__mro__]
                answer = {"error": kinds, "text": _safe_text(error)}
            self._channel.send(answer)

    def _keep(self, value: Any) -> int:
        self._objects.append(value)
        return len(self._objects) - 1

    def _find(self, handle: int | str) -> Any:
        return getattr(builtins, handle) if isinstance(handle, str) else self._objects[handle]

    def _perform(self, operation: str, *arguments: Any) -> Any:
        target, *values = [decode(argument, self._find) for argument in arguments]
        if operation == "run":
            exec(compile(target, "program", "exec", dont_inherit=True), self._module.__dict__)
            return None
        if operation == "find":
            return _Whole(self._keep(getattr(self._module, target)))
        if operation == "call":
            return target(*values[0], **values[1])
        return _OPERATIONS[operation](target, *values)


class _Whole(tuple):
    """A handle that is asked for as such, be the object plain data or not."""

    __slots__ = ()

    def __new__(cls, handle: int) -> _Whole:
        return super().__new__(cls, (handle,))


_OPERATIONS = {
    "getattr": getattr,
    "setattr": setattr,
    "getitem": lambda target, key: target[key],
    "len": len,
    "iter": iter,
    "next": next,
}


def _safe_text(error: BaseException) -> str:
    try:
        return str(error)[:500]
    except BaseException:  # noqa: BLE001 - the program's own __str__
        return ""


# -------------------------------------------------------------------------------------------------- the checker's side


class Connection:
    """The checker's end: runs a program, and makes `Remote`s of its names."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def run(self, source: str) -> None:
        """Raises: what the program raised at its top level."""
        self.ask("run", source)

    def find(self, name: str) -> Remote:
        """Raises: AttributeError, if the program has no such name."""
        (handle,) = self.ask("find", name)
        return Remote(self, int(handle))

    def ask(self, operation: str, *arguments: Any) -> Any:
        self._channel.send([operation, *(encode(argument, self._handle) for argument in arguments)])
        answer = self._channel.receive()
        if "error" in answer:
            raise _exception(answer["error"])(f"in the program: {answer.get('text')}")
        return decode(answer["value"], lambda handle: Remote(self, int(handle)))

    @staticmethod
    def _handle(value: Any) -> int | str:
        if isinstance(value, Remote):
            return object.__getattribute__(value, "_handle")
        name = getattr(value, "__name__", "")
        if getattr(builtins, name, None) is value:  # such as the type in f([1, 2.5], float)
            return name
        raise TypeError(f"a test may not pass a {type(value).__name__} to the program")


def _exception(kinds: Any) -> type[Exception]:
    """The nearest built-in exception, so that a test may expect one."""
    for kind in kinds:
        found = getattr(builtins, kind, None) if isinstance(kind, str) else None
        if isinstance(found, type) and issubclass(found, Exception) and found is not AssertionError:
            return found
    return RuntimeError


class Remote:
    """Something that lives in the program. It is neither true nor false, and equals only itself, whatever the program
    says: only plain data passes an assertion.
    """

    def __init__(self, connection: Connection, handle: int) -> None:
        object.__setattr__(self, "_connection", connection)
        object.__setattr__(self, "_handle", handle)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _ask(self, "call", args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return _ask(self, "getattr", name)

    def __setattr__(self, name: str, value: Any) -> None:
        _ask(self, "setattr", name, value)

    def __getitem__(self, key: Any) -> Any:
        return _ask(self, "getitem", key)

    def __len__(self) -> int:
        return _ask(self, "len")

    def __iter__(self) -> Iterator[Any]:
        return _ask(self, "iter")

    def __next__(self) -> Any:
        return _ask(self, "next")

    def __bool__(self) -> bool:
        raise TypeError("a test needs plain data, the program gave an object of its own")


def _ask(remote: Remote, operation: str, *arguments: Any) -> Any:
    return object.__getattribute__(remote, "_connection").ask(operation, remote, *arguments)
