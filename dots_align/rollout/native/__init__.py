"""The rollout forward in C++ for CPUs: the torch path's results, where a compiler is at hand."""

from dots_align.rollout.native.forward import NativeForward, native_forward, why_not

__all__ = ["NativeForward", "native_forward", "why_not"]
