"""What a layer does between its matrix products, in C++ for CPUs, where a compiler is at hand."""
