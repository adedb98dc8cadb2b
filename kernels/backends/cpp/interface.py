"""The interface of the C++: the structs that its functions take, and the types of arguments and results."""

import ctypes


class Neighbours(ctypes.Structure):
    """Where the neighbours of a pixel are."""

    _fields_ = (
        ("count", ctypes.c_int64),
        ("reach", ctypes.c_int64),
        ("dy", ctypes.POINTER(ctypes.c_int64)),
        ("dx", ctypes.POINTER(ctypes.c_int64)),
        ("by_dx", ctypes.POINTER(ctypes.c_int64)),
    )


class Variant(ctypes.Structure):
    """The numbers of a variant of the affinity."""

    _fields_ = (
        ("guard", ctypes.c_double),
        ("weight", ctypes.c_double),
        ("samples", ctypes.c_double),
        ("sigma_power", ctypes.c_int64),
        ("power", ctypes.c_int64),
        ("position", ctypes.POINTER(ctypes.c_double)),
    )


class Affinity(ctypes.Structure):
    """The arguments of `affinity_*`."""

    _fields_ = (
        ("image", ctypes.c_void_p),
        ("strides", ctypes.c_int64 * 4),
        ("batch", ctypes.c_int64),
        ("channels", ctypes.c_int64),
        ("height", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("neighbours", Neighbours),
        ("variant", Variant),
        ("threads", ctypes.c_int64),
    )


class Propagation(ctypes.Structure):
    """The arguments of `propagate_*`."""

    _fields_ = (
        ("masks", ctypes.c_void_p),
        ("strides", ctypes.c_int64 * 4),
        ("batch", ctypes.c_int64),
        ("channels", ctypes.c_int64),
        ("height", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("counts", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("weights_type", ctypes.c_int64),
        ("neighbours", Neighbours),
        ("iterations", ctypes.c_int64),
        ("transposed", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("chunk_bytes", ctypes.c_int64),
    )


class Resize(ctypes.Structure):
    """The arguments of `resize`."""

    _fields_ = (
        ("maps", ctypes.c_void_p),
        ("strides", ctypes.c_int64 * 3),
        ("planes", ctypes.c_int64),
        ("in_height", ctypes.c_int64),
        ("in_width", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("height", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("threads", ctypes.c_int64),
    )


class Labels(ctypes.Structure):
    """The arguments of `choose_labels`."""

    _fields_ = (
        ("maps", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("counts", ctypes.c_void_p),
        ("numbers", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("channels", ctypes.c_int64),
        ("views", ctypes.c_int64),
        ("scores", ctypes.c_int64),
        ("in_height", ctypes.c_int64),
        ("in_width", ctypes.c_int64),
        ("height", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("ignore_index", ctypes.c_int64),
        ("threads", ctypes.c_int64),
    )


# The functions and their arguments. `{name}_workspace` returns the bytes of the workspace that a caller must pass.
FUNCTIONS = {
    "affinity_float": Affinity,
    "affinity_double": Affinity,
    "propagate_float": Propagation,
    "propagate_double": Propagation,
    "resize": Resize,
    "choose_labels": Labels,
}


def declare(library: ctypes.CDLL) -> None:
    """Tell ctypes the arguments and the results of all functions of a library.

    Raises:
        OSError: the library was compiled from another version of the C++.
    """
    try:
        _check_structs(library)
        for name, struct in FUNCTIONS.items():
            function, workspace = getattr(library, name), getattr(library, f"{name}_workspace")
            function.argtypes, function.restype = (ctypes.POINTER(struct), ctypes.c_void_p), None
            workspace.argtypes, workspace.restype = (ctypes.POINTER(struct),), ctypes.c_int64
        _declare_lattice(library)
    except AttributeError as error:  # a function is missing
        raise OSError(f"the library was compiled from another version of the C++: {error}") from error


def _declare_lattice(library: ctypes.CDLL) -> None:
    """Declare the functions of lattice.cpp. They return a status: 0 where all went well."""
    pointer, number, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
    library.lattices_new.argtypes = (pointer, pointer, number, number, number, real, real, number, number)
    library.lattices_free.argtypes = (pointer,)
    library.lattices_free.restype = None
    library.lattices_vertices.argtypes = (pointer,)
    library.lattices_vertices.restype = number
    for function in (library.lattices_filter_float, library.lattices_filter_double):
        function.argtypes = (pointer, pointer, pointer, *4 * (number,))
    library.lattices_mean_field.argtypes = (pointer, pointer, number, pointer, pointer, *4 * (number,))


def _check_structs(library: ctypes.CDLL) -> None:
    """Refuse a library whose structs are not those above, because it was compiled from another version of the C++."""
    structs = {
        "affinity_size": Affinity,
        "propagation_size": Propagation,
        "resize_size": Resize,
        "labels_size": Labels,
    }
    expected = [ctypes.sizeof(struct) for struct in structs.values()]
    try:
        actual = [ctypes.c_int64.in_dll(library, name).value for name in structs]
    except ValueError as error:
        raise OSError(f"the compiled library is of another version: {error}") from error
    if actual != expected:
        raise OSError(f"the compiled library is of another version: its structs have {actual} bytes, not {expected}")
